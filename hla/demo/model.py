"""A byte-level language model in NumPy whose only token mixer is `hla.scan`.

    x = embed[bytes]
    each block:  q, k, v = heads(norm(x) @ qkv);  q, k = relu(q), relu(k)
                 x += norm(mix(q, k, v)) @ out
                 x += relu(norm(x) @ up)**2 @ down
    logits = norm(x) @ read

norm divides by the root mean square, the mixer's output head by head: with that the operators need
no denominator. The mixer is differentiated by `hla.vjp`; every other derivative is written here.
"""

from __future__ import annotations

from collections.abc import Callable
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

NO_MIXER = "none"
BYTES = 256
CHUNK = 32  # heads are narrow: pairs within a longer chunk would cost more than its state


@dataclass(frozen=True)
class Config:
    """Sizes of a model; `operator` is one of hla's, or `NO_MIXER`: o = v, each byte for itself."""

    operator: str = "hla2"
    blocks: int = 2
    heads: int = 4
    width: int = 64
    hidden: int = 128
    fastest: float = 0.5
    slowest: float = 0.95

    @property
    def mixing(self) -> dict[str, Any]:
        """Options of the mixer; 1 - decay is a geometric sequence over the heads."""
        forgetting = np.geomspace(1 - self.fastest, 1 - self.slowest, self.heads)
        return {
            "operator": self.operator,
            "decay": 1 - forgetting,
            "scale": (self.width // self.heads) ** -0.5,
        }


def initialise(config: Config, seed: int, dtype: str = "float32") -> Parameters:
    """Draw the parameters: the same shapes and values whatever the operator."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Array:
        drawn: Array = rng.standard_normal((rows, columns)) * gain * rows**-0.5
        return drawn.astype(dtype)

    C, M = config.width, config.hidden
    parameters = {"embed": matrix(BYTES, C, BYTES**0.5), "read": matrix(C, BYTES)}
    for i in range(config.blocks):
        parameters[f"qkv{i}"] = matrix(C, 3 * C)
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


def forward(
    parameters: Parameters, config: Config, tokens: Array, mix: Mixer
) -> tuple[Array, list[tuple[Array, ...]]]:
    """Predict the byte after each token.

    Parameters
    ----------
    tokens : array of int, (B, T) or (B,)
        Bytes; without the token axis `mix` takes one step.
    mix : callable
        Given a block's number and its q, k, v of (*tokens.shape, heads, width / heads).

    Returns
    -------
    logits : array, (*tokens.shape, 256)
    tape : list
        What `backward` needs of each block, then of the read-out.
    """
    x = parameters["embed"][tokens]
    tape: list[tuple[Array, ...]] = []
    for i in range(config.blocks):
        n, n_factor = normalise(x)
        qkv = (n @ parameters[f"qkv{i}"]).reshape(*tokens.shape, 3, config.heads, -1)
        np.maximum(qkv[..., :2, :, :], 0, out=qkv[..., :2, :, :])
        o, o_factor = normalise(mix(i, *np.moveaxis(qkv, -3, 0)))
        x = x + o.reshape(x.shape) @ parameters[f"out{i}"]
        m, m_factor = normalise(x)
        h = np.maximum(m @ parameters[f"up{i}"], 0)
        x = x + h**2 @ parameters[f"down{i}"]
        tape.append((n, n_factor, qkv, o, o_factor, m, m_factor, h))
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
        n, n_factor, qkv, o, o_factor, m, m_factor, h = blocks[i]
        dh = linear(f"down{i}", h**2, dx) * h * 2
        dx += normalise_vjp(linear(f"up{i}", m, dh), m, m_factor)
        do = linear(f"out{i}", o.reshape(dx.shape), dx).reshape(o.shape)
        dqkv = np.stack(pullbacks[i](normalise_vjp(do, o, o_factor)), axis=-3)
        dqkv[..., :2, :, :] *= qkv[..., :2, :, :] > 0
        dn = linear(f"qkv{i}", n, dqkv.reshape(*dx.shape[:-1], -1))
        dx += normalise_vjp(dn, n, n_factor)
    # The embedding is a product with one-hot rows, so its gradient is one too.
    one_hot = np.equal.outer(np.arange(BYTES), tokens.ravel()).astype(dx.dtype)
    gradients["embed"] = one_hot @ dx.reshape(tokens.size, -1)
    return gradients


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Bits that each target costs, and the gradient of their mean to the logits."""
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    at = targets[..., None]
    chosen = np.take_along_axis(p, at, -1)
    np.put_along_axis(p, at, chosen - 1, -1)
    tiny = np.finfo(p.dtype).tiny
    return -np.log2(np.maximum(chosen[..., 0], tiny)), p / (log(2) * targets.size)


def loss_and_gradients(
    parameters: Parameters, config: Config, tokens: Array
) -> tuple[float, Parameters]:
    """Mean bits a byte of predicting tokens[:, 1:] from tokens[:, :-1], with its gradients."""
    pullbacks: list[Pullback] = []

    def mix(block: int, q: Array, k: Array, v: Array) -> Array:
        if config.operator == NO_MIXER:
            pullbacks.append(lambda do: (np.zeros_like(do), np.zeros_like(do), do))
            return v
        o: Array
        o, pullback = hla.vjp(q, k, v, axis=-3, chunk_size=CHUNK, **config.mixing)
        pullbacks.append(lambda do: pullback(do)[:3])
        return o

    logits, tape = forward(parameters, config, tokens[:, :-1], mix)
    bits, dlogits = cross_entropy(logits, tokens[:, 1:])
    return float(bits.mean()), backward(parameters, tokens[:, :-1], dlogits, tape, pullbacks)


def predict(
    parameters: Parameters, config: Config, tokens: Array, states: States | None = None
) -> tuple[Array, States]:
    """Continue from `states` by `hla.scan` over tokens (B, T), or by `hla.step` over (B,).

    Returns
    -------
    logits : array, (*tokens.shape, 256)
    states : tuple
        One a block: all that the next call needs of the past, of a size that does not grow.
    """
    old = states or (None,) * config.blocks
    new: list[Any] = []

    def mix(block: int, q: Array, k: Array, v: Array) -> Array:
        if config.operator == NO_MIXER:
            return v
        o: Array
        if tokens.ndim == 1:
            o, state = hla.step(q, k, v, old[block], **config.mixing)
        else:
            options = config.mixing | {"axis": -3, "chunk_size": CHUNK}
            o, state = hla.scan(q, k, v, initial_state=old[block], return_state=True, **options)
        new.append(state)
        return o

    logits, _ = forward(parameters, config, tokens, mix)
    return logits, tuple(new)


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
