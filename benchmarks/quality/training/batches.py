"""Batches of rows, made by worker processes ahead of need; what is in a batch depends on seed, number and shape alone."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from vocabulary import END

from training import rows

# The share of each kind of row, from which length on. The shortest rows are nearly all drills, which make the heads that copy; tasks and
# text carry most in long ones.
KINDS: tuple[Callable[[int, Random], rows.Row], ...] = (rows.text, rows.task, rows.questions, rows.pairs, rows.copies)
SHARES = {0: (0.10, 0.0, 0.0, 0.35, 0.55), 512: (0.15, 0.20, 0.25, 0.30, 0.10), 2048: (0.20, 0.37, 0.28, 0.10, 0.05)}


@dataclass(frozen=True)
class Batch:
    """`ids` int16 [rows, length + 1]; of ids[:, 1:]: `weights` float32 [rows, length] in the loss, and `answers`, which of them are.

    `kinds` int8 [rows]: the places in KINDS.
    """

    kinds: npt.NDArray[np.int8]
    ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]
    answers: npt.NDArray[np.bool_]


def batch(seed: int, number: int, count: int, length: int) -> Batch:
    """The `number`-th batch of a stream: `count` rows of `length` predictions."""
    out = Batch(
        np.zeros(count, np.int8),
        np.full((count, length + 1), END, np.int16),
        np.zeros((count, length), np.float32),
        np.zeros((count, length), np.bool_),
    )
    shares = SHARES[max(start for start in SHARES if start <= length)]
    for row in range(count):
        rng = Random(f"{seed} {number} {row} {length}")
        out.kinds[row] = kind = rng.choices(range(len(KINDS)), shares)[0]
        out.ids[row], out.weights[row], out.answers[row] = pack(KINDS[kind](length, rng), length)
    return out


def pack(row: rows.Row, length: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """A row's ids [length + 1], padded with `END` or cut; of each but the first its weight (0 for padding) and whether it is an answer."""
    flat = np.frombuffer("".join(piece.text for piece in row).encode("utf-16-le"), np.uint16)[: length + 1]
    lengths = [len(piece.text) for piece in row]
    weight = np.repeat(np.array([piece.weight for piece in row], np.float32), lengths)[: length + 1]
    answer = np.repeat(np.array([piece.answer for piece in row], np.bool_), lengths)[: length + 1]
    if found := int(answer.sum()):
        weight[answer] = min(rows.ANSWER_WEIGHT_MAX, max(1.0, rows.ANSWER_SHARE * length / found))
    padding = length + 1 - len(flat)
    ids = np.pad(flat.astype(np.int16), (0, padding), constant_values=END)
    return ids, np.pad(weight, (0, padding))[1:], np.pad(answer, (0, padding))[1:]


class Stream:
    """Iterates over batches; `next_length(number)` says the length of one when it is ordered, three a worker before it is used."""

    def __init__(self, seed: int, tokens: int, next_length: Callable[[int], int], workers: int, first: int) -> None:
        self._seed, self._tokens, self._next_length, self._number = seed, tokens, next_length, first
        self._ordered: deque[Any] = deque()
        self.failures: list[str] = []
        self._ahead = 3 * workers
        # Fresh processes: a fork of one that has computed with PyTorch can inherit a lock that nobody will release.
        self._pool = multiprocessing.get_context("spawn").Pool(workers)
        self._fill()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self._fill()
            try:
                made: Batch = self._ordered.popleft().get(timeout=120)
            except ValueError as error:  # a row that could not be made: the log says so, and minutes on a GPU are not lost
                self.failures.append(str(error))
                continue
            yield made

    def close(self) -> None:
        """End the workers."""
        self._pool.terminate()
        self._pool.join()

    def _fill(self) -> None:
        while len(self._ordered) < self._ahead:
            self._order()

    def _order(self) -> None:
        length = self._next_length(self._number)
        self._ordered.append(self._pool.apply_async(batch, (self._seed, self._number, max(1, self._tokens // length), length)))
        self._number += 1
