"""What the results that cancel are summed from, in float64: their errors are relative to it.

Per pass with exponent p the gradient of the log gate is, at token s,

    d_s = p (<dS_T, S_T> + sum_{t>=s} (do_t . o_t - v_t . dv_t))
        = p (do_s . o_s - v_s . dv_s) + d_{s+1}

and that of a decay is the sum of d_s / decay over passes and tokens. The pair i = t is in both
products of a token (in a strict pass the pair of neighbours) and cancels: it is no term here.
A quotient's gradients come by its numerator and its denominator, those of the paper's recurrences
by each of their sums, and the last state's beside them.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from conftest import UNIT, budget, rms

from hla.core.passes import Gate
from hla.core.programs import program
from hla.core.run import causal_pass

DRAWS = 16  # of random signs


class Terms(NamedTuple):
    """Size of what each entry of a gate's gradient is summed from."""

    root: np.ndarray  # root of the sum of squares
    added: np.ndarray  # of a decay the sum of sizes; of a log gate the root of all that came before


def summed(x, shape):
    """Sum over the axes along which a shape was broadcast to x."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, n in enumerate(shape) if n == 1 != x.shape[i]), keepdims=True)


def from_here(x):
    """Sums over each token and all after it."""
    return np.flip(np.cumsum(np.flip(x, -1), -1), -1)


def columns(state, step, call, shared=False):
    """A pass's state, its denominator as the last column, written out; a gradient is shared out."""
    if state is None or any(getattr(state, n, None) is None for n in step.state):
        return None
    found = []
    for name in step.state:
        x = np.asarray(getattr(state, name))
        x = x[..., None] if name[0].islower() else x
        full = np.broadcast_to(x, (*call.batch, *x.shape[-2:]))
        found.append(full / (full.size / max(1, x.size)) if shared else full)
    return np.concatenate(found, -1)


class Call:
    """A call's passes run forward with everything written out for each head, and its adjoint."""

    def __init__(self, inputs, options, given):
        q, k, v = (np.asarray(inputs[n], float) for n in "qkv")
        a, decay = (inputs.get(n) for n in ("log_gate", "decay"))
        T = q.shape[-2]
        lead = np.shape(a)[:-1] if a is not None else np.shape(decay) if decay is not None else ()
        self.batch = np.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)), lead)
        q, k, v = (np.broadcast_to(x, (*self.batch, *x.shape[-2:])) for x in (q, k, v))
        self.gate = Gate(
            None if decay is None else np.broadcast_to(decay, self.batch),
            None if a is None else np.broadcast_to(a, (*self.batch, T)),
        )
        self.start, self.last = inputs.get("initial_state"), (*given, None)[1]
        names = (options["operator"], options.get("mask", "causal"))
        ridge, kind = options.get("ridge", 0.0), None if self.start is None else type(self.start)
        found = program(*names, options.get("convention", "exact"), ridge, kind)
        self.steps = [s._replace(out=f"o{s.step}") if s.out == "o" else s for s in found.steps]
        self.addends = [(s.read, s.out) for s in self.steps if s.out[:1] == "o"]
        self.scale = options.get("scale", 1.0)
        self.values = {"q": q * self.scale, "k": k}
        self.values["v"] = np.concatenate([v, np.ones((*v.shape[:-1], 1))], -1)
        self.ends = {}
        for s in self.steps:
            operands = (self.values[n] for n in (s.q, s.k, s.v))
            self.values[s.out], self.ends[s] = self.run(s, *operands, columns(self.start, s, self))
        do = np.broadcast_to(given[0], (*self.batch, *np.shape(given[0])[-2:]))
        outs = [c * self.values[name] for c, name in self.addends]
        zero, self.outputs = 0 * do[..., :1], outs
        self.cotangents = [np.concatenate([do, zero], -1)]  # what is added to that of the outputs
        if options.get("normalize"):
            den = sum(outs)[..., -1:] + options.get("eps", 1e-6)
            num = sum(outs)[..., :-1]
            self.outputs = [x[..., :-1] / den for x in outs]
            self.outputs += [num * x[..., -1:] / den**2 for x in outs]
            dens = (-(do * x[..., :-1]).sum(-1, keepdims=True) / den**2 for x in outs)
            self.cotangents = [np.concatenate([do / den, zero], -1)]
            self.cotangents += [np.concatenate([0 * do, x], -1) for x in dens]

    def each_way(self):
        """Cotangents of the outputs, along a first axis one for each sum that a result is of."""
        ways, found = [*itertools.product(self.addends, self.cotangents)], {}
        for i, ((c, name), do) in enumerate(ways):
            found.setdefault(name, np.zeros((len(ways), *do.shape)))[i] = c * do
        return found

    def of_random_signs(self):
        """Draws of the cotangents, along a first axis, each token of each with a sign of its own.

        A first state's gradient is a sum over tokens at every level of a program. The mean of its
        square over draws is the sum of the squares of what each token adds, by every way.
        """
        rng, draws = np.random.default_rng(5), []
        for _ in range(DRAWS):
            draws.append(signed := {})
            for (c, name), do in itertools.product(self.addends, self.cotangents):
                sign = rng.choice([-1.0, 1.0], (*do.shape[:-1], 1))
                signed[name] = signed.get(name, 0) + sign * c * do / math.sqrt(DRAWS)
        return {name: np.stack([x[name] for x in draws]) for name in draws[0]}

    def run(self, s, q, k, v, state, reverse=False):
        """One pass."""
        kind = {"power": s.power, "kind": s.kind, "reverse": reverse, "state": state}
        return causal_pass(q, k, v, self.gate, **kind if s.kind != "full" else {"kind": "full"})

    def adjoint(self, do, last):
        """Gradients of values by name and of states by fields; `products`.

        What ``do`` has in front of the batch axes, what depends on it has too.
        """
        grads, states, products = dict(do), {}, []
        for s in reversed(self.steps):
            q, k, v = (self.values[n] for n in (s.q, s.k, s.v))
            dout = grads.pop(s.out, np.zeros_like(self.values[s.out]))
            taken = s.state in states  # an earlier step has this state's gradient
            start, end = columns(self.start, s, self), columns(last, s, self, shared=True)
            end = None if taken else end
            turned = [None if x is None else x.mT for x in (start, end)]
            dq, _ = self.run(s, dout, v, k, turned[0])
            dk, _ = self.run(s, v, dout, q, turned[1], reverse=True)
            dv, dstart = self.run(s, k, q, dout, end, reverse=True)
            for name, x in ((s.q, dq), (s.k, dk), (s.v, dv)):
                grads[name] = grads.get(name, 0) + x
            states[s.state] = states.get(s.state, 0) + dstart
            products += self.products(s, dout, dv, end)
        return grads, states, products

    def products(self, s, dout, dv, end):
        """p do.o and p v.dv by token without what cancels, p <dS, S>; denominators apart."""
        q, k, v, o = (self.values[n] for n in (s.q, s.k, s.v, s.out))
        inner = np.zeros(v.shape[:-2]) if end is None else (end * self.ends[s]).sum((-1, -2))
        found = []
        for part in (slice(-1), slice(-1, None)) if v.shape[-1] > 1 else (slice(None),):
            read, late = (dout * o)[..., part].sum(-1), [q, dout[..., part]]
            if s.kind == "strict":  # read before the token's decay: by the token before
                read = np.roll(read, -1, -1)
                late = [np.roll(x, -1, -2) for x in late]
                for x in (read[..., None], *late):
                    x[..., -1:, :] = 0
            both = (late[0] * k).sum(-1) * (late[1] * v[..., part]).sum(-1)
            write = (v * dv)[..., part].sum(-1)
            found.append((s.power * (read - both), s.power * (write - both), s.power * inner))
            inner = 0 * inner
        return found

    def all_terms(self):
        """Those of the gate's gradient, by pass and by way: a sum of the output, the last state.

        A quotient's numerator and denominator are ways apart: at a strong decay they cancel.
        """
        yield from self.adjoint(self.each_way(), None)[2]
        if self.last is not None:
            yield from self.adjoint({}, self.last)[2]


def parts(inputs, options, given):
    """Root sum of squares of what each result is added from, by its name in `devices.run`."""
    call, found = Call(inputs, options, given), {}
    shapes = {"d" + n: np.shape(inputs[n]) for n in "qkv"}
    shapes |= {f"dstate {n}": np.shape(x) for n, x in call.start._asdict().items()} if (
        call.start is not None
    ) else {}  # fmt: skip

    def add(name, x, own=2):  # axes of its own, behind those of the batch
        if name in shapes:
            ways = x if x.ndim > len(call.batch) + own else x[None]
            squares = sum(summed(y, shapes[name]) ** 2 for y in ways)
            found[name] = np.sqrt(found.get(name, 0.0) ** 2 + squares)

    def add_states(states):
        for names, x in states.items():
            for name, y in zip(names, (x[..., :-1], x[..., -1]) if len(names) > 1 else (x,),
                               strict=True):  # fmt: skip
                y = y + y.mT if name in ("S", "Q") else y
                add(f"dstate {name}", y, 1 + name[0].isupper())

    def add_all(do, last):
        grads, states, _ = call.adjoint(do, last)
        add("dq", call.scale * grads["q"])
        add("dk", grads["k"])
        add("dv", grads["v"][..., :-1])
        add_states(states)

    found["o"] = np.sqrt(sum(x[..., : inputs["v"].shape[-1]] ** 2 for x in call.outputs))
    add_all(call.each_way(), None)
    if call.last is not None:
        add_all({}, call.last)
    if call.start is not None:
        add_states(call.adjoint(call.of_random_signs(), None)[1])
    return found


def gate_terms(inputs, options, given) -> Terms:
    """Sizes of the terms of a call's gradient of decay or log_gate, in its shape.

    Of a decay the terms are d_s / decay; of a log gate p do_s . o_s, p v_s . dv_s and d_{s+1}, and
    `added` has the first two of every token from s on: a running sum keeps their roundings.
    """
    name = "decay" if inputs.get("decay") is not None else "log_gate"
    gate = np.asarray(inputs[name], float)
    whole = name == "decay" or gate.shape[-1] == 1  # one entry for all tokens
    squares, added = 0.0, 0.0
    for read, write, inner in Call(inputs, options, given).all_terms():
        d = from_here(read - write) + inner[..., None]
        if whole:
            shape = d.shape[:-1] + (1,) * (name != "decay")
            squares = squares + summed((d**2).sum(-1).reshape(shape), gate.shape)
            added = added + summed(abs(d).sum(-1).reshape(shape), gate.shape)
            continue
        after = np.broadcast_to(inner[..., None], (*d.shape[:-1], 1))
        token, after = read**2 + write**2, np.concatenate([d[..., 1:], after], -1)
        squares = squares + summed(token + after**2, gate.shape)
        added = added + summed(from_here(token) + inner[..., None] ** 2, gate.shape)
    by = gate if name == "decay" else 1.0
    return Terms(np.sqrt(squares) / by, (added if whole else np.sqrt(added)) / by)


def gates_within_budget(
    got, want, dtype, inputs, options, given, operator=None, most=None, terms=None
):
    """Assert the budget of a gate's gradient: of each head of a decay, of blocks of 64 tokens.

    Wide types: thrice the formula, relative to the true gradient or to the root of the squares of
    its terms where that is more; of a decay also once the formula of their sizes added, since the
    terms of a long memory share the roundings of its states. A kernel of a narrow type: its
    operator's, relative to `added`. ``terms`` are the call's, where they are there already.
    """
    assert got.shape == want.shape
    assert np.isfinite(want).all()
    assert np.isfinite(got).all(), "not finite"
    terms = terms or gate_terms(inputs, options, given)
    shape = (-1, 1 if inputs.get("decay") is not None else want.shape[-1])
    got, want, root, added = (np.reshape(x, shape) for x in (got, want, *terms))
    extent = {"D": max(inputs["q"].shape[-1], inputs["v"].shape[-1]), "T": inputs["q"].shape[-2]}
    extent["decay"] = inputs.get("decay")
    wide = dtype in UNIT
    if most is None and wide:
        most = 3 * budget(dtype, **extent)[1]
    elif most is None:
        most = budget(dtype, gradient=True, operator=operator, **extent)[1]
    starts = range(0, max(shape[-1] - 32, 1), 64)  # a short tail belongs to the block before
    for start in starts:
        part = slice(start, None if start == starts[-1] else start + 64)
        for h in range(len(want)):
            size = max(rms(want[h, part]), rms(root[h, part])) if wide else rms(added[h, part])
            if wide and shape[-1] == 1:
                size = max(size, rms(added[h, part]) / 3)
            error = rms(got[h, part] - want[h, part])
            assert error <= most * size, (
                f"gate's gradient, head {h} from {start}: error {error / (size or math.nan):.2e} "
                f"of {size:.2e}, allowed {most:.2e}"
            )
