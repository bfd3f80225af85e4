"""A model of symbols in NumPy whose only token mixer is `hla.scan`, for text and for other tasks.

    x = embed[symbols]
    each block:  q, k, v = heads(conv(norm(x) @ qkv));  q, k = norm(silu(q)), norm(silu(k))
                 x += norm(mix(q, k, v)) @ out
                 x += relu(norm(x) @ up)**2 @ down
    logits = norm(x) @ read

norm divides by the root mean square, of q, k and the mixer's output head by head: with that the
operators need no denominator. conv is a causal convolution of `TAPS` tokens, each channel for
itself. The mixer is differentiated by `hla.vjp`; every other derivative is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hla

Array = NDArray[Any]
Parameters = dict[str, Array]
States = tuple[Any, ...]
Mixer = Callable[[int, Array, Array, Array], Array]
Pullback = Callable[[Array], tuple[Array, Array, Array]]

NO_MIXER, SOFTMAX = "none", "softmax"
TAPS = 4
CHUNK = 32  # heads are narrow: pairs within a longer chunk would cost more than its state


@dataclass(frozen=True)
class Config:
    """Sizes and learning rate; `operator` is one of hla's, `SOFTMAX`, or `NO_MIXER`: o = v."""

    operator: str = "hla2"
    blocks: int = 2
    heads: int = 4
    width: int = 64
    hidden: int = 128
    symbols: int = 256
    decays: tuple[float, float] | None = (0.5, 0.95)
    rate: float = 7e-3

    @property
    def mixing(self) -> dict[str, Any]:
        """Options of the mixer; 1 - decay is a geometric sequence over the heads."""
        options = {"operator": self.operator, "scale": self.heads / self.width}
        if self.decays:
            fastest, slowest = self.decays
            options["decay"] = 1 - np.geomspace(1 - fastest, 1 - slowest, self.heads)
        return options


def initialise(config: Config, seed: int, dtype: str = "float32") -> Parameters:
    """Draw the parameters: the same shapes and values whatever the operator."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Array:
        drawn: Array = rng.standard_normal((rows, columns)) * gain * rows**-0.5
        return drawn.astype(dtype)

    C, M, S = config.width, config.hidden, config.symbols
    parameters = {"embed": matrix(S, C, S**0.5), "read": matrix(C, S)}
    for i in range(config.blocks):
        parameters[f"qkv{i}"] = matrix(C, 3 * C)
        parameters[f"conv{i}"] = matrix(TAPS, 3 * C, 0.4)
        parameters[f"conv{i}"][-1] += 1  # the last tap is the token itself
        parameters[f"out{i}"] = matrix(C, C, 0.5)
        parameters[f"up{i}"] = matrix(C, M)
        parameters[f"down{i}"] = matrix(M, C, 0.5)
    return parameters


def parameter_count(config: Config) -> int:
    """Numbers that a model of this size learns."""
    return sum(x.size for x in initialise(config, 0).values())


def normalise(x: Array) -> tuple[Array, Array]:
    """Divide the last axis by its root mean square; return the result and the factor."""
    factor = (np.einsum("...c,...c", x, x)[..., None] / x.shape[-1] + 1e-6) ** -0.5
    return x * factor, factor


def normalise_vjp(dy: Array, y: Array, factor: Array) -> Array:
    """Gradient to the input of `normalise`, from what it returned."""
    along = np.einsum("...c,...c", dy, y)[..., None] / y.shape[-1]
    dx: Array = (dy - y * along) * factor
    return dx


def convolve(x: Array, taps: Array, before: Array | None = None) -> tuple[Array, Array]:
    """Sum each channel over the last `TAPS` tokens.

    Parameters
    ----------
    x : array, (B, T, C)
    taps : array, (TAPS, C)
        The last one is of the token itself.
    before : array, (B, TAPS - 1, C), optional
        The tokens before x; without them zeros.

    Returns
    -------
    y : array, (B, T, C)
    padded : array, (B, TAPS - 1 + T, C)
        x behind those before it; its end is what the next call needs.
    """
    if before is None:
        before = np.zeros((len(x), TAPS - 1, x.shape[-1]), x.dtype)
    padded = np.concatenate([before, x], axis=1)
    T = x.shape[1]
    y = padded[:, :T] * taps[0]
    for i, tap in enumerate(taps[1:], 1):
        y += padded[:, i : i + T] * tap
    return y, padded


def convolve_vjp(dy: Array, taps: Array, padded: Array) -> tuple[Array, Array]:
    """Gradients to x and the taps of `convolve` without tokens before x."""
    T = dy.shape[1]
    dx = np.zeros_like(padded)
    for i, tap in enumerate(taps):
        dx[:, i : i + T] += dy * tap
    windows = (padded[:, i : i + T] for i in range(TAPS))
    return dx[:, TAPS - 1 :], np.stack([np.einsum("btc,btc->c", dy, x) for x in windows])


def silu(x: Array) -> tuple[Array, Array]:
    """Return x times its logistic function, and the derivative."""
    gate = 0.5 * np.tanh(0.5 * x) + 0.5
    y = x * gate
    return y, gate + y * (1 - gate)


def forward(
    parameters: Parameters,
    config: Config,
    tokens: Array,
    mix: Mixer,
    before: Sequence[Array | None] | None = None,
) -> tuple[Array, list[tuple[Array, ...]]]:
    """Predict the symbol after each token.

    Parameters
    ----------
    tokens : array of int, (B, T)
    mix : callable
        Given a block's number and its q, k, v of (B, T, heads, width / heads).
    before : sequence of array or None, optional
        What the convolution of each block still needs of the past (see `convolve`).

    Returns
    -------
    logits : array, (B, T, symbols)
    tape : list
        What `backward` needs of each block, then of the read-out.
    """
    x = parameters["embed"][tokens]
    tape: list[tuple[Array, ...]] = []
    for i, past in enumerate(before or (None,) * config.blocks):
        n, n_factor = normalise(x)
        drawn, padded = convolve(n @ parameters[f"qkv{i}"], parameters[f"conv{i}"], past)
        qkv = drawn.reshape(*tokens.shape, 3, config.heads, -1)
        qk, slope = silu(qkv[..., :2, :, :])
        qk, qk_factor = normalise(qk)
        q, k, v = qk[..., 0, :, :], qk[..., 1, :, :], qkv[..., 2, :, :]
        o, o_factor = normalise(mix(i, q, k, v))
        x = x + o.reshape(x.shape) @ parameters[f"out{i}"]
        m, m_factor = normalise(x)
        h = np.maximum(m @ parameters[f"up{i}"], 0)
        x = x + h**2 @ parameters[f"down{i}"]
        tape.append((n, n_factor, padded, slope, qk, qk_factor, o, o_factor, m, m_factor, h))
    y, y_factor = normalise(x)
    return y @ parameters["read"], [*tape, (y, y_factor)]


def backward(
    parameters: Parameters,
    tokens: Array,
    dlogits: Array,
    tape: list[tuple[Array, ...]],
    pullbacks: list[Pullback],
) -> Parameters:
    """Gradients of every parameter, from that of the logits and the blocks' mixer pullbacks."""
    gradients: Parameters = {}

    def linear(name: str, x: Array, dy: Array) -> Array:
        """Gradient to x of y = x @ parameter; keeps the parameter's own."""
        flat = dy.reshape(-1, dy.shape[-1])
        gradients[name] = x.reshape(len(flat), -1).T @ flat
        return (flat @ parameters[name].T).reshape(*dy.shape[:-1], -1)

    *blocks, (y, y_factor) = tape
    dx = normalise_vjp(linear("read", y, dlogits), y, y_factor)
    for i in reversed(range(len(blocks))):
        n, n_factor, padded, slope, qk, qk_factor, o, o_factor, m, m_factor, h = blocks[i]
        dh = linear(f"down{i}", h**2, dx) * h * 2
        dx += normalise_vjp(linear(f"up{i}", m, dh), m, m_factor)
        do = linear(f"out{i}", o.reshape(dx.shape), dx).reshape(o.shape)
        dqkv = np.stack(pullbacks[i](normalise_vjp(do, o, o_factor)), axis=-3)
        dqkv[..., :2, :, :] = normalise_vjp(dqkv[..., :2, :, :], qk, qk_factor) * slope
        taps = parameters[f"conv{i}"]
        drawn, gradients[f"conv{i}"] = convolve_vjp(dqkv.reshape(*n.shape[:-1], -1), taps, padded)
        dn = linear(f"qkv{i}", n, drawn)
        dx += normalise_vjp(dn, n, n_factor)
    # The embedding is a product with one-hot rows, so its gradient is one too.
    one_hot = np.equal.outer(np.arange(len(parameters["embed"])), tokens.ravel()).astype(dx.dtype)
    gradients["embed"] = one_hot @ dx.reshape(tokens.size, -1)
    return gradients


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Bits that each target costs, and the gradient of their mean to the logits.

    A target below 0 is none: it costs nothing.
    """
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    asked = targets >= 0
    at = np.where(asked, targets, 0)[..., None]
    chosen = np.take_along_axis(p, at, -1)
    np.put_along_axis(p, at, chosen - 1, -1)
    tiny = np.finfo(p.dtype).tiny
    bits = np.where(asked, -np.log2(np.maximum(chosen[..., 0], tiny)), 0)
    return bits, p * (asked / (log(2) * asked.sum()))[..., None].astype(p.dtype)


def softmax_vjp(q: Array, k: Array, v: Array) -> tuple[Array, Pullback]:
    """Causal softmax attention over the second axis of (B, T, heads, D), with its pullback."""
    scale = q.shape[-1] ** -0.5
    later = np.triu(np.full((q.shape[1], q.shape[1]), -np.inf, q.dtype), 1)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (B, heads, T, D)
    weights = q @ k.mT * scale + later
    weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)

    def pullback(do: Array) -> tuple[Array, Array, Array]:
        do = do.swapaxes(1, 2)
        dweights = do @ v.mT
        along = (dweights * weights).sum(axis=-1, keepdims=True)
        scores = weights * (dweights - along) * scale
        dq, dk, dv = scores @ k, scores.mT @ q, weights.mT @ do
        return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)

    return (weights @ v).swapaxes(1, 2), pullback


def loss_and_gradients(
    parameters: Parameters, config: Config, tokens: Array, targets: Array
) -> tuple[float, Parameters]:
    """Mean bits of each target (see `cross_entropy`), with its gradients; both (B, T)."""
    pullbacks: list[Pullback] = []

    def mix(block: int, q: Array, k: Array, v: Array) -> Array:
        o: Array
        pullback: Any
        if config.operator == NO_MIXER:
            o, pullback = v, lambda do: (np.zeros_like(do), np.zeros_like(do), do)
        elif config.operator == SOFTMAX:
            o, pullback = softmax_vjp(q, k, v)
        else:
            o, pullback = hla.vjp(q, k, v, axis=-3, chunk_size=CHUNK, **config.mixing)
        pullbacks.append(lambda do: pullback(do)[:3])
        return o

    logits, tape = forward(parameters, config, tokens, mix)
    bits, dlogits = cross_entropy(logits, targets)
    mean = float(bits.sum() / (targets >= 0).sum())
    return mean, backward(parameters, tokens, dlogits, tape, pullbacks)


def predict(
    parameters: Parameters, config: Config, tokens: Array, states: States | None = None
) -> tuple[Array, States]:
    """Continue from `states` by `hla.scan` over tokens (B, T), or by `hla.step` over (B,).

    Returns
    -------
    logits : array, (*tokens.shape, symbols)
    states : tuple
        All that the next call needs of the past, of a size that does not grow: of each block the
        state of its mixer and the last tokens before its convolution.
    """
    old, before = states or ((None,) * config.blocks, None)
    new: list[Any] = []

    def mix(block: int, q: Array, k: Array, v: Array) -> Array:
        if config.operator == NO_MIXER:
            new.append(None)
            return v
        if config.operator == SOFTMAX:
            new.append(None)
            return softmax_vjp(q, k, v)[0]
        o: Array
        if tokens.ndim == 1:
            q, k, v = (x[:, 0] for x in (q, k, v))
            o, state = hla.step(q, k, v, old[block], **config.mixing)
            o = o[:, None]
        else:
            options = config.mixing | {"axis": -3, "chunk_size": CHUNK}
            o, state = hla.scan(q, k, v, initial_state=old[block], return_state=True, **options)
        new.append(state)
        return o

    rows = tokens[:, None] if tokens.ndim == 1 else tokens
    logits, (*blocks, _) = forward(parameters, config, rows, mix, before)
    after = tuple(padded[:, 1 - TAPS :] for _, _, padded, *_ in blocks)
    return logits.reshape(*tokens.shape, -1), (tuple(new), after)


class Adam:
    """Adam (Kingma and Ba, 2015), updating the parameters in place."""

    def __init__(self, parameters: Parameters, beta1: float = 0.8, beta2: float = 0.95) -> None:
        self.parameters, self.beta1, self.beta2, self.steps = parameters, beta1, beta2, 0
        self.mean = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.square = {name: np.zeros_like(x) for name, x in parameters.items()}

    def step(self, gradients: Parameters, rate: float) -> None:
        """Move every parameter once."""
        self.steps += 1
        rate /= 1 - self.beta1**self.steps
        for name, gradient in gradients.items():
            mean, square = self.mean[name], self.square[name]
            mean += (1 - self.beta1) * (gradient - mean)
            square += (1 - self.beta2) * (gradient**2 - square)
            size = np.sqrt(square / (1 - self.beta2**self.steps))
            self.parameters[name] -= rate * mean / (size + 1e-8)
