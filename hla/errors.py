"""What hla raises and warns beyond Python's own ValueError and TypeError."""

from typing import Any

import numpy as np


class Unsupported(NotImplementedError):
    """A named backend or form cannot do this request; the message holds each reason."""


class SlowPathWarning(UserWarning):
    """``backend=None`` ran the generic array code on an accelerator; given once per reason."""


def kind_of(value: Any) -> str:
    """Describe what came in place of what was expected."""
    if np.isscalar(value) or value is None:
        return f"{value!r} ({type(value).__name__})"
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return f"a {name}"
