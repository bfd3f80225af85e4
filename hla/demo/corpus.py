"""The demo's text, and its bits a byte by a compressor and by a table of counts."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int64]

SHORTEST, LONGEST, LONGEST_HELD = 4096, 1 << 24, 1 << 16
BATCH, WINDOW = 4, 128


class Corpus(NamedTuple):
    """A text cut in two: its last tenth (at most 64 KiB) is held out."""

    name: str
    train: Bytes
    held: Bytes

    @classmethod
    def read(cls, path: Path | None, limit: int = LONGEST) -> Corpus:
        """Read at most `limit` bytes of a file, or the language topics of Python's own help.

        Raises
        ------
        ValueError
            The file cannot be read, or is too short to train on.
        """
        if path is None:
            from pydoc_data.topics import topics

            name, text = "pydoc_data.topics", "\n\n".join(topics.values()).encode()[:limit]
        else:
            name = str(path)
            try:
                with path.open("rb") as file:
                    text = file.read(limit)
            except OSError as error:
                raise ValueError(f"cannot read {name}: {error.strerror or error}") from error
        if len(text) < SHORTEST:
            raise ValueError(f"{name} has {len(text)} bytes; expected at least {SHORTEST}")
        array = np.frombuffer(text, np.uint8)
        cut = len(array) - min(len(array) // 10, LONGEST_HELD)
        return cls(name, array[:cut], array[cut:])

    def draw(self, rng: np.random.Generator) -> tuple[Codes, Codes]:
        """Draw `BATCH` windows of the training text, and the byte after each of theirs."""
        starts = rng.integers(0, len(self.train) - WINDOW, (BATCH, 1))
        windows = self.train[starts + np.arange(WINDOW + 1)].astype(np.intp)
        return windows[:, :-1], windows[:, 1:]


def gzip_bits(corpus: Corpus) -> float:
    """Bits a byte that gzip -9 adds for the held-out text when it follows the training text."""
    train, held = corpus.train.tobytes(), corpus.held.tobytes()
    return 8 * (len(gzip.compress(train + held)) - len(gzip.compress(train))) / len(held)


def order2_bits(corpus: Corpus) -> float:
    """Bits a byte of counts of (two bytes, next byte), backing off to one byte, none, uniform.

    The counts are the training text's. The weight of a context is Witten and Bell's: seen n times
    with u different successors, it counts n / (n + u), the shorter context the rest.
    """
    cut = len(corpus.train)
    text = np.concatenate([corpus.train, corpus.held]).astype(np.int64)
    context = np.zeros_like(text)
    p: NDArray[Any] = np.full(len(corpus.held), 1 / 256)
    for order in range(3):
        if order:
            context[order:] += text[:-order] << 8 * (order - 1)
        joint = context << 8 | text
        learnt, asked = joint[order:cut], joint[cut:]
        seen, total = _counts(learnt, asked), _counts(learnt >> 8, asked >> 8)
        kinds = _counts(np.unique(learnt) >> 8, asked >> 8)
        p = np.where(total, (seen + kinds * p) / np.maximum(total + kinds, 1), p)
    return float(-np.log2(p).mean())


def _counts(learnt: Codes, asked: Codes) -> Codes:
    """Count how often each code of ``asked`` was learnt."""
    codes, counts = np.unique(learnt, return_counts=True)
    at = np.searchsorted(codes, asked).clip(max=len(codes) - 1)
    return np.where(codes[at] == asked, counts[at], 0)
