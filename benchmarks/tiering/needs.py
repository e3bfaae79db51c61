"""How much traces ask for, and how much of it again: what makes scratch worth having.

    python benchmarks/tiering/needs.py [--trace FOLDER ...] [--tokens N]

Of recorded traces by layer, and of the made ones (`needle_trace.py`) as one layer of two KV heads over N tokens asks on the CPU backend.
Records are originals that a call read, of one KV head and kind; "again": the share of them that was read in the step before, in one of the
eight before, in any before.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from decode_steps import recorded
from engine_steps import Setting, driven
from needle_trace import Shape, Trace
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tierd.policy import Choice, Nothing, Snapshot
from tierd.policy.snapshot import NOTHING

WINDOWS = 1, 8
STEPS = 128


class Watching(Nothing):
    """Copies nothing and remembers what was read, [2, m, Hkv] a call."""

    def __init__(self) -> None:
        self.seen: list[NDArray[np.bool_]] = []

    def looks_at(self, turn: int, settled: int, needs: int, misses: int) -> bool:
        return True

    def choose(self, snapshot: Snapshot) -> Choice:
        needed = np.zeros((2, len(snapshot.ids), len(snapshot.exact_heads)), np.bool_)
        needed[*snapshot.reads] = True
        self.seen.append(needed)
        return NOTHING


def figures(needed: NDArray[np.bool_]) -> dict[str, float]:
    """Of one kind's needs [T, m, Hkv]."""
    counts, steps = needed.sum(axis=1), len(needed)
    found = {"mean": float(counts.mean()), "p50": float(np.median(counts)), "p95": float(np.percentile(counts, 95))}
    for window in (*WINDOWS, steps):
        start = window if window < steps else 1
        before = [needed[max(0, t - window) : t].any(axis=0) for t in range(start, steps)]
        found[f"again in {window}" if window < steps else "again"] = float((needed[start:] & before).sum() / max(1, needed[start:].sum()))
    return found


def made(tokens: int, stress: bool, seed: int = 0) -> NDArray[np.bool_]:
    """Needs [T, 2, m, 2] of a made trace."""
    trace, watching = Trace(Shape(layers=1, tokens=tokens, q_heads=8, kv_heads=2, head_dim=128, steps=STEPS), seed, stress), Watching()
    with driven(trace, Setting("watched", "none", 0.0), "cpu") as run:
        run.engine._cache._policy = watching
        for step in range(STEPS):
            run.step(step)
    full = tokens // 16
    return np.stack([seen[:, :full] for seen in watching.seen])


def rows(folders: Sequence[Path], tokens: int) -> list[tuple[str, NDArray[np.bool_]]]:
    """A name and needs [T, 2, m, Hkv] each."""
    named = []
    for folder in folders:
        steps = recorded(folder)
        named += [(f"{folder.name}, layer {layer}", steps.needed[:, layer]) for layer in range(steps.layers)]
    return [*named, ("clusters", made(tokens, False)), ("needles (stress)", made(tokens, True))]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="*", default=[], help="folders of recorded traces")
    parser.add_argument("--tokens", type=int, default=131072, help="of the made traces")
    options = parser.parse_args(arguments)
    found: list[tuple[Any, ...]] = []
    for name, needed in rows(options.trace, options.tokens):
        found += [(name, kind, figures(needed[:, at])) for at, kind in enumerate(("keys", "values"))]
    table = Table("trace", "kind", *found[0][2])
    for name, kind, numbers in found:
        table.add_row(name, kind, *(f"{number:.2f}" if "again" in key else f"{number:.1f}" for key, number in numbers.items()))
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
