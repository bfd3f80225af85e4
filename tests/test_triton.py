"""What is Triton's own: wide keys in one launch, its launch cache, other libraries' arrays.

What every backend of an accelerator must do is in test_kernel_backend, its compiler's work in
test_kernels.
"""

import contextlib
import itertools
import math
import subprocess
import sys
import textwrap
import time
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import draw, environment, installed, load
from devices import (
    GATES,
    H,
    W,
    accelerated,
    bits,
    check,
    inputs_of,
    per_device,
    poison_empty,
    state_of,
)

import hla
from hla.arguments import prepare
from hla.device.scan import Place, Turn
from hla.device.tiles import Layout


@pytest.fixture(autouse=True)
def poison_torch(monkeypatch):
    poison_empty(monkeypatch, "torch")


def triton(device):
    return device.backend == "triton"


def interpreted(device):
    return triton(device) and device.interpreted


def compiled(device):
    return triton(device) and accelerated(device)


@per_device(
    "D, V, operator, mask, gate",
    [
        *((64, 64, "hla2", "causal", gate) for gate in GATES),
        (20, 80, "ahla", "prefix", "resets"),
        (65, 70, "hla3", "causal", "resets"),
        (65, 70, "hla3", "causal", "per_head"),
        (80, 24, "hla2", "prefix", "per_head"),
        (129, 15, "linear", "none", "none"),
    ],
    where=interpreted,
)
def test_further_columns_of_keys(device, D, V, operator, mask, gate, monkeypatch):
    """One launch for a tile and up to 16 columns beyond, as with bfloat16; denominators too."""
    from hla.kernels.triton import launch, run

    monkeypatch.setattr(run, "limits", lambda *call: launch.WIDE._replace(tail=16))
    monkeypatch.setattr(run.RUNNER, "ready", {})
    options = {"operator": operator, "mask": mask, "scale": D**-0.5}
    ordered = mask != "none"
    inputs = inputs_of(W + 3, gate, D=D, V=V)
    if ordered:
        inputs["initial_state"] = state_of(options, gate, D=D, V=V)
    check(device, inputs, options | {"return_state": ordered})
    inputs = inputs_of(W + 3, gate, D=D, V=V, positive=True)
    check(device, inputs, options | {"normalize": True})


@per_device("operator, gate", [("linear", "per_head"), ("ahla", "resets")], where=interpreted)
def test_float32_in_two_parts(device, operator, gate, monkeypatch):
    """As the hardware multiplies float32, whatever the sizes of keys and of values."""
    from triton import language as tl

    from hla.kernels.triton import launch, rows, run

    parts = "float32", tl.float32, "fp16x3"
    monkeypatch.setattr(launch, "multiplied", lambda *call, narrow: parts)
    monkeypatch.setattr(rows, "rows", lambda *call: ())
    monkeypatch.setattr(run.RUNNER, "ready", {})
    inputs = inputs_of(W + 3, gate)
    inputs |= {"q": inputs["q"] * 1e12, "k": inputs["k"] * 1e-13, "v": inputs["v"] * 1e16}
    check(device, inputs, {"operator": operator, "return_state": operator == "linear"})


def cut(monkeypatch, tokens):
    """Have sequences cut into segments of so many tokens, a multiple of 64."""
    from hla.kernels.triton import launch, run

    monkeypatch.setattr(launch, "PERIOD", 64)
    monkeypatch.setattr(run, "limits", lambda *call: launch.WIDE._replace(period=64))
    monkeypatch.setattr(run, "segments", lambda *call: tokens)
    monkeypatch.setattr(run.RUNNER, "ready", {})


@per_device(
    "operator, mask, gate, count",
    [("linear", "causal", "resets", 18), ("hla2", "causal", "none", 3),
     ("hla2", "causal", "per_head", 3), ("ahla", "causal", "resets", 3),
     ("hla3", "prefix", "per_head", 2), ("hla3", "causal", "resets", 2)],
    where=interpreted,
)  # fmt: skip
def test_segments(device, operator, mask, gate, count, monkeypatch):
    """Their last is short, and their states are joined once or in two levels; from a state on."""
    from hla.device.steps import Carry
    from hla.kernels.triton import run

    cut(monkeypatch, 64)
    options = {"operator": operator, "mask": mask, "scale": 0.25}
    normalize = {"normalize": True, "eps": 1e4} if operator == "hla2" else {}
    inputs = device.inputs(64 * (count - 1) + 5, gate, positive=bool(normalize))
    inputs["initial_state"] = state_of(options, gate, positive=bool(normalize), **device.widths)
    check(device, inputs, options | normalize | {"return_state": True})
    for ready in run.RUNNER.ready.values():
        assert any(isinstance(x, Carry) for x in ready.plan.steps)


@per_device(
    "operator, gate, D, decay, states",
    [("hla2", "none", 128, None, True), ("hla2", "none", 128, 1 - 2**-9, False),
     ("hla2", "resets", 64, None, False), ("ahla", "none", 128, None, True),
     ("hla3", "per_head", 128, None, False)],
    where=compiled,
)  # fmt: skip
def test_long_sequences_of_few_heads(device, operator, gate, D, decay, states):
    """By segments, in the launches of the table, fused or not; deterministic."""
    options = {"operator": operator, "scale": D**-0.5}
    inputs = device.inputs(2500, gate, D=D, V=D)
    if states:
        inputs["initial_state"] = state_of(options, gate, D=D, V=D)
    options |= {"return_state": states} | ({} if decay is None else {"decay": decay})
    check(device, inputs, options)
    arrays, do = device.arrays(inputs), device.array(draw(H, 2500, V=D)[2], device.dtype)
    names = {n: x for n, x in options.items() if n != "return_state"}
    assert "segments of 512 tokens" in hla.explain(**arrays, backend="triton", **names).plan
    got, again = (device.everything(arrays, do, **names) for _ in "ab")
    bits(again, got)


@per_device("operator", ["hla2", "hla3"], where=compiled)
def test_one_head_runs_the_kernels_of_forty(device, operator):
    from hla.kernels.triton import run

    def kernels():
        steps = (do for x in run.RUNNER.ready.values() for turn in x.turns for do in turn.do)
        return {id(do.compiled) for do in steps if isinstance(do, run.Kernel)}

    inputs = inputs_of(500, "per_head", device.dtype, D=64, V=64, heads=40)
    do = draw(40, 500, V=64)[2]
    for part in (slice(40), slice(1), slice(39, 40), slice(7, 20)):
        some = device.arrays({n: x[part] for n, x in inputs.items()})
        device.everything(some, device.array(do[part], device.dtype), operator=operator)
        if part == slice(40):
            made = kernels()
    assert kernels() == made


@per_device(where=compiled)
def test_a_class_of_shapes_is_compiled_once(device, tmp_path):
    """A forward and backward with an empty cache compile few kernels; other lengths none."""
    code = """
        import pathlib, sys, torch, hla
        for B, H, T in ((1, 4, 200), (2, 3, 300)):
            q, k, v, do = (torch.randn(B, H, T, 96, device="cuda").bfloat16() for _ in range(4))
            for x in (q, k, v): x.requires_grad_()
            hla.scan(q, k, v).backward(do)
            torch.cuda.synchronize()
            print(len(list(pathlib.Path(sys.argv[1]).rglob("*.cubin"))))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env=environment(TRITON_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert 0 < first == second <= 8


@per_device(where=triton)
def test_jax_tracers_are_refused_with_the_remedy(device):
    jax = installed("jax")
    q, k, v = load("jax").arrays(*draw(H, 9), dtype="float32")
    for transform in (jax.jit, jax.vmap, jax.grad):
        f = transform(lambda q, k, v: hla.scan(q, k, v, backend=device.backend).sum())
        with pytest.raises(hla.Unsupported, match=r"(?s)trace.*hla\.vjp.*array_api"):
            f(q, k, v)


@per_device(where=interpreted)
def test_jax_arrays_come_and_go_without_a_copy(device):
    """Values and gradients as JAX arrays; states of one library continue in the other."""
    inputs = inputs_of(W + 2, "resets")
    given = {n: load("jax").array(x, "float32") for n, x in inputs.items()}
    do = draw(H, W + 2, V=11, seed=4)[2]
    want = device.everything(device.arrays(inputs), device.array(do))
    got = device.everything(given, load("jax").array(do, "float32"))
    kind = load("jax").kind
    for x, y in zip((got[0], *got[1], *got[2:]), (want[0], *want[1], *want[2:]), strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert isinstance(x, kind)
            np.testing.assert_array_equal(np.asarray(x), y.numpy())
    for n, x in given.items():
        np.testing.assert_array_equal(np.asarray(x, np.float64), inputs[n])


@per_device(
    "library, dtype",
    [(x, d) for x in ("cupy", "jax") for d in ("float32", "bfloat16")],
    where=compiled,
)
def test_arrays_of_other_libraries_are_read_where_they_lie(device, library, dtype, monkeypatch):
    """Results are the caller's arrays and torch's bits; gradients too."""
    from hla.libraries.torch import Torch

    torch, xp = installed("torch"), installed(library)
    inputs = inputs_of(300, "resets", dtype, D=64, V=64)
    own = [*device.arrays(inputs, dtype).values(), device.array(draw(H, 300, V=64)[2], dtype)]
    if library == "cupy":
        mine = [xp.from_dlpack(x) for x in own]
        pointers = [x.data.ptr for x in mine]
    else:
        if xp.default_backend() != "gpu":
            pytest.skip("no GPU for jax")
        mine = [xp.dlpack.from_dlpack(x) for x in own]
        pointers = [x.unsafe_buffer_pointer() for x in mine]
    seen, real = [], Torch.take

    def spy(self, x):
        y = real(self, x)
        seen.append(y.data_ptr())
        return y

    monkeypatch.setattr(Torch, "take", spy)
    got = device.everything(dict(zip(inputs, mine, strict=False)), mine[-1])
    monkeypatch.setattr(Torch, "take", real)
    assert set(pointers) <= set(seen)  # no copy on the way in
    want = device.everything(dict(zip(inputs, own, strict=False)), own[-1])
    state = got[1]
    for x, y in zip((got[0], *state, *got[2:]), (want[0], *want[1], *want[2:]), strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert type(x) is type(mine[0])
            bits(torch.from_dlpack(x), y)
    token = [x[..., 0, :] for x in mine[:3]]
    o, _ = hla.step(*token, state, backend=device.backend)
    assert type(o) is type(mine[0])


@per_device("operator", ["linear", "hla2", "ahla", "hla3"], where=interpreted)
@pytest.mark.parametrize("axis", [-2, -3])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_told_without_running_is_what_comes(device, operator, normalize, axis, monkeypatch):
    """Shapes, strides and dtypes of results and gradients, as compilers are told them."""
    from hla.kernels.triton import launch, run

    monkeypatch.setattr(launch.Kernel, "__call__", lambda *_: None)  # the values are not looked at
    torch = installed("torch")
    q, k, v = (device.array(x, device.dtype) for x in draw(2, 3, 5, D=7, V=4))
    q, k, v = (x.movedim(-2, axis).contiguous() for x in (q, k, v))
    options = {"operator": operator, "mask": "causal", "scale": 1.0, "log_gate": None, "axis": axis}
    options |= {"normalize": normalize, "return_state": True}
    options["decay"] = device.array(np.array([0.5, 0.6, 0.7]))
    _, state = hla.scan(q, k, v, backend="triton", **options)
    request, inputs, _ = prepare(q, k, v, initial_state=state, gradient=True, **options)
    o, end, saved = run.forward(request, inputs)
    grads = run.backward(request, inputs, saved, torch.ones_like(o), end)
    told = run.empty(request, inputs), run.empty_gradients(request, inputs)
    leaves = torch.utils._pytree.tree_leaves
    for x, y in zip(leaves(told), leaves(((o, end, saved), grads)), strict=True):
        assert y is None or (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@per_device(where=triton)
def test_a_row_runs_in_place_of_its_passes(device, monkeypatch):
    """It is chosen by request and device, its kernel gets the launches, `explain` names it."""
    from hla.device.steps import Row
    from hla.kernels.triton import launch, rows, run

    asked, arrays = [], device.arrays(device.inputs(W + 3, "per_head"))
    do = device.array(draw(H, W + 3, V=device.widths["V"])[2], device.dtype)

    def mine(request, where):
        asked.append((request.operator, where.type))
        return (Row("two passes", tuple(s for s in request.passes if "|" not in s.out)),)

    def kernels(call, step):
        return [kernel for x in step.launches for kernel in launch.passes(call, x)]

    def everything():  # no states: what no row makes of them would go with the passes of o
        o, pullback = hla.vjp(**arrays, backend="triton")
        return o, *pullback(do)[:4]

    monkeypatch.setattr(run.RUNNER, "ready", {})
    monkeypatch.setattr(rows, "rows", lambda request, where: ())
    want = everything()
    monkeypatch.setattr(run.RUNNER, "ready", {})
    monkeypatch.setattr(rows, "rows", mine)
    monkeypatch.setitem(rows.KERNELS, "two passes", kernels)
    bits(everything(), want)
    assert set(asked) == {("hla2", device.place)}
    assert "1 fused: two passes (o)" in hla.explain(**arrays, backend="triton").plan


@per_device("operator", ["hla2", "ahla", "hla3"], where=interpreted)
def test_explain_names_the_fused_kernel(device, operator):
    """Of the passes that it does; what is asked beyond them are passes."""
    q, k, v = device.arrays(inputs_of(9)).values()
    plan = hla.explain(q, k, v, operator=operator, backend="triton").plan
    assert plan.startswith(f"whole, launches: 1 fused: {operator} in plain Triton (o); one token: ")
    wide = hla.explain(q.new_zeros(H, 9, 129), k.new_zeros(H, 9, 129), v, operator=operator)
    assert "fused" not in wide.plan
    if operator == "hla2":
        ridged = hla.explain(q, k, v, ridge=0.1, backend="triton").plan
        found = "1 fused and 1 of the causal pass: hla2 in plain Triton (o); o"
        assert ridged == f"whole, launches: {found}; one token: token_kernel"


@pytest.fixture
def compiler(monkeypatch):
    """What Triton's compiler is asked for: warm-ups, and launchers built."""
    installed("triton")
    launch = installed("hla.kernels.triton.launch")
    warmed, built, modes, translating, translated = [], [], [], [], []

    class Source:
        """A kernel's text, whose translation takes a while."""

        def make_ir(self, module):
            assert launch._turn.locked()
            assert not translating
            translating.append(module)
            translated.append(module)
            time.sleep(0.01)
            return translating.pop()

    class Function:
        def __init__(self):
            self.device_caches, self.ASTSource = {0: None}, Source

        def warmup(self, *args, grid, **options):
            warmed.append((self, args, grid, options))
            text = self.ASTSource()
            modes[-1].submit(lambda: SimpleNamespace(src=self, metadata=text.make_ir(module=grid)))
            if options.get("BROKEN"):
                raise RuntimeError("compiles not")

    @contextlib.contextmanager
    def mode(threads, *, ignore_errors):
        assert ignore_errors
        modes.append(threads)
        yield

    def launcher(text, metadata):
        assert not isinstance(text, Source) or metadata.shared is None
        built.append((text, metadata))

    driver = SimpleNamespace(launcher_cls=launcher, get_current_device=lambda: 0)
    monkeypatch.setattr(launch, "_begun", {})
    monkeypatch.setattr(launch, "prepare_compiler", tuple)
    monkeypatch.setattr(launch.triton, "AsyncCompileMode", mode, raising=False)
    monkeypatch.setattr(launch.triton.runtime, "driver", SimpleNamespace(active=driver))

    def kernel(grid=4, operands=2, **constants):
        places = [Place(0, Layout((3,), (1,), 3)), Place(1, Layout((3,), (1,), 0))][:operands]
        return launch.Kernel(
            Function(), (grid,), [*places, None], [4] * (operands + 1), 7, **constants, num_warps=4
        )

    return SimpleNamespace(
        kernel=kernel,
        warmed=warmed,
        built=built,
        modes=modes,
        translated=translated,
        text=Source,
    )


def test_kernels_of_a_plan_are_compiled_together(compiler):
    """Each once, and what launches it built beside; arrays that are yet to be are a dtype."""
    torch, launch = installed("torch"), installed("hla.kernels.triton.launch")
    one, two, three = (compiler.kernel(W=64) for _ in range(3))
    more = [torch.ones(2, 3)], {0: torch.float32, 1: torch.bfloat16}, torch.device("cpu")
    first = launch.compile_together([one, two, one], *more)
    wait(first)
    second = launch.compile_together([one, two, three], *more)
    wait(second)
    assert first == [first[0]] * 3
    assert second == [first[0], first[0], second[2]] != [first[0]] * 3
    assert len(compiler.modes) == 2
    assert len(compiler.warmed) == 3
    for function, (x, *rest), grid, options in compiler.warmed:
        assert torch.equal(x, torch.ones(3))
        assert rest == [torch.bfloat16, None, 7]
        assert (grid, options) == ((4, 1, 1), {"W": 64, "num_warps": 4})
        assert (function, grid) in compiler.built
    assert len(compiler.built) == 3


def test_what_does_not_compile_is_left_to_its_first_call(compiler):
    torch, launch = installed("torch"), installed("hla.kernels.triton.launch")
    more = [], {0: torch.float32, 1: torch.bfloat16}, torch.device("cpu")
    begun = launch.compile_together([compiler.kernel(BROKEN=True)], *more)
    wait(begun)
    assert isinstance(begun[0].exception(), RuntimeError)


def test_a_backwards_longest_kernel_is_compiled_first(compiler, monkeypatch):
    """Then the forward's and the backward's others; the backward's plan only where it is of use."""
    torch, launch = installed("torch"), installed("hla.kernels.triton.launch")
    run = installed("hla.kernels.triton.run")
    monkeypatch.setattr(launch, "on_device", lambda where, launches: launches(None))

    def ready(*kernels, where="cuda"):
        call = SimpleNamespace(where=torch.device(where), slots={"x": 0, "y": 1})
        dtypes = {"x": torch.float32, "y": torch.bfloat16}
        return SimpleNamespace(call=call, more=0, turns=[Turn((), kernels, ())], dtypes=dtypes)

    def follows():
        asked.append(True)
        return ready(*(compiler.kernel(*x) for x in ((1, 1), (2, 2), (3, 0))))

    def broken():
        asked.append(True)
        raise ValueError("no such plan")

    asked, arrays = [], [torch.ones(2, 3), torch.ones(3)]
    run.begin(ready(compiler.kernel(), where="cpu"), arrays, [16, 16], follows)
    assert not asked
    first = ready(compiler.kernel(4, 0), compiler.kernel(5, 1))
    run.begin(first, arrays, [16, 16], follows)
    wait(launch._begun.values())
    assert [grid[0] for _, _, grid, _ in compiler.warmed] == [2, 5, 4, 1, 3]
    run.begin(first, arrays, [16, 16], follows)
    assert len(asked) == 1
    run.begin(ready(compiler.kernel(6)), arrays, [16, 16], broken)
    assert len(asked) == 2
    run.begin(ready(compiler.kernel(7)), arrays, [16, 16], SimpleNamespace)  # a plan of nothing
    assert [grid[0] for _, _, grid, _ in compiler.warmed[5:]] == [6, 7]


@pytest.mark.parametrize(("version", "early"), [((3, 6), 1), ((3, 7), 0)])
def test_what_launches_a_kernel_is_made_beside_its_translation(
    compiler, monkeypatch, version, early
):
    """Where a C compiler makes it: what fails of that fails when the kernel is there."""
    torch, launch = installed("torch"), installed("hla.kernels.triton.launch")
    monkeypatch.setattr(launch, "version", lambda: version)
    more = [], {0: torch.float32, 1: torch.bfloat16}, torch.device("cpu")
    wait(launch.compile_together([compiler.kernel()], *more))
    texts = [text for text, _ in compiler.built]
    assert [isinstance(text, compiler.text) for text in texts] == [True] * early + [False]
    monkeypatch.setattr(launch.triton.runtime.driver.active, "launcher_cls", None)
    wait(launch.compile_together([compiler.kernel()], *more))
    assert len(compiler.translated) == 2


def test_a_kernel_is_translated_while_python_ends(compiler, monkeypatch):
    """Nothing new can be begun then, and what was begun is kept on disk."""
    launch = installed("hla.kernels.triton.launch")

    class Ended(launch.ThreadPoolExecutor):
        def submit(self, *_):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(launch, "version", lambda: (3, 6))
    monkeypatch.setattr(launch, "ThreadPoolExecutor", Ended)
    assert launch._one_by_one(compiler.text)().make_ir(module=3) == 3


def test_what_fails_before_kernels_are_asked_for_holds_nobody_up(compiler, monkeypatch):
    torch, launch = installed("torch"), installed("hla.kernels.triton.launch")

    def broken(*_, **__):
        raise RuntimeError("another mode is active")

    monkeypatch.setattr(launch.triton, "AsyncCompileMode", broken)
    begun = launch.compile_together([compiler.kernel()], [], {}, torch.device("cpu"))
    assert isinstance(begun[0].exception(60), RuntimeError)


def test_the_compiler_is_prepared_while_kernels_are_imported(monkeypatch):
    """By a GPU's first call, not by the interpreter's; what fails of it, kernels raise."""
    triton, launch = installed("hla.backends.triton"), installed("hla.kernels.triton.launch")
    done = []

    class Driver:
        @property
        def active(self):
            done.append("driver")
            raise RuntimeError("no driver")

    monkeypatch.setattr(launch.triton.runtime.cache, "triton_key", lambda: done.append("hashed"))
    monkeypatch.setattr(launch.triton.runtime, "driver", Driver())
    begun = launch.prepare_compiler.__wrapped__()
    wait(begun)
    assert sorted(done) == ["driver", "hashed"]
    for interpreted in (True, False):
        monkeypatch.setattr(triton, "_interpreted", lambda found=interpreted: found)
        monkeypatch.setattr(launch, "prepare_compiler", lambda: done.append("prepared"))
        assert triton._kernels.__wrapped__() is installed("hla.kernels.triton.run")
        assert len(done) == 2 + (not interpreted)


@per_device(where=interpreted)
def test_quick_operations_are_tritons_own(device):
    """Of the interpreter: of blocks and scalars, of two sizes, of Python's numbers; overflow."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic
    from triton_interpreter import ARITHMETIC, COMPARISONS

    kinds = {tl.int32: np.int32, tl.int64: np.int64, tl.float16: np.float16, tl.float32: np.float32}

    def operand(kind, shape):
        x = np.arange(-3, 5).astype(kinds[kind])[: math.prod(shape)].reshape(shape or 1)
        return tl.tensor(TensorHandle(x, kind), tl.block_type(kind, [*shape]) if shape else kind)

    own, count = type(interpreter_semantic), 0
    for name in (*ARITHMETIC, *COMPARISONS):
        quick = getattr(own, name)
        slow = quick
        while hasattr(slow, "__wrapped__"):
            slow = slow.__wrapped__
        more = (True,) if name in ("add", "sub", "mul") else ()
        for kind, shape in itertools.product(kinds, ((), (8,), (2, 4), (8, 1))):
            x = operand(kind, shape)
            others = [
                operand(z, y)
                for z in kinds
                for y in ((), (4,), (1, 8), shape)
                if () in (y, shape) or (shape, y) in (((2, 4), (4,)), ((8, 1), (1, 8)), (y, y))
            ]
            for y in (*others, 3, 2.5):
                for pair in ((x, y), (y, x)):
                    got, want = (f(interpreter_semantic, *pair, *more) for f in (quick, slow))
                    assert got.type == want.type
                    assert got.dtype == want.dtype
                    assert got.handle.data.dtype == want.handle.data.dtype
                    np.testing.assert_array_equal(got.handle.data, want.handle.data)
                    count += 1
    assert count > 1000
    large = tl.tensor(TensorHandle(np.array([2**30], np.int32), tl.int32), tl.int32)
    with pytest.raises(AssertionError, match="overflow"):
        interpreter_semantic.mul(large, 2, True)
