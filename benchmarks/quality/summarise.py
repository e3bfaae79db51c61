"""From the parts of an evaluation to its rows: one a task, context and variant, each compared with dense on the same examples."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from paired import RIGHT, compare, perplexity_delta

Row = dict[str, Any]
COUNTS = ("answers", "over_budget", "promoted_key_blocks", "promoted_value_blocks", "skipped_blocks", "host_bytes")
EIGHT_K = 8192


def summarise(records: Iterable[Row]) -> list[Row]:
    """Rows of the kinds "task", "depth" (of "niah"), and "perplexity". Only parts that are done for dense, too, count. Of a task's row
    `failures` are the prompts that dense attention answers right and the variant does not, with both answers; `differing` is how many
    answers are not dense attention's to the last character, right or wrong."""
    groups: dict[tuple[str, str, int, str], list[Row]] = defaultdict(list)
    for record in records:
        groups[record["kind"], record.get("task", ""), record["tokens"], record["variant"]].append(record)
    rows: list[Row] = []
    for (kind, task, tokens, variant), parts in groups.items():
        dense = groups.get((kind, task, tokens, "dense"), [])
        head = {"kind": kind, "tokens": tokens, "variant": variant}
        if kind == "perplexity":
            rows += [head | _perplexity(dense, parts)]
        else:
            rows += [head | {"task": task} | _scores(dense, parts)]
            rows += [head | {"kind": "depth", "task": task, "depth": depth, "score": score} for depth, score in _by_depth(parts)]
    return rows


def _scores(dense: list[Row], parts: list[Row]) -> Row:
    ours, theirs = ({i: s for part in side for i, s in zip(part["numbers"], part["scores"], strict=True)} for side in (parts, dense))
    both = sorted(ours.keys() & theirs.keys())
    compared = compare([theirs[i] for i in both], [ours[i] for i in both]).row()
    said = {name: sum(part[name] for part in parts) for name in COUNTS if name in parts[0]}
    rungs = {"rungs": np.sum([part["rungs"] for part in parts], axis=0).tolist()} if "rungs" in parts[0] else {}
    failed = [i for i in both if theirs[i] >= RIGHT > ours[i]]
    answers = [{i: text for part in side for i, text in zip(part["numbers"], part["completions"], strict=True)} for side in (dense, parts)]
    failures = [{"number": i, "dense": answers[0][i], "variant": answers[1][i]} for i in failed]
    differing = sum(answers[0][i] != answers[1][i] for i in both)
    end = {"seconds": sum(part["seconds"] for part in parts), "scores": [ours[i] for i in both]}
    return compared | said | rungs | end | {"differing": differing, "failures": failures}


def _by_depth(parts: list[Row]) -> list[tuple[float, float]]:
    scores: dict[float, list[float]] = defaultdict(list)
    for part in parts:
        for depth, score in zip(part["depths"], part["scores"], strict=True):
            if depth is not None:
                scores[depth].append(score)
    return [(depth, float(np.mean(found))) for depth, found in sorted(scores.items())]


def _perplexity(dense: list[Row], parts: list[Row]) -> Row:
    ours, theirs = ({part["window"]: part for part in side} for side in (parts, dense))
    both = sorted(ours.keys() & theirs.keys())
    tokens = [ours[i]["tokens_scored"] for i in both]
    compared = perplexity_delta([theirs[i]["nll"] for i in both], [ours[i]["nll"] for i in both], tokens)
    verdicts = [part["verdict"] for part in parts if "verdict" in part]
    counts = {name: (max if name == "worst" else sum)(v[name] for v in verdicts) for name in verdicts[0]} if verdicts else {}
    return compared | counts | {"seconds": sum(part["seconds"] for part in parts)}


def headline(rows: list[Row]) -> dict[str, float]:
    """The figures that a run is judged by; those that it did not measure are left out. The perplexity's is of the context where it is
    furthest from dense."""
    found: dict[str, float] = {}

    def of(kind: str, variant: str) -> list[Row]:
        return [row for row in rows if row["kind"] == kind and row["variant"] == variant]

    needles = [row for row in of("task", "rtol5") if row["tokens"] == EIGHT_K and row["task"] == "niah"]
    ruler = [row for row in of("task", "rtol5") if row["tokens"] == EIGHT_K and row["task"] != "niah"]
    if needles:
        found["niah_delta_8k_rtol5"] = needles[0]["delta"]
    if ruler:
        found["ruler_delta_8k_rtol5"] = float(np.mean([row["delta"] for row in ruler]))
    for variant in ("rtol2", "exact"):
        if of("task", variant):
            found[f"critical_failures_{variant}"] = sum(row["critical_failures"] for row in of("task", variant))
    if of("perplexity", "rtol5"):
        found["ppl_delta_rtol5"] = max((row["delta"] for row in of("perplexity", "rtol5")), key=abs)
    for variant in ("dense", "naive", "rtol2", "rtol5"):
        if of("task", variant):
            found[f"{variant}_accuracy"] = float(np.mean([row["variant_score"] for row in of("task", variant)]))
    judged = [row for row in rows if "violations" in row]
    if judged:
        found["violations"], found["head_steps"] = (sum(row[name] for row in judged) for name in ("violations", "head_steps"))
    return found
