"""Tables of what was compared with dense or exact attention, the same for every model and type of numbers."""

from collections.abc import Collection, Iterable
from operator import itemgetter
from typing import TYPE_CHECKING

from found import dtype_of
from paired import mcnemar
from tables import Columns, Row, interval, number, place, rungs, shown, table

if TYPE_CHECKING:
    from report import Results


def source(results: "Results", part: str) -> str:
    """Which file the numbers are in, its machine, and the model's type of numbers where the file says it."""
    said = results.parts[part]
    dtype = f", the model in {dtype_of(said)}" if "dtype" in said.get("run", {}) else ""
    return f"`benchmarks/results/{results.files[part].name}` ({place(said['environment'])}, torch {said['environment']['torch']}{dtype})"


def scores(rows: Iterable[Row]) -> str:
    """Scores beside dense, one line a task, context and variant."""
    columns: Columns = {
        "task": itemgetter("task"),
        "tokens": itemgetter("tokens"),
        "variant": itemgetter("variant"),
        "examples": itemgetter("examples"),
        "dense": shown("dense_score"),
        "score": shown("variant_score"),
        "delta": interval,
        "p": shown("mcnemar_p"),
        "critical failures": itemgetter("critical_failures"),
        "rungs 0-4": rungs,
        "host bytes a head": lambda row: number(row["host_bytes"] / row["answers"]) if row.get("answers") else "",
    }
    compared = (row for row in rows if row["variant"] != "dense")
    return table(columns, sorted(compared, key=lambda row: (row["tokens"], row["task"])))


def perplexities(rows: Iterable[Row]) -> str:
    """Beside dense, one line a context and variant."""
    columns: Columns = {
        "tokens": itemgetter("tokens"),
        "variant": itemgetter("variant"),
        "windows": itemgetter("windows"),
        "tokens scored": itemgetter("tokens_scored"),
        "perplexity": lambda row: f"{row['variant_perplexity']:.4f}",
        "delta": interval,
        "head-steps judged": shown("head_steps"),
        "largest error / bound": shown("worst"),
    }
    return table(columns, sorted(rows, key=itemgetter("tokens")))


def verdicts(rows: Iterable[Row]) -> str:
    """One line a machine and variant."""
    columns: Columns = {
        "machine": itemgetter("machine"),
        "variant": itemgetter("variant"),
        "head-steps": shown("head_steps"),
        "error above bound": itemgetter("violations"),
        "over budget, not exact": itemgetter("broken"),
        "budget too wide": itemgetter("loose_budgets"),
        "exact, share": lambda row: number(row["exact"] / row["head_steps"]),
        "largest error / bound": shown("worst"),
        "head-steps a second": lambda row: number(row["head_steps"] / row["seconds"]),
    }
    return table(columns, rows)


def cell(row: Row) -> tuple[str, int, str]:
    """What was measured, by task (none of text), context and variant."""
    return row.get("task", ""), row["tokens"], row["variant"]


def counts(rows: Collection[Row]) -> Row:
    """Over rows of the kind "task": how many tasks, prompts, and answers that are not dense attention's, and McNemar's test of them all."""
    names = {"prompts": "examples", "differing": "differing", "only_dense": "only_dense_right", "only_variant": "only_variant_right"}
    found: Row = {name: sum(row[of] for row in rows) for name, of in names.items()}
    return found | {"tasks": len({row["task"] for row in rows}), "p": mcnemar(found["only_dense"], found["only_variant"])}
