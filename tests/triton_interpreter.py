"""Triton's interpreter, which spends most of its time on types: it makes each of them once.

What is remembered is what Triton itself made; fields that it does not have here fail. A program
costs by its operations, not by their elements: kernels of many small programs have larger ones.
"""

import functools
import importlib

from triton.language import core
from triton.runtime import interpreter


@functools.cache
def hasten():
    """Patch the interpreter: to rewrite a function once a launch, and to make a type once."""
    importlib.import_module("hla.kernels.triton.carry").E *= 16
    patch, known = interpreter._patch_lang, interpreter.InterpretedFunction.rewritten_fn
    interpreter._patch_lang = lambda fn: None if fn in known else patch(fn)  # no inner call does
    interpreter._get_np_dtype = numpy_dtypes(interpreter._get_np_dtype)
    core.block_type.__init__ = blocks(core.block_type.__init__)
    core.tensor.__init__ = tensors(core.tensor.__init__)


def numpy_dtypes(make):
    made = {}

    def dtype(kind):
        name = kind.scalar.name
        if name not in made:
            made[name] = make(kind)
        return made[name]

    return dtype


def blocks(make):
    made = {}

    def init(self, element_ty, shape):
        key = element_ty.name, *(getattr(n, "value", n) for n in shape)
        if key not in made:
            make(self, element_ty, shape)
            assert set(vars(self)) == {"element_ty", "shape", "numel", "name"}
            made[key] = self
        like = made[key]
        self.element_ty, self.shape = like.element_ty, like.shape
        self.numel, self.name = like.numel, like.name

    return init


def tensors(make):
    made = {}

    def init(self, handle, type):
        key = (*type.shape,) if type.is_block() else ()
        if key not in made:
            make(self, handle, type)
            assert set(vars(self)) == {"handle", "shape", "numel", "type", "dtype"}
            made[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = made[key]

    return init
