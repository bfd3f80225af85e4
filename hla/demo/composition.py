"""A task that one layer solves only if its operator composes what it has read.

Chains a, b, c are told as facts: first b leads to c, of all chains in some order, then a leads to
b. Asked a, the answer is c: neither fact holds both.

    b c ; b c ; b c ; a b ; a b ; a b ; a ; a ; a ;
                                        c   c   c     (wanted)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .model import Array

BATCH, HELD = 32, 256


class Chains(NamedTuple):
    """So many chains of symbols, each symbol at most once in a row."""

    chains: int = 3
    symbols: int = 16

    def draw(self, rng: np.random.Generator, rows: int = BATCH) -> tuple[Array, Array]:
        """Draw rows of tokens, and what is wanted after each, -1 where nothing is: (rows, T)."""
        names = np.argsort(rng.random((rows, self.symbols)), axis=1) + 1  # 0 is the semicolon
        a, b, c = np.split(names[:, : 3 * self.chains], 3, axis=1)
        stop = np.zeros_like(a)

        def told(*facts: Array) -> Array:
            order = np.argsort(rng.random(a.shape), axis=1)
            rows = (np.take_along_axis(x, order, axis=1) for x in (*facts, stop))
            return np.stack(list(rows), axis=-1).reshape(len(a), -1)

        second, first = told(b, c), told(a, b)
        order = np.argsort(rng.random(a.shape), axis=1)
        asked, wanted = (np.take_along_axis(x, order, axis=1) for x in (a, c))
        questions = np.stack([asked, stop], axis=-1).reshape(rows, -1)
        answers = np.stack([wanted, stop - 1], axis=-1).reshape(rows, -1)
        tokens = np.concatenate([second, first, questions], axis=1)
        silent = np.full((rows, tokens.shape[1] - answers.shape[1]), -1)
        return tokens, np.concatenate([silent, answers], axis=1)
