"""The public functions as single nodes of torch's graph, which its compiler runs and does not read.

Imported by `hla.api` when it finds itself being compiled.
"""

import torch

from . import api

scan = torch.compiler.allow_in_graph(api._scan)
step = torch.compiler.allow_in_graph(api._step)
combine = torch.compiler.allow_in_graph(api._combine)
