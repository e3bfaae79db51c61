"""Sections of REPORT.md about what is there besides the required parts: another type of numbers, and other models."""

import json
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from compared import perplexities, scores, source, verdicts
from found import File, dtype_of
from paired import mcnemar
from tables import Columns, Row, number, place, shown, table

if TYPE_CHECKING:
    from report import Results

PRECISION = """\
The same prompts with the model computing in each type. In float32 logits after dense and after exact attention differ by a few millionths,
so that what differs from dense is the cache's doing. In BF16 neighbouring numbers between 8 and 16, where the logits of two bytes that
might come next often lie, are 1/16 apart: the model's own rounding decides what is nearer than that."""
MARGINS = """\
Each prompt that dense attention answers right in the evaluation named and a variant does not, to the byte where their answers part.
`margin`: dense attention's logit of its own next byte less that of the variant's; `spacing`: from one number of the type to the next, at
these logits. Then the scores when the prompt is answered again, on this machine."""


def precisions(results: "Results") -> list[str]:
    """Both types beside each other, and why answers part; nothing where there is one type alone."""
    named = {dtype_of(results.parts["evaluate"]): "evaluate"} | results.other_types()
    margins = next((name for name, file in results.others.items() if file.part == "margins" and not file.model), None)
    if len(named) == 1 and margins is None:
        return []
    measured = [{_cell(row) for row in results.rows(part, "task")} for part in named.values()]
    both, every = set.intersection(*measured), set.union(*measured)
    columns: Columns = {name: itemgetter(name) for name in ("type", "machine", "variant", "tasks", "tokens", "prompts")}
    columns |= {"answers differ": itemgetter("differing"), "dense": shown("dense"), "score": shown("score")}
    columns |= {"critical failures": itemgetter("only_dense"), "right where dense is not": itemgetter("only_variant"), "p": shown("p")}
    parts = ["## What rounding does", ", ".join(f"`benchmarks/results/{results.files[part].name}`" for part in named.values()), PRECISION]
    shared = {"What has been measured in all types:": both} if both and both != every else {}
    for title, cells in (shared | {"All that has been measured:": every}).items():
        rows = [row for dtype, part in named.items() for row in _totals(results, part, dtype, cells)]
        parts += [title, table(columns, rows)]
    return parts if margins is None else [*parts, source(results, margins), MARGINS, _margins(results.rows(margins))]


def _cell(row: Row) -> tuple[str, int, str]:
    return row["task"], row["tokens"], row["variant"]


def _totals(results: "Results", part: str, dtype: str, cells: set[tuple[str, int, str]]) -> list[Row]:
    """One row a variant, over those of `cells` that the part has."""
    totals = []
    chosen = [row for row in results.rows(part, "task") if row["variant"] != "dense" and _cell(row) in cells]
    for variant in sorted({row["variant"] for row in chosen}):
        rows = [row for row in chosen if row["variant"] == variant]
        counts = {name: sum(row[name] for row in rows) for name in ("examples", "differing", "only_dense_right", "only_variant_right")}
        of = (rows, counts["examples"])
        totals.append({
            "type": dtype, "machine": place(results.parts[part]["environment"]), "variant": variant,
            "tasks": len({row["task"] for row in rows}), "tokens": ", ".join(map(str, sorted({row["tokens"] for row in rows}))),
            "prompts": counts["examples"], "differing": counts["differing"],
            "dense": _mean(*of, "dense_score"), "score": _mean(*of, "variant_score"), "only_dense": counts["only_dense_right"],
            "only_variant": counts["only_variant_right"], "p": mcnemar(counts["only_dense_right"], counts["only_variant_right"]),
        })  # fmt: skip
    return totals


def _mean(rows: list[Row], examples: int, name: str) -> float:
    return float(sum(row[name] * row["examples"] for row in rows) / examples)


def _margins(rows: list[Row]) -> str:
    def same(row: Row, kind: str, **more: Any) -> list[Row]:
        return [r for r in rows if r["kind"] == kind and all(r[n] == row[n] for n in ("task", "tokens", "number"))
                and all(r[n] == value for n, value in more.items())]  # fmt: skip

    def of(dtype: str, name: str) -> Callable[[Row], str]:
        return lambda row: number(next((r[name] for r in same(row, "margin", dtype=dtype, variant=row["variant"])), None))

    def answers(dtype: str) -> Callable[[Row], str]:
        return lambda row: ", ".join(f"{r['variant']} {number(r['score'])}" for r in same(row, "answer", dtype=dtype))

    columns: Columns = {
        "prompt": lambda row: f"{row['task']}, {row['tokens']} tokens, {row['number']}",
        "variant": itemgetter("variant"),
        "both begin": lambda row: f"`{row['begins']}`",
        "dense": lambda row: f"`{row['dense']}`",
        "the variant": lambda row: f"`{row['variant_says']}`",
    }
    for dtype in ("bfloat16", "float32"):
        columns |= {f"margin, {dtype}": of(dtype, "margin"), f"spacing, {dtype}": of(dtype, "spacing")}
    columns |= {f"answered again in {dtype}": answers(dtype) for dtype in ("bfloat16", "float32")}
    return table(columns, (row for row in rows if row["kind"] == "margin" and row["dtype"] == "bfloat16"))


def other_models(results: "Results") -> list[str]:
    """A section for each model that is not this repository's; nothing where there is none."""
    models = sorted({file.model for file in results.others.values() if file.model})
    return [part for model in models for part in _model(results, model)]


def _model(results: "Results", model: str) -> list[str]:
    files = {name: file for name, file in results.others.items() if file.model == model}
    parts = [f"## Another model: `{model}`", *_training(next(iter(files.values())))]
    for name, file in files.items():
        parts += [f"### {file.part.capitalize()}", source(results, name)]
        if file.part in ("evaluate", "catastrophic"):
            parts += [scores(results.rows(name, "task")), perplexities(results.rows(name, "perplexity"))]
        elif file.part == "violations":
            parts.append(verdicts(row | {"machine": place(results.parts[name]["environment"])} for row in results.rows(name)))
    return parts


def _training(file: File) -> list[str]:
    """The last figures of its training's log, where they are kept beside its results."""
    path = file.path.with_name(f"quality_training_{file.model}.jsonl")
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    exact = [line for line in lines if line["event"] == "exact"]
    merged: dict[str, Row] = {}
    for line in exact:
        merged.setdefault(line["task"], {"task": line["task"]})[str(line["length"])] = line["share"]
    columns: Columns = {"task": itemgetter("task")}
    columns |= {f"{tokens}": shown(str(tokens)) for tokens in sorted({line["length"] for line in exact})}
    text = [line["by_context"] for line in lines if line["event"] == "perplexity"][-1:]
    perplexity = [table({f"{n} bytes": shown(n) for n in found}, [found]) for found in text]
    end = next(line for line in reversed(lines) if line["event"] == "end")
    about = f"Seed {end['seed']}, {number(end['step'])} steps, {number(end['tokens'])} bytes: `benchmarks/results/{path.name}`."
    shares = "Share of answers by greedy decoding that are right to the last byte, by length:"
    return [about, shares, table(columns, merged.values()), "Perplexity by context:", *perplexity]
