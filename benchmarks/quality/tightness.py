"""How tight certificates are on recorded traces, and what the slack costs.

    python benchmarks/quality/tightness.py TRACE [TRACE ...] --steps 32

For the paper's formulas and for ours: true error over bound per head and layer at rung 0; blocks promoted and host bytes per step to
certify 1, 2, 5 and 10 % of Vbar, rungs, share exact, by each policy; what each term gains; how often 5 % of Vbar exceeds the norm of
the output. Everything is computed by the CPU kernels from the recorded tensors, with no original cached anywhere but on the host.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paper
import terms
import torch
from numpy.typing import NDArray
from replay import Stored
from tierd_kernels.policy import Budget, Coverage, Policy
from traces import Trace
from truth import exact_attention
from variants import PACKAGES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_results

RTOLS = (0.01, 0.02, 0.05, 0.10)
# Most of what "coverage" reads goes to heads whose chosen blocks cannot be certified as a set; without that check only the budget counts.
UNCHECKED = "coverage, no boundary check"
POLICIES: dict[str, Policy] = {"budget": Budget(), "coverage": Coverage(), UNCHECKED: Coverage(boundary_check=False)}
ANY = 1e9  # a tolerance that everything meets at rung 0
NORM_SHARE = 0.05
POINTS_MAX = 600  # of the figure
Row = dict[str, Any]
Array = NDArray[np.float64]


class Tally:
    """Numbers by name, each an array that grows along its first axis."""

    def __init__(self) -> None:
        self._parts: dict[Any, list[Any]] = defaultdict(list)

    def add(self, key: Any, values: Any) -> None:
        self._parts[key].append(values)

    def items(self) -> Iterator[tuple[Any, NDArray[Any]]]:
        """Each key with its arrays stacked, [times, ...]."""
        for key, parts in self._parts.items():
            yield key, np.stack(parts)


def measure(trace: Trace, steps: int, tally: Tally) -> Row:
    """Add what `steps` evenly spaced steps of every layer of `trace` say; returns the costs of terms on the last layer."""
    costs: Row = {}
    for layer in range(trace.meta.layers):
        tensors, stored = trace.layer(layer), trace.stored(layer)
        for step in np.unique(np.linspace(0, trace.meta.steps - 1, steps).round().astype(int)).tolist():
            q, seen = tensors["queries"][step], trace.seen(step)
            costs |= _rung_zero(stored, tensors, q, seen, layer, tally, costs_too=step == 0)
            for rtol in RTOLS:
                _certify(stored, q, seen, rtol, layer, tally)
    return costs


def _rung_zero(
    stored: Stored, tensors: dict[str, torch.Tensor], q: torch.Tensor, seen: int, layer: int, tally: Tally, costs_too: bool
) -> Row:
    climbed, result = stored.climbed(q, seen, ANY, Budget(skip_share=0.0))
    truth = exact_attention(q[:, None], tensors["keys"][:, :seen], tensors["values"][:, :seen], stored.scale)
    output = torch.from_numpy(result.output.view(np.uint16) if q.dtype == torch.bfloat16 else result.output)
    output = output.view(torch.bfloat16) if q.dtype == torch.bfloat16 else output
    error = (output.double() - truth.output).norm(dim=2)[:, 0].numpy()
    vbar, norm = truth.value_norm[:, 0].numpy(), truth.output.norm(dim=2)[:, 0].numpy()
    tally.add(("norm", layer), NORM_SHARE * vbar > norm)
    if result.certificate["exact"].any():
        return {}  # a row that no bound could be given for was never at rung 0
    facts, without = paper.facts(climbed), terms.bounds(climbed)
    ours = result.certificate["bound"][:, 0]
    tally.add(("ratio", layer), np.stack((error, ours, facts.bound_R, vbar)))
    for term in terms.TERMS:
        tally.add(("term", term), without[term] / without["all"])
    for rtol in RTOLS:
        keys, values = paper.fewest(facts, rtol)
        heads = stored.layout.num_kv_heads
        unions = [mask.reshape(heads, -1, mask.shape[1]).any(axis=1) for mask in (keys, values)]
        blocks = [int(union.sum()) for union in unions]
        tally.add(("cost", "paper's formulas", rtol, layer), np.array([sum(blocks) * stored.layout.original_record_bytes, *blocks]))
    return terms.costs_us(stored, climbed) if costs_too else {}


def _certify(stored: Stored, q: torch.Tensor, seen: int, rtol: float, layer: int, tally: Tally) -> None:
    for name, policy in POLICIES.items():
        result = stored.attend(q, seen, rtol, policy)
        blocks = np.bincount(result.reads.records[0], minlength=2).tolist()
        tally.add(("cost", name, rtol, layer), np.array([stored.host_bytes(result), *blocks]))
        tally.add(("rung", name, rtol), np.bincount(result.certificate["rung"].ravel().astype(np.int64), minlength=5))


def summarise(tally: Tally, costs: Row) -> list[Row]:
    """The rows of the results."""
    rows: list[Row] = []
    costs_by_policy: dict[tuple[str, float], list[Array]] = defaultdict(list)
    rungs = {key[1:]: counts.sum(axis=0) for key, counts in tally.items() if key[0] == "rung"}
    for key, values in tally.items():
        if key[0] == "ratio":
            rows += [_ratio(key[1], head, values[:, :, head]) for head in range(values.shape[2])]
        elif key[0] == "norm":
            rows += [{"kind": "norm", "layer": key[1], "head": h, "share": float(values[:, h].mean())} for h in range(values.shape[1])]
        elif key[0] == "term":
            finite = np.minimum(values, terms.UNREACHABLE)
            rows.append({
                "kind": "term", "term": key[1], "needs": terms.NEEDS[key[1]], "decides_share": float((finite > 1.0 + 1e-6).mean()),
                "gain_p50": float(np.median(finite)), "gain_p90": float(np.quantile(finite, 0.9)), "gain_max": float(finite.max()),
            })  # fmt: skip
        elif key[0] == "cost":
            costs_by_policy[key[1], key[2]].append(values.mean(axis=0))
    for (policy, rtol), layers in costs_by_policy.items():
        host, keys, values = np.sum(layers, axis=0).tolist()
        row = {"kind": "cost", "policy": policy, "rtol": rtol, "host_bytes": host, "key_blocks": keys, "value_blocks": values}
        rows.append(row | _rungs(rungs.get((policy, rtol))))
    rows += [{"kind": "microseconds", "what": name, "p50": value} for name, value in costs.items()]
    return rows + _points(tally)


def _ratio(layer: int, head: int, numbers: Array) -> Row:
    """`numbers` [steps, 4]: error, our bound, the paper's, Vbar."""
    error, ours, theirs, vbar = numbers.T
    row: Row = {"kind": "ratio", "layer": layer, "head": head, "steps": len(numbers), "error_over_vbar_p50": float(np.median(error / vbar))}
    for name, bound in (("ours", ours), ("paper", theirs)):
        quantiles = np.quantile(error / bound, (0.1, 0.5, 0.9, 1.0)).tolist()
        row |= {f"{name}_{q}": value for q, value in zip(("p10", "p50", "p90", "max"), quantiles, strict=True)}
        row[f"{name}_bound_over_vbar_p50"] = float(min(np.median(bound / vbar), terms.UNREACHABLE))
    return row


def _rungs(counts: NDArray[np.int64] | None) -> Row:
    if counts is None:
        return {}
    return {"rungs": counts.tolist(), "exact_share": float(counts[3:].sum() / counts.sum())}


def _points(tally: Tally) -> list[Row]:
    """A sample of single head-steps, for the figure."""
    every = [values.transpose(0, 2, 1).reshape(-1, 4) for key, values in tally.items() if key[0] == "ratio"]
    points = np.concatenate(every) if every else np.empty((0, 4))
    points = points[np.linspace(0, len(points) - 1, min(POINTS_MAX, len(points))).astype(int)]
    return [
        {"kind": "point", "error": e / v, "ours": o / v, "paper": min(p / v, terms.UNREACHABLE)} for e, o, p, v in points.tolist()
    ]  # fmt: skip


def headline(rows: list[Row]) -> dict[str, float]:
    """Host bytes to certify 5 %, the paper's policy over ours, and how far the bound is from the truth. Where ours read nothing at all,
    one byte stands for it."""
    host = {row["policy"]: row["host_bytes"] for row in rows if row["kind"] == "cost" and row["rtol"] == NORM_SHARE}
    ratios = [row for row in rows if row["kind"] == "ratio"]
    medians = {f"error_over_bound_{name}_p50": float(np.median([row[f"{name}_p50"] for row in ratios])) for name in ("ours", "paper")}
    norms = {"norm_below_rtol5_share": float(np.mean([row["share"] for row in rows if row["kind"] == "norm"]))}
    best = max(1.0, host["budget"])
    return {
        "bytes_vs_paper_rtol5": host["coverage"] / best, "bytes_vs_paper_unchecked_rtol5": host[UNCHECKED] / best,
        "bytes_vs_paper_formulas_rtol5": host["paper's formulas"] / best, **medians, **norms,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="folders that traces.py recorded")
    parser.add_argument("--steps", type=int, default=32, help="of each trace, evenly spaced")
    options = parser.parse_args(arguments)
    tally, costs = Tally(), Row()
    for path in options.traces:
        costs |= measure(Trace(path), options.steps, tally)
    rows = summarise(tally, costs)
    found = headline(rows)
    rows += [{"kind": "trace", **vars(Trace(path).meta)} for path in options.traces]
    print(found, write_results("quality_tightness", found, rows, PACKAGES).name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
