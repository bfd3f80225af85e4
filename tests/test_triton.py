"""Triton's backend: what all backends prove, in its dtypes, and what only kernels can get wrong.

Truth is the core in float64 on the same rounded inputs. Without a GPU the kernels run in Triton's
interpreter on the host, with one on it.
"""

import math

import numpy as np
import pytest
from conftest import (
    OPERATORS,
    ROUNDING,
    Row,
    budget,
    close,
    draw,
    gated,
    installed,
    load,
    rows,
    to_numpy,
)
from tensors import (
    DEVICE,
    ENTRY,
    INTEGERS,
    H,
    W,
    as_tensors,
    bits,
    check,
    each,
    everything,
    gate_of,
    inputs_of,
    integers,
    measured,
    poison_empty,
    rounded,
    run,
    tensor,
)

import hla
from hla.arguments import prepare

torch = installed("torch")
pytestmark = pytest.mark.skipif(not ENTRY.available, reason=ENTRY.reason)
TRITON = {"library": "torch", "dtype": "float32", "forms": ("chunked",), "backends": ("triton",),
          "device": DEVICE}  # fmt: skip
GATES = ("none", "per_head", "resets")
STREAMING = ("causal", "prefix")


@pytest.fixture(autouse=True)
def poison_torch(monkeypatch):
    poison_empty(monkeypatch)


CALLS = gated(GATES, **TRITON)
PAPER = [
    pytest.param(*row.values, id=f"{row.id}-paper", marks=row.marks)
    for row in gated(GATES, operators=("hla2", "hla3"), masks=("causal",), **TRITON)
]


def with_state(row, options, gate, seed=7, **shape):
    """A state that the row's calls can start from."""
    names = {"operator": row.operator, "mask": row.mask} | options
    names |= {"decay": 0.9} if gate != "none" else {}  # the paper's state type hangs on it
    start = inputs_of(9, seed=seed, **shape)
    _, state = hla.scan(**start, backend="array_api", return_state=True, **names)
    return rounded(state)


def programs():
    """Causal calls plain, with a state and as a quotient; of the others each with one of these."""
    kinds = {"none": "normalize", "per_head": "stateful", "resets": "normalize"}
    for convention, calls in (("exact", CALLS), ("paper", PAPER)):
        for call in calls:
            row, gate = call.values
            chosen = (kinds[gate],) if row.mask != "none" else ("plain", "normalize")
            if (row.mask, convention) == ("causal", "exact"):
                chosen = ("plain", "stateful", "normalize")
            for kind in chosen:
                name = f"{call.id}-{kind}"
                yield pytest.param(*call.values, convention, kind, id=name, marks=call.marks)


@pytest.mark.parametrize(("row", "gate", "convention", "kind"), programs())
def test_every_program_within_the_budget(row: Row, gate, convention, kind):
    """Output, states and all gradients, over three chunks of which the last is short."""
    common = {"scale": 0.25, "convention": convention}
    if row.operator == "hla2":
        common["ridge"] = 0.5
    inputs = inputs_of(W + 3, gate, positive=kind == "normalize")
    options = {"operator": row.operator, "mask": row.mask} | common
    if kind == "normalize":
        eps = {"linear": 1e3, "hla2": 1e4, "ahla": 1e4, "hla3": 1e6}  # about a denominator
        options |= {"normalize": True, "eps": eps[row.operator]}
    if row.mask != "none" and kind != "plain":
        state = with_state(row, common, gate, positive=kind == "normalize")
        inputs["initial_state"] = state
        options["return_state"] = kind == "stateful"
    check(inputs, options)


# T around chunks of 32 and 64, D and V around tiles and beyond what one tile holds
SHAPES = [
    (0, 24, 15, "linear"), (1, 15, 24, "hla2"), (1, 129, 1, "ahla"), (31, 60, 24, "hla3"),
    (33, 1, 60, "hla2"), (63, 24, 65, "hla2"), (63, 100, 129, "linear"), (64, 65, 100, "ahla"),
    (64, 15, 257, "hla2"), (65, 1, 65, "hla3"), (65, 100, 15, "hla2"), (65, 257, 60, "linear"),
    (131, 60, 1, "ahla"), (66, 129, 24, "hla2"), (131, 24, 100, "hla3"), (0, 1, 129, "hla3"),
]  # fmt: skip


@pytest.mark.parametrize(("T", "D", "V", "operator"), SHAPES)
def test_widths_and_lengths(T, D, V, operator):
    """Short last chunks, partial tiles, keys and values in several parts; gated, with states."""
    gate = ("none", "per_head", "resets")[(D + V) % 3]
    inputs = inputs_of(T, gate, D=D, V=V)
    row = Row("triton", "chunked", operator, "causal")
    inputs["initial_state"] = with_state(row, {"scale": D**-0.5}, gate, D=D, V=V)
    check(inputs, {"operator": operator, "scale": D**-0.5, "return_state": True})


@pytest.mark.skipif(DEVICE == "cuda", reason="there bfloat16 takes them, in test_gpu")
@pytest.mark.parametrize(
    ("D", "V", "operator", "mask", "gate"),
    [(*call, gate) for gate in GATES for call in
     [(64, 64, "hla2", "causal"), (20, 80, "ahla", "prefix"), (65, 70, "hla3", "causal"),
      (80, 24, "hla2", "prefix")]] + [(129, 15, "linear", "none", "none")],
)  # fmt: skip
def test_further_columns_of_keys(D, V, operator, mask, gate, monkeypatch):
    """One launch for a tile and up to 16 columns beyond, as with bfloat16; masses' adjoint too."""
    from hla.kernels.triton import launch, run

    monkeypatch.setattr(run, "limits", lambda request: launch.WIDE._replace(tail=16))
    monkeypatch.setattr(run.RUNNER, "ready", {})
    options = {"operator": operator, "mask": mask, "scale": D**-0.5}
    ordered = mask != "none"
    inputs = inputs_of(W + 3, gate, D=D, V=V)
    if ordered:
        row = Row("triton", "chunked", operator, mask)
        inputs["initial_state"] = with_state(row, {"scale": D**-0.5}, gate, D=D, V=V)
    check(inputs, options | {"return_state": ordered})
    check(inputs_of(W + 3, gate, D=D, V=V, positive=True), options | {"normalize": True})


@pytest.mark.parametrize("convention", ["exact", "paper"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens(operator, gate, convention):
    """The state passes through to the bit, its gradient too; the others are zeros."""
    row = Row("triton", "chunked", operator, "causal")
    state = with_state(row, {"convention": convention}, gate)
    options = {"operator": operator, "convention": convention, "return_state": True}
    arrays = as_tensors(inputs_of(0, gate) | {"initial_state": state})
    (o, after), pullback = hla.vjp(**arrays, backend="triton", **options)
    assert o.shape == (H, 0, 11)
    for x, y in zip(after, arrays["initial_state"], strict=True):
        assert torch.equal(x, y.expand(x.shape))
    gradients = pullback(o, after)
    assert [x.shape for x in gradients[:3]] == [arrays[n].shape for n in "qkv"]
    for x, y in zip(gradients.dinitial_state, after, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0.0)


def layouts(x):
    """The same values strided, transposed, offset, and with the heads inside of the tokens."""
    wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 2), math.nan)
    wide[..., ::2, 1:-1] = x
    slow = x.new_full((*x.shape, 3), math.nan)
    slow[..., 1] = x
    return {
        "strided": wide[..., ::2, 1:-1],
        "transposed": x.mT.contiguous().mT,
        "every third": slow[..., 1],
        "tokens first": x.movedim(-2, 0).contiguous().movedim(0, -2),
    }


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_layouts_of_memory_give_the_same_bits_and_nothing_is_written(operator, normalize):
    """Inputs, cotangents and states of any strides, their surroundings NaN."""
    T = W + 2
    row = Row("triton", "chunked", operator, "causal")
    inputs = inputs_of(T, "resets") | {"initial_state": with_state(row, {}, "resets")}
    arrays = as_tensors(inputs)
    do = tensor(draw(H, T, V=11, seed=4)[2])
    options = {"operator": operator, "scale": 0.25, "normalize": normalize, "eps": 1e4}
    want = everything(arrays, do, **options)
    for name in layouts(do):
        given = {n: layouts(x)[name] for n, x in arrays.items() if n in "qkv"}
        given["log_gate"] = layouts(arrays["log_gate"][..., None])[name][..., 0]
        given["initial_state"] = each(
            lambda x, n=name: layouts(x)[n] if x.ndim == 3 else layouts(x[..., None])[n][..., 0],
            arrays["initial_state"],
        )
        # what is divided lies in memory as q does, where its cotangent need not
        cotangent = do if normalize else layouts(do)[name]
        bits(everything(given, cotangent, **options), want)
        for n, x in given.items():
            bits(x, arrays[n])
        bits(cotangent, do)
    for n, x in inputs.items():
        bits(arrays[n], each(tensor, x))


@pytest.mark.parametrize("operator", OPERATORS)
def test_tokens_before_heads(operator):
    """axis=-3 reads [B, T, H, D] where it lies, and lays the output out like q: the same bits."""
    q, k, v = (tensor(x) for x in draw(2, 3, 70, D=24, V=11))
    a = tensor(-np.random.default_rng(0).random((2, 3, 70)))
    do = tensor(draw(2, 3, 70, V=11, seed=4)[2])
    want = everything({"q": q, "k": k, "v": v, "log_gate": a}, do, operator=operator)
    moved = {n: x.transpose(1, 2).contiguous() for n, x in zip("qkv", (q, k, v), strict=True)}
    gate = a.transpose(1, 2).contiguous()
    o, state, *gradients = everything(
        moved | {"log_gate": gate}, do.transpose(1, 2).contiguous(), operator=operator, axis=-3
    )
    assert o.is_contiguous()
    bits(o.transpose(1, 2).contiguous(), want[0])
    bits(state, want[1])
    for x, y in zip((*gradients[:3], gradients[4]), (*want[2:5], want[6]), strict=True):
        bits(x.transpose(1, 2), y)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("operator", ["hla2", "ahla"])
def test_zero_strides_are_read_as_written_out(operator, axis):
    arrays = as_tensors(inputs_of(W + 2, "resets"))
    do = tensor(draw(H, W + 2, V=11, seed=4)[2])
    views = {
        n: x.narrow(axis, 0, 1).expand(x.shape) for n, x in (*arrays.items(), ("do", do))
        if x.ndim > axis
    }  # fmt: skip
    assert all(x.stride(axis) == 0 for x in views.values())
    written = {n: x.clone() for n, x in views.items()}
    do = views.pop("do"), written.pop("do")
    got = everything(arrays | views, do[0], operator=operator)
    bits(got, everything(arrays | written, do[1], operator=operator))


@pytest.mark.parametrize(
    ("row", "gate"),
    gated(GATES, masks=("causal",), **TRITON) + gated(["none"], masks=("prefix",), **TRITON),
)
def test_grouped_queries_share_keys_values_and_states(row: Row, gate):
    """The bits of repeated keys; moments of shared ones are kept once; gradients are sums."""
    kv, G, T = 2, 2, W + 2
    q = rounded(draw(kv, G, T, D=24)[0])
    _, k, v = (rounded(x) for x in draw(kv, 1, T, D=24, V=11, seed=1))
    shared = {"q": q, "k": k, "v": v}
    if gate == "per_head":
        shared["decay"] = rounded(np.linspace(0.6, 1.0, kv))[:, None]  # one for a group
    elif gate == "resets":
        shared["log_gate"] = gate_of(gate, T, kv)["log_gate"][:, None]
    options = {"operator": row.operator, "mask": row.mask, "scale": 0.25}
    check(shared, options | {"return_state": True})
    mine = as_tensors(shared)
    written = {n: x.expand(kv, G, *x.shape[2:]).clone() for n, x in mine.items()}
    o, state = hla.scan(**mine, backend="triton", return_state=True, **options)
    whole, full = hla.scan(**written, backend="triton", return_state=True, **options)
    bits(o, whole)
    for name, x, y in zip(state._fields, state, full, strict=True):
        bits(x.expand(y.shape), y)
        if name in ("S", "P") and row.mask == "causal":
            assert x.shape == (kv, 1, *y.shape[2:])
    again = hla.scan(**mine, backend="triton", initial_state=state, **options)
    bits(again, hla.scan(**written, backend="triton", initial_state=full, **options))


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_axes(operator):
    """No batch and no values: empty. No features: zeros. Their gradients too."""
    for batch, T, D, V in ((0, 70, 5, 3), (2, 70, 5, 0), (2, 70, 0, 3), (2, 1, 0, 0)):
        q, k, v = (torch.ones(batch, T, n, device=DEVICE) for n in (D, D, V))
        decay = torch.full((batch,), 0.5, device=DEVICE)
        for mask in STREAMING:
            (o, state), pullback = hla.vjp(
                q, k, v, decay=decay, operator=operator, mask=mask, return_state=True,
                backend="triton",
            )  # fmt: skip
            assert o.shape == v.shape
            assert not o.any()
            want = hla.scan(
                *(x.cpu().numpy() for x in (q, k, v)), decay=decay.cpu().numpy(),
                operator=operator, mask=mask, return_state=True,
            )[1]  # fmt: skip
            for x, y in zip(state, want, strict=True):
                close(to_numpy(x.cpu()), to_numpy(y), 1e-6)
            for x, y in zip(pullback(o, state)[:4], (q, k, v, decay), strict=True):
                assert x.shape == y.shape
                assert torch.isfinite(x).all()
        o = hla.scan(q, k, v, operator=operator, normalize=True, backend="triton")
        assert not o.any()


@pytest.mark.parametrize("gate", GATES)
def test_batch_axes_that_cannot_become_one(gate):
    """Five of them, alternately shared and not; several outputs a launch, states in and out."""
    shape = (2, 1, 2, 2, 2)
    rng = np.random.default_rng(5)

    def some(*axes, tail):
        lead = tuple(n if i in axes else 1 for i, n in enumerate(shape))
        return rounded(rng.standard_normal((*lead, *tail)))

    inputs = {"q": some(0, 2, 3, 4, tail=(9, 4)), "k": some(2, 4, tail=(9, 4))}
    inputs["v"] = some(0, 3, tail=(9, 3))
    if gate == "per_head":
        inputs["decay"] = rounded(rng.uniform(0.5, 1, (2, 1, 1, 2, 1)))
    if gate == "resets":
        inputs["log_gate"] = rounded(-rng.random((1, 1, 2, 2, 1, 9)))
    options = {"operator": "hla3", "return_state": True}
    _, state = hla.scan(**inputs, **options)
    check(inputs | {"initial_state": rounded(state)}, options)


@pytest.mark.parametrize("shapes", [((2,), (1,), (2,)), ((2, 2), (1, 2), (2, 1))])
@pytest.mark.parametrize("operator", OPERATORS)
def test_moments_shared_by_some_heads_only(operator, shapes):
    """Of keys shared and values not: each state is of its own shape, and every head's is there."""
    rng = np.random.default_rng(1)
    given = zip("qkv", shapes, (24, 24, 11), strict=True)
    inputs = {n: rounded(rng.standard_normal((*x, W + 2, m))) for n, x, m in given}
    check(inputs, {"operator": operator, "scale": 0.25, "return_state": True})


AXES = [  # of q, k, v and the gate
    ((1,), (1,), (2,), ()), ((), (), (2,), None), ((), (1, 2), (2, 1), (2, 1)),
]  # fmt: skip
LACKING = [pytest.param(*x.values, "exact", id=x.id, marks=x.marks) for x in rows(**TRITON)]
LACKING += [
    pytest.param(*x.values, "paper", id=f"{x.id}-paper", marks=x.marks)
    for x in rows(operators=("hla2", "hla3"), masks=("causal",), **TRITON)
]


@pytest.mark.parametrize("shapes", AXES, ids=str)
@pytest.mark.parametrize(("row", "convention"), LACKING)
def test_batch_axes_that_some_inputs_lack(row: Row, convention, shapes):
    """Passes that share queries and keys need not share the batch; outputs, states, gradients."""
    rng, T = np.random.default_rng(2), 5
    given = zip("qkv", shapes, (16, 16, 3), strict=False)  # a mass of fewer cancels by chance
    inputs = {n: rounded(rng.standard_normal((*x, T, m))) for n, x, m in given}
    options = {"operator": row.operator, "mask": row.mask, "scale": 0.25, "convention": convention}
    if row.mask != "none":
        options["return_state"] = True
        if shapes[3] is not None:
            inputs["decay"] = rounded(rng.uniform(0.5, 0.9, shapes[3]))
        inputs["initial_state"] = rounded(hla.scan(**inputs, **options)[1])
    check(inputs, options)


@pytest.mark.parametrize("axes", [(0,), (3, 0, 1, 2, 1)])
@pytest.mark.parametrize("row", rows(masks=STREAMING, **TRITON))
def test_states_of_keys_that_no_query_reads(row: Row, axes):
    """A batch without queries; the moments of keys that it shares are there all the same."""
    q, k, v = np.ones((*axes, 5, 4)), *draw(5, D=4, V=3)[1:]
    options = {"operator": row.operator, "mask": row.mask, "return_state": True}
    _, want = hla.scan(q, k, v, **options)
    _, state = hla.scan(*(tensor(x) for x in (q, k, v)), backend="triton", **options)
    assert sum(x.size for x in want) > 0
    for x, y in zip(state, want, strict=True):
        close(to_numpy(x.cpu()), y, 1e-6)


@pytest.mark.parametrize("row", rows(**TRITON))
def test_heads_are_independent_to_the_bit(row: Row):
    """Whatever another head holds, and however many there are; gradients and states too."""
    H, T = 3, W + 2
    inputs = inputs_of(T, "none" if row.mask == "none" else "per_head", heads=H)
    arrays = as_tensors(inputs)
    do = tensor(draw(H, T, V=11, seed=4)[2])
    options = {"operator": row.operator, "mask": row.mask, "backend": "triton"}
    options |= {"return_state": row.mask != "none"}

    def results(heads=slice(None), **changed):
        given = {n: x[heads] for n, x in (arrays | changed).items()}
        found, pullback = hla.vjp(**given, **options)
        o, state = found if options["return_state"] else (found, ())
        return (o, *state, *(x for x in pullback(do[heads])[:4] if x is not None))

    want = results()
    spoilt = {n: arrays[n].clone() for n in "qkv"}
    for x, value in zip(spoilt.values(), (math.nan, math.inf, 1e30), strict=True):
        x[1, 30] = value
    for got, y in zip(results(**spoilt), want, strict=True):
        bits(got[[0, 2]], y[[0, 2]])
    assert torch.isnan(results(**spoilt)[0][1]).any()
    for heads in (slice(0, 1), slice(1, 3)):
        bits(results(heads), tuple(x[heads] for x in want))


@pytest.mark.parametrize("gate", ["none", "log_gate"])
@pytest.mark.parametrize("row", rows(masks=STREAMING, **TRITON))
def test_the_future_changes_no_earlier_bit(row: Row, gate):
    T = W + 9
    arrays = as_tensors(inputs_of(T))
    rng = np.random.default_rng(9)
    if gate == "log_gate":
        arrays["log_gate"] = tensor(-rng.random((H, T)))
    options = {"operator": row.operator, "mask": row.mask, "backend": "triton"}
    want = hla.scan(**arrays, **options)
    for t in (0, 1, 31, W - 1, W, T - 1):
        changed = {n: x.clone() for n, x in arrays.items()}
        for n in "qkv":
            changed[n][:, t:] = 100 * tensor(rng.standard_normal(changed[n][:, t:].shape))
        if gate == "log_gate":
            changed["log_gate"][0, t] = -math.inf
        got = hla.scan(**changed, **options)
        bits(got[:, :t], want[:, :t])
        assert (got[:, t:] != want[:, t:]).any()


@pytest.mark.parametrize("operator", ["linear", "hla2"])
def test_pairs_that_overflow_do_not_reach_the_past(operator):
    """A masked pair is dropped, not multiplied by 0: with infinite ones that would be NaN."""
    arrays = as_tensors(inputs_of(W))
    want = hla.scan(**arrays, operator=operator, backend="triton")
    arrays["k"][:, 40:] = 3e38
    got = hla.scan(**arrays, operator=operator, backend="triton")
    bits(got[:, :40], want[:, :40])
    assert not torch.isfinite(got[:, 40:]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", rows(masks=STREAMING, **TRITON))
def test_nan_reaches_back_no_further_than_its_chunk(row: Row, value):
    arrays = as_tensors(inputs_of(2 * W + 3))
    options = {"operator": row.operator, "mask": row.mask, "backend": "triton"}
    want = hla.scan(**arrays, **options)
    for t, name in ((0, "q"), (W - 1, "k"), (W, "v"), (W, "k"), (2 * W + 1, "q"), (2 * W + 1, "v")):
        x = arrays[name].clone()
        x[0, t] = value
        got = hla.scan(**arrays | {name: x}, **options)
        before = t // W * W
        bits(got[0, :before], want[0, :before])
        bits(got[1], want[1])
        assert not torch.isfinite(got[0, t]).all()


@pytest.mark.parametrize(("dtype", "which"), [("float32", 0), ("float16", 1)])
@pytest.mark.parametrize("row", rows(**TRITON))
def test_exact_integers(row: Row, dtype, which):
    """Outputs, states and gradients, cut and continued: the bits of the oracle."""
    D, T, density = INTEGERS[which]
    inputs, do = integers(D, T, density)
    options = {"operator": row.operator, "mask": row.mask}
    options |= {"return_state": row.mask != "none"}
    want = run(inputs, options, (do,), "array_api")
    got = run(as_tensors(inputs, dtype), options, (tensor(do, dtype),), "triton")
    assert got.keys() == want.keys()
    for name, y in want.items():
        kind = dtype if name in ("o", "dq", "dk", "dv") else "float32"
        assert abs(y).max() < 2**24
        bits(got[name], tensor(y, kind))
    assert np.mean(want["o"] != 0) > 0.2
    for t in () if row.mask == "none" else (1, W + 1):
        state, parts = None, []
        for part in (slice(t), slice(t, None)):
            some = as_tensors({n: x[:, part] for n, x in inputs.items()}, dtype)
            o, state = hla.scan(**some, initial_state=state, backend="triton", **options)
            parts.append(o)
        bits(torch.cat(parts, 1), got["o"])
        for name, x in state._asdict().items():
            bits(x, got[f"state {name}"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("row", "gate"), gated(GATES, masks=STREAMING, **TRITON))
def test_split_anywhere_and_continue(row: Row, gate, dtype):
    """scan, scan, step by step, packed and not: the whole call's output within the budget."""
    T, cuts = W + 6, (5, W + 3)
    inputs = inputs_of(T, gate, dtype)
    options = {"operator": row.operator, "mask": row.mask, "scale": 0.25}
    want, last = hla.scan(**inputs, backend="array_api", return_state=True, **options)
    arrays = as_tensors(inputs, dtype)

    def part(which):
        sliced = {n: x[:, which] for n, x in arrays.items() if n != "decay"}
        return sliced | {n: x for n, x in arrays.items() if n == "decay"}

    options |= {"backend": "triton"}
    first, state = hla.scan(**part(slice(cuts[0])), return_state=True, **options)
    second, state = hla.scan(
        **part(slice(*cuts)), initial_state=state, return_state=True, **options
    )
    parts = [first, second]
    for t in range(cuts[1], T):
        token = part(t)
        o, state = hla.step(
            token.pop("q"), token.pop("k"), token.pop("v"), state.pack(), **token, **options
        )
        state = state.unpack()
        parts.append(o[:, None])
    size = {"D": 24, "T": T, "decay": inputs.get("decay"), "operator": row.operator}
    results = {"o": (torch.cat(parts, 1), want)}
    results |= {n: (x, getattr(last, n)) for n, x in state._asdict().items()}
    for name, (x, y) in results.items():
        x = to_numpy(x.cpu().double())
        if x.ndim < 3:
            x, y = x[..., None], y[..., None]
        for found, most in zip(measured(x, y), budget(dtype, **size), strict=True):
            assert found <= most, f"{name}: error {found:.2e}, allowed {most:.2e}"


@pytest.mark.parametrize("row", rows(masks=STREAMING, **TRITON))
def test_gates_that_say_the_same_give_the_same_bits(row: Row):
    """A decay of 1 is none; a gate of zeros is one; -inf is a fresh start.

    On sums that are exact: NumPy, which the interpreter multiplies with, has its own way for K'K.
    """
    D, T, density = INTEGERS[0]
    inputs, do = integers(D, T, density)
    arrays, do = as_tensors(inputs), tensor(do)
    options = {"operator": row.operator, "mask": row.mask}
    plain = everything(arrays, do, **options)
    ones = torch.ones(2, device=DEVICE)
    bits(everything(arrays | {"decay": ones}, do, **options)[:5], plain[:5])
    bits(everything(arrays | {"decay": 1.0}, do, **options), plain)
    gate = torch.zeros(2, T, device=DEVICE)
    bits(everything(arrays | {"log_gate": gate}, do, **options)[:5], plain[:5])
    for t in (W, W + 5):
        gate[:, t] = -math.inf
        o, state, *gradients = everything(arrays | {"log_gate": gate}, do, **options)
        bits(o[:, :W], plain[0][:, :W])
        fresh = everything({n: x[:, t:] for n, x in arrays.items()}, do[:, t:], **options)
        bits((o[:, t:], state), fresh[:2])
        bits(tuple(x[:, t:] for x in gradients[:3]), fresh[2:5])
        gate[:, t] = 0.0


@pytest.mark.parametrize("row", rows(masks=STREAMING, **TRITON))
def test_tiny_decay_and_steep_gates(row: Row):
    """Powers up to the third of 1e-3 over a chunk underflow to 0, and nothing divides by them."""
    inputs = inputs_of(W + 9)
    options = {"operator": row.operator, "mask": row.mask, "return_state": True}
    small = float(np.float32(1e-3))
    for gate in ({"decay": small}, {"log_gate": -300.0}, {"log_gate": -1e30}):
        check(inputs, options | gate)
    arrays, do = as_tensors(inputs), tensor(draw(H, W + 9, V=11, seed=4)[2])
    steep = torch.full((H, W + 9), -300.0, device=DEVICE)
    steep[:, 3] = -1e30
    for gate in ({"decay": torch.full((H,), small, device=DEVICE)}, {"log_gate": steep}):
        *_, ddecay, dlog_gate = everything(arrays | gate, do, operator=row.operator, mask=row.mask)
        assert torch.isfinite(dlog_gate if ddecay is None else ddecay).all()


@pytest.mark.parametrize("row", rows(masks=STREAMING, **TRITON))
def test_zero_queries_normalize_to_zero(row: Row):
    arrays = as_tensors(inputs_of(W + 2, positive=True))
    arrays["q"] = torch.zeros_like(arrays["q"])
    options = {"operator": row.operator, "mask": row.mask, "backend": "triton"}
    o, pullback = hla.vjp(**arrays, normalize=True, **options)
    assert not o.any()
    assert all(torch.isfinite(x).all() for x in pullback(torch.ones_like(o))[:3])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_float16_within_its_budget(operator, gate):
    """Intermediates beyond float16's range too: they and the states are wider."""
    row = Row("triton", "chunked", operator, "causal")
    inputs = inputs_of(W + 41, gate, "float16")
    options = {"operator": operator, "scale": 0.25, "return_state": True}
    inputs["initial_state"] = with_state(row, {"scale": 0.25}, gate)
    check(inputs, options, "float16")


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("operator", OPERATORS)
def test_float16_of_few_tokens_rounds_its_results_alone(operator, T):
    """A head's one sum can cancel to the roundings of its factors: q.y of one token is (q.k)^2.

    Each head by itself, the worst of them: twice the RMS error of one rounding (of the smallest
    float16 its absolute one).
    """
    q, k, v = (rounded(x, "float16") for x in draw(200, T, D=16, V=16))
    least = np.argsort(abs((q * k).sum(-1)).max(-1))[:3]
    q, k, v = (x[least] for x in (q, k, v))
    do = rounded(draw(3, T, V=16, seed=4)[2], "float16")
    inputs, options = {"q": q, "k": k, "v": v}, {"operator": operator, "scale": 0.25}
    want = run(inputs, options, (do,), "array_api")
    got = run(as_tensors(inputs, "float16"), options, (tensor(do, "float16"),), "triton")
    for name, y in want.items():
        missed = to_numpy(got[name].cpu().double()) - y
        size = np.sqrt((y**2).mean((1, 2))) + 2.0**-24 / ROUNDING["float16"]
        worst = (np.sqrt((missed**2).mean((1, 2))) / size).max()
        assert worst <= 2 * ROUNDING["float16"], f"{name}: error {worst:.2e} of a head"


@pytest.mark.parametrize(("operator", "size", "tiny"), [("hla2", 60, 1e-6), ("hla3", 16, 1e-7)])
def test_float16_intermediates_do_not_overflow(operator, size, tiny):
    """y = (q k') k is beyond float16 where the output is not."""
    q, k, v = draw(H, 40, D=24, V=11)
    inputs = {
        n: rounded(x, "float16") for n, x in zip("qkv", (size * q, size * k, tiny * v), strict=True)
    }
    y = np.tril(inputs["q"] @ inputs["k"].swapaxes(1, 2)) @ inputs["k"]
    assert (abs(y).max((1, 2)) > 1e5).all()
    want = hla.scan(**inputs, operator=operator, backend="array_api")
    o = hla.scan(**as_tensors(inputs, "float16"), operator=operator, backend="triton")
    fits = torch.as_tensor(abs(want) < 60000)
    assert fits[:, 20:].float().mean() > 0.2
    assert torch.isfinite(o.cpu()[fits]).all()


@pytest.mark.parametrize("axis", [-2, -3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_told_without_running_is_what_comes(operator, normalize, axis):
    """Shapes, strides and dtypes of results and gradients, as compilers are told them."""
    from hla.kernels.triton import run

    q, k, v = (tensor(x) for x in draw(2, 3, 5, D=7, V=4))
    q, k, v = (x.movedim(-2, axis).contiguous() for x in (q, k, v))
    options = {"operator": operator, "mask": "causal", "scale": 1.0, "log_gate": None, "axis": axis}
    options |= {"normalize": normalize, "return_state": True, "decay": tensor([0.5, 0.6, 0.7])}
    _, state = hla.scan(q, k, v, backend="triton", **options)
    request, inputs, _ = prepare(q, k, v, initial_state=state, gradient=True, **options)
    o, end, saved = run.forward(request, inputs)
    grads = run.backward(request, inputs, saved, torch.ones_like(o), end)
    told = run.empty(request, inputs), run.empty_gradients(request, inputs)
    leaves = torch.utils._pytree.tree_leaves
    for x, y in zip(leaves(told), leaves(((o, end, saved), grads)), strict=True):
        assert y is None or (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_refusals_say_why():
    arrays = as_tensors(inputs_of(9))
    wide = {n: x.double() for n, x in arrays.items()}
    calls = {
        "float64": (wide, {}, "not float64"),
        "recurrent": (arrays, {"form": "recurrent"}, "form='chunked'"),
        "dense": (arrays, {"form": "dense"}, "form='chunked'"),
        "numpy": (inputs_of(9), {}, "arrays of numpy"),
    }
    if DEVICE == "cpu":
        narrow = {n: x.bfloat16() for n, x in arrays.items()}
        calls["bfloat16"] = (narrow, {}, "interpreter.*bfloat16")
    else:
        calls["host"] = ({n: x.cpu() for n, x in arrays.items()}, {}, "these arrays are on cpu")
    for given, options, reason in calls.values():
        for call in (hla.scan, hla.vjp, hla.explain):
            with pytest.raises(hla.Unsupported, match=f"triton: .*{reason}"):
                call(**given, backend="triton", **options)
        assert hla.explain(**given, backend=["triton", "array_api"], **options).reasons["triton"]
    with pytest.raises(ValueError, match="chunk_size"):
        hla.scan(**arrays, backend="triton", chunk_size=0)
    want = hla.scan(**arrays, backend="triton")
    for size in (1, 16, 100):
        bits(hla.scan(**arrays, backend="triton", chunk_size=size), want)


def test_jax_tracers_are_refused_with_the_remedy():
    jax = installed("jax")
    q, k, v = load("jax").arrays(*draw(H, 9), dtype="float32")
    for transform in (jax.jit, jax.vmap, jax.grad):
        f = transform(lambda q, k, v: hla.scan(q, k, v, backend="triton").sum())
        with pytest.raises(hla.Unsupported, match=r"(?s)trace.*hla\.vjp.*array_api"):
            f(q, k, v)


def test_jax_arrays_come_and_go_without_a_copy():
    """Values and gradients as JAX arrays; states of one library continue in the other."""
    if DEVICE == "cuda":
        pytest.skip("the arrays of this test are on the host")
    inputs = inputs_of(W + 2, "resets")
    given = {n: load("jax").array(x, "float32") for n, x in inputs.items()}
    mine = as_tensors(inputs)
    do = draw(H, W + 2, V=11, seed=4)[2]
    want = everything(mine, tensor(do))
    got = everything(given, load("jax").array(do, "float32"))
    kind = load("jax").kind
    for x, y in zip((got[0], *got[1], *got[2:]), (want[0], *want[1], *want[2:]), strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert isinstance(x, kind)
            np.testing.assert_array_equal(np.asarray(x), y.numpy())
    for n, x in given.items():
        np.testing.assert_array_equal(np.asarray(x, np.float64), inputs[n])


def test_without_a_name_host_tensors_take_the_generic_code():
    q, k, v = (torch.ones(3, 2) for _ in range(3))
    assert hla.explain(q, k, v).backend == "array_api"
    if DEVICE == "cuda":
        assert hla.explain(q.cuda(), k.cuda(), v.cuda()).backend == "triton"
