"""Triton's interpreter, which spends most of its time on types: it makes each of them once.

What is remembered is what Triton itself made; fields that it does not have here fail. A program
costs by its operations, not by their elements: kernels of many small programs have larger ones.
Operations on numbers of one type are NumPy's, which broadcasts as Triton does; Triton's own code
casts, broadcasts and, to find an overflow of int32, computes again by a dozen operations more.
"""

import functools
import importlib
import inspect
import os

import numpy as np
from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

NUMBERS = {"fp16": float, "fp32": float, "fp64": float, "int32": int, "int64": int}


@functools.cache
def hasten():
    """Patch the interpreter: to rewrite a function once, and to make a type or a patch once.

    Where Triton compiles, nothing is patched.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    importlib.import_module("hla.kernels.triton.carry").E *= 16
    known = interpreter.InterpretedFunction.rewritten_fn
    patch = patches(interpreter._patch_lang)
    interpreter._patch_lang = lambda fn: None if fn in known else patch(fn)  # no inner call does
    interpreter._get_np_dtype = numpy_dtypes(interpreter._get_np_dtype)
    interpreter.GridExecutor.__init__ = signatures(interpreter.GridExecutor.__init__)
    core.block_type.__init__ = blocks(core.block_type.__init__)
    core.tensor.__init__ = tensors(core.tensor.__init__)
    core.dtype.__eq__ = equal(core.dtype.__eq__)
    core._unwrap_if_constexpr = unwrap(core._unwrap_if_constexpr)
    own = semantic.TritonSemantic
    for name, operate in ARITHMETIC.items():
        setattr(own, name, quick(operate, getattr(own, name)))
    for name, operate in COMPARISONS.items():
        setattr(own, name, quick(operate, getattr(own, name), compare=True))
    own.add = quick_pointers(own.add)
    own.broadcast_impl_value = quick_broadcast(own.broadcast_impl_value)
    own.and_ = quick_masks(np.bitwise_and, own.and_)
    own.or_ = quick_masks(np.bitwise_or, own.or_)
    own.where = quick_where(own.where)


def patches(patch):
    """What a launch patches in Triton's language, by the modules that its kernel sees."""
    made = {}

    def patched(fn):
        seen = filter(inspect.ismodule, fn.__globals__.values())
        key = frozenset(x.__name__ for x in seen if x in (core, language))
        if key not in made:
            scope = patch(fn)
            made[key] = [(x, n, called(x, n, getattr(x, n))) for x, n, _ in scope._changes]
            scope.restore()
        scope = interpreter._LangPatchScope()
        for x, name, value in made[key]:
            scope.set_attr(x, name, value)
        return scope

    return patched


def called(holder, name, patched):
    """What is called in place of a patched function, which adds the semantic by three calls."""
    function = (getattr(patched, "__kwdefaults__", None) or {}).get("member")
    if function is None:  # it is a function of the interpreter's own
        return patched
    if holder is core.tensor and name in OPERATORS:
        return operator(getattr(semantic.TritonSemantic, OPERATORS[name]), name)
    if holder is core.tensor and name == "__getitem__":
        return quick_index(patched)
    function = getattr(function, "__wrapped__", function)  # beneath a check that it is given

    def call(*args, _semantic=None, **options):
        return function(*args, **options, _semantic=interpreter.interpreter_semantic)

    return call


def operator(method, name):
    """An operator of tensors, whose second operand may be a constant of the kernel."""
    more = (True,) if name.strip("_r") in ("add", "sub", "mul") else ()  # checked for overflow
    turned, value = name[2:].startswith("r"), core._unwrap_if_constexpr

    def operate(x, y):
        y = value(y)
        x, y = (y, x) if turned else (x, y)
        return method(interpreter.interpreter_semantic, x, y, *more)

    return operate


def signatures(make):
    """A kernel's signature, which each launch asks for twice."""

    def init(self, fn, *args, **options):
        fn.__signature__ = inspect.signature(fn)
        make(self, fn, *args, **options)

    return init


def equal(slow):
    return lambda x, y: x is y or slow(x, y)


def unwrap(slow):
    plain = {core.tensor, core.dtype, core.block_type, int, float, bool, str, type(None)}

    def value(x):
        kind = type(x)
        return x if kind in plain else x.value if kind is core.constexpr else slow(x)

    return value


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
COMPARISONS = {
    "less_than": np.less, "less_equal": np.less_equal, "greater_than": np.greater,
    "greater_equal": np.greater_equal, "equal": np.equal, "not_equal": np.not_equal,
}  # fmt: skip


OPERATORS = {  # by the semantic's methods
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "sub", "__mul__": "mul",
    "__rmul__": "mul", "__lt__": "less_than", "__le__": "less_equal", "__gt__": "greater_than",
    "__ge__": "greater_equal", "__eq__": "equal", "__ne__": "not_equal", "__and__": "and_",
    "__or__": "or_",
}  # fmt: skip


def interpreted(x):
    """Whether it is a tensor of the interpreter: the compiler's operate by the same code."""
    return type(x) is core.tensor and type(x.handle) is TensorHandle


def numbers_of(x, y):
    """Values of two operands of one kind of numbers, and the type of both; or None.

    One may be a Python number. Of two sizes NumPy takes the wider, as Triton does.
    """
    if type(x) is not core.tensor:
        x, y, turned = y, x, True
    else:
        turned = False
    if not interpreted(x) or x.dtype.name not in NUMBERS:
        return None
    data, kind = x.handle.data, x.dtype
    if type(y) is core.tensor:
        if y.dtype.name != kind.name:
            if NUMBERS.get(y.dtype.name) is not NUMBERS[kind.name]:
                return None
            kind = max(kind, y.dtype, key=lambda z: z.primitive_bitwidth)
        other = y.handle.data
    elif type(y) is int or (type(y) is float and kind.name[0] == "f"):
        other = data.dtype.type(y)
    else:
        return None
    return (other, data, kind) if turned else (data, other, kind)


def tensor(data, operands, kind, element=None):
    """A result, a block where an operand is."""
    element = element or kind
    if any(type(x) is core.tensor and x.type.is_block() for x in operands):
        key = element.name, data.shape
        if key not in BLOCKS:
            BLOCKS[key] = core.block_type(element, [*data.shape])
        element = BLOCKS[key]
    return core.tensor(TensorHandle(data, kind), element)


BLOCKS: dict = {}


def quick(operate, slow, compare=False):
    """An operation, of numbers of one type by NumPy's; sums and products of int32 are checked."""
    checked = slow.__name__ in ("add", "sub", "mul")

    @functools.wraps(slow)
    def run(self, x, y, *rest, **more):
        given = numbers_of(x, y)
        if given is None:
            return slow(self, x, y, *rest, **more)
        first, second, kind = given
        if checked and kind.name == "int32":
            wide = operate(first.astype(np.int64), second)
            data = wide.astype(np.int32)
            assert (data == wide).all(), f"int32 overflow detected for operation {slow.__name__}"
        else:
            data = operate(first, second)
        return tensor(data, (x, y), kind, core.int1 if compare else None)

    return run


def quick_pointers(slow):
    """Sums of pointers and offsets."""

    @functools.wraps(slow)
    def run(self, x, y, *rest, **more):
        both = interpreted(x) and interpreted(y)
        if not both or not x.dtype.is_ptr() or y.dtype.name not in ("int32", "int64"):
            return slow(self, x, y, *rest, **more)
        size = max(1, x.dtype.element_ty.primitive_bitwidth // 8)
        return tensor(x.handle.data + size * y.handle.data.astype(np.uint64), (x, y), x.dtype)

    return run


def quick_broadcast(slow):
    """Two operands of one shape stay as they are; `tensors` gives equal shapes as one object."""

    @functools.wraps(slow)
    def run(self, x, y):
        both = x.type.is_block() and y.type.is_block()
        return (x, y) if both and x.shape is y.shape else slow(self, x, y)

    return run


def quick_index(slow):
    """New axes of a block."""

    def run(x, index):
        new = type(index) is tuple and all(i is None or i == slice(None) for i in index)
        if not new or not x.type.is_block():
            return slow(x, index)
        return tensor(x.handle.data[index], (x,), x.handle.dtype, x.dtype)

    return run


def quick_masks(operate, slow):
    @functools.wraps(slow)
    def run(self, x, y):
        both = interpreted(x) and interpreted(y)
        if not both or {x.dtype.name, y.dtype.name} != {"int1"}:
            return slow(self, x, y)
        return tensor(operate(x.handle.data, y.handle.data), (x, y), core.int1)

    return run


def quick_where(slow):
    @functools.wraps(slow)
    def run(self, condition, x, y):
        given = numbers_of(x, y)
        if given is None or condition.dtype.name != "int1":
            return slow(self, condition, x, y)
        data = np.where(condition.handle.data, *given[:2])
        return tensor(data, (condition, x, y), given[2])

    return run


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
