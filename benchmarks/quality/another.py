"""Sections of REPORT.md about models that are not this repository's: each beside the one that is, then what was measured of it in full."""

import json
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from compared import cell, counts, perplexities, scores, source, verdicts
from found import File, dtype_of
from tables import Columns, Row, interval, number, place, shown, table

if TYPE_CHECKING:
    from report import Results

OWN = "byte-llama"  # whose results' names have no model
LOG = Path(__file__).parent / OWN / "training-log.jsonl"
SAME = """\
What has been measured of both. Models that read bytes are given the same prompt n of a task and context, and the same first windows of its
text, the one perhaps fewer than the other: perplexities are of the same text where there are as many `windows`. In `dense` and `score` all
tasks weigh the same, however many prompts of each there are."""


def other_models(results: "Results") -> list[str]:
    """A section for each model that is not this repository's; nothing where there is none."""
    models = sorted({file.model for file in results.others.values() if file.model})
    return [part for model in models for part in _model(results, model)]


def _model(results: "Results", model: str) -> list[str]:
    files = {name: file for name, file in results.others.items() if file.model == model}
    parts = [f"## Another model: `{model}`", *_training(next(iter(files.values()))), *_beside(results, model, files)]
    for name, file in files.items():
        parts += [f"### {file.part.capitalize()}", source(results, name)]
        if file.part in ("evaluate", "catastrophic"):
            parts += [scores(results.rows(name, "task")), perplexities(results.rows(name, "perplexity"))]
        elif file.part == "violations":
            parts.append(verdicts(row | {"machine": place(results.parts[name]["environment"])} for row in results.rows(name)))
    return parts


def _training(file: File) -> list[str]:
    """The last figures of its training's log, where they are kept beside its results, under those of this repository's model."""
    path = file.path.with_name(f"quality_training_{file.model}.jsonl")
    if not path.is_file():
        return []
    own, other = _trained(LOG), _trained(path)
    sides = {OWN: own, file.model: other}
    ends = (f"Seed {end['seed']}, {number(end['step'])} steps, {number(end['tokens'])} bytes" for end in (other["end"], own["end"]))
    about = f"{next(ends)}: `benchmarks/results/{path.name}`. {next(ends)}: `benchmarks/quality/{OWN}/{LOG.name}`."
    shares = "Share of answers by greedy decoding that are right to the last byte, by length:"
    rows = [{"task": task, "model": name} | side["exact"].get(task, {}) for task in other["exact"] for name, side in sides.items()]
    lengths = sorted({length for row in rows for length in row if length.isdecimal()}, key=int)
    columns: Columns = {name: itemgetter(name) for name in ("task", "model")} | {length: shown(length) for length in lengths}
    text: Columns = {"model": itemgetter("model")} | {f"{n} bytes": shown(n) for n in other["perplexity"]}
    perplexity = table(text, ({"model": name} | side["perplexity"] for name, side in sides.items()))
    return [about, shares, table(columns, rows), "Perplexity by context:", perplexity, _worse(own, other)]


def _trained(path: Path) -> dict[str, Any]:
    """Of a log: the last "end", the last "perplexity", and the last share of every task and length, "exact"."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    events = {name: [line for line in lines if line.get("event") == name] for name in ("end", "perplexity", "exact")}
    exact: dict[str, dict[str, float]] = {}
    for line in events["exact"]:
        exact.setdefault(line["task"], {})[str(line["length"])] = line["share"]
    return {"end": events["end"][-1], "perplexity": events["perplexity"][-1]["by_context"], "exact": exact}


def _worse(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In how much of what both logs have the other model is worse, in how much better, and by how much at most."""
    mine, its = ({(task, at): share for task, found in side["exact"].items() for at, share in found.items()} for side in (own, other))
    answers = [its[at] - mine[at] for at in its.keys() & mine.keys()]
    text = [other["perplexity"][at] - own["perplexity"][at] for at in other["perplexity"].keys() & own["perplexity"].keys()]
    return (
        f"Than `{OWN}` its perplexity is higher at {_of(text, 1)} of the contexts, lower at {_of(text, -1)}; "
        f"of the shares of right answers {_of(answers, -1)} are lower, {_of(answers, 1)} higher."
    )


def _of(differences: list[float], sign: int) -> str:
    """How many of them have that sign, and how large the largest is."""
    found = [sign * value for value in differences if sign * value > 0]
    return f"{len(found)} of {len(differences)}" + (f" (by {number(max(found))} at most)" if found else "")


def _beside(results: "Results", model: str, files: Mapping[str, File]) -> list[str]:
    """What certificates said of all that was measured of the model, and each of its results beside those of this repository's model."""
    judged = [row for name in files for row in results.rows(name) if "head_steps" in row]
    steps, above = (sum(row[name] for row in judged) for name in ("head_steps", "violations"))
    about = f"In all results of `{model}`: {number(steps)} head-steps judged, {above} with the error above the bound."
    parts = [f"### Beside `{OWN}`", SAME, about]
    for name, file in files.items():
        for own in _own(results, file.part):
            tables = [text for text in _tables(results, {OWN: own, model: name}, file.part) if text]
            parts += [f"{_names(results, own)} beside {_names(results, name)}:", *tables] if tables else []
    return parts


def _own(results: "Results", part: str) -> list[str]:
    """The same part of this repository's model, an evaluation in every type of numbers; none where it has none."""
    return results.of_all_types() if part == "evaluate" else [part] if part in results.parts else []


def _names(results: "Results", name: str) -> str:
    paths = results.judged if name == "violations" else [results.files[name]]
    return ", ".join(f"`benchmarks/results/{path.name}`" for path in paths)


def _tables(results: "Results", sides: Mapping[str, str], part: str) -> Iterator[str]:
    """`sides`: by model, under which name its results were read."""
    if part == "violations":
        yield _verdicts(results, sides)
    elif part in ("evaluate", "catastrophic"):
        yield _answers(results, sides)
        yield _text(results, sides)


def _shared(results: "Results", sides: Mapping[str, str], kind: str) -> Iterator[tuple[Row, list[Row]]]:
    """A context, variant and model each, and its rows of what all sides have; none of dense attention."""
    rows = {model: results.rows(part, kind) for model, part in sides.items()}
    shared = set.intersection(*({cell(row) for row in side} for side in rows.values()))
    for tokens, variant in sorted({(tokens, variant) for _, tokens, variant in shared if variant != "dense"}):
        for model, side in rows.items():
            head = {"tokens": tokens, "variant": variant, "model": model, "type": dtype_of(results.parts[sides[model]])}
            yield head, [row for row in side if cell(row) in shared and (row["tokens"], row["variant"]) == (tokens, variant)]


def _answers(results: "Results", sides: Mapping[str, str]) -> str:
    rows = [head | counts(found) | _means(found) for head, found in _shared(results, sides, "task")]
    columns: Columns = {name: itemgetter(name) for name in ("tokens", "variant", "model", "type", "tasks", "prompts")}
    columns |= {"answers differ": itemgetter("differing"), "dense": shown("dense"), "score": shown("score")}
    columns |= {"critical failures": itemgetter("only_dense"), "right where dense is not": itemgetter("only_variant"), "p": shown("p")}
    return table(columns, rows) if rows else ""


def _means(rows: Iterable[Row]) -> Row:
    rows = list(rows)
    return {name: float(np.mean([row[f"{of}_score"] for row in rows])) for name, of in (("dense", "dense"), ("score", "variant"))}


def _text(results: "Results", sides: Mapping[str, str]) -> str:
    rows = [row | head for head, found in _shared(results, sides, "perplexity") for row in found]
    columns: Columns = {name: itemgetter(name) for name in ("tokens", "variant", "model", "type", "windows")}
    columns |= {"dense perplexity": shown("dense_perplexity"), "delta": interval, "largest error / bound": shown("worst")}
    return table(columns, rows) if rows else ""


def _verdicts(results: "Results", sides: Mapping[str, str]) -> str:
    machines = {part: {"machine": place(results.parts[part]["environment"])} for part in sides.values()}
    rows = [machines[part] | row | {"model": model} for model, part in sides.items() for row in results.rows(part)]
    names = [row["variant"] for row in rows]
    columns: Columns = {name: itemgetter(name) for name in ("variant", "model", "machine")}
    columns |= {"head-steps": shown("head_steps"), "error above bound": itemgetter("violations"), "largest error / bound": shown("worst")}
    columns |= {"exact, share": lambda row: number(row["exact"] / row["head_steps"])}
    return table(columns, sorted(rows, key=lambda row: names.index(row["variant"])))
