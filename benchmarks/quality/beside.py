"""The section of REPORT.md about another type of numbers than the headline's."""

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from compared import cell, counts, source
from found import dtype_of
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
    measured = [{cell(row) for row in results.rows(part, "task")} for part in named.values()]
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


def _totals(results: "Results", part: str, dtype: str, cells: set[tuple[str, int, str]]) -> list[Row]:
    """One row a variant, over those of `cells` that the part has."""
    totals = []
    chosen = [row for row in results.rows(part, "task") if row["variant"] != "dense" and cell(row) in cells]
    for variant in sorted({row["variant"] for row in chosen}):
        rows = [row for row in chosen if row["variant"] == variant]
        totals.append({
            "type": dtype, "machine": place(results.parts[part]["environment"]), "variant": variant, **counts(rows),
            "tokens": ", ".join(map(str, sorted({row["tokens"] for row in rows}))),
            "dense": _mean(rows, "dense_score"), "score": _mean(rows, "variant_score"),
        })  # fmt: skip
    return totals


def _mean(rows: list[Row], name: str) -> float:
    """Over prompts."""
    return float(sum(row[name] * row["examples"] for row in rows) / sum(row["examples"] for row in rows))


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
