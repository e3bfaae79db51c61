"""Writes REPORT.md, its figures and the headline from committed results. No number comes from anywhere else.

    python benchmarks/quality/report.py --machine nvidia-h100-80gb-hbm3 --machine amd-epyc-2-cores

Each part is taken from the first machine that has it; certificates that were held against exact attention count on all of them. Ends with
an error, and writes nothing, where a part is missing or where any certificate was found to be wrong. Results that name another model or
another type of numbers are reported in sections of their own.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import sections
from found import File, Unreportable, dtype_of, find
from tables import place

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, machine_name

HERE = Path(__file__).parent
MADE_BY = {
    "evaluate": "evaluate.py", "catastrophic": "evaluate.py --catastrophic", "violations": "violations.py", "tightness": "tightness.py",
    "peers": "peers.py",
}  # fmt: skip
HEADLINE = (
    "violations", "head_steps", "niah_delta_8k_rtol5", "ruler_delta_8k_rtol5", "critical_failures_rtol2", "ppl_delta_rtol5",
    "bytes_vs_paper_rtol5", "naive_catastrophic_accuracy", "certified_catastrophic_accuracy", "certified_rtol5_catastrophic_accuracy",
    "dense_catastrophic_accuracy",
)  # fmt: skip
# Vbar is what the rescaled channels make of it: 2 % recovers what 5 % does not quite.
CATASTROPHIC = {"naive": "naive", "certified": "rtol2", "certified_rtol5": "rtol5", "dense": "dense"}


@dataclass(frozen=True)
class Results:
    """What was read, by part; other models' and types' by the middle of their file's name. `others`: the names of those, in order.
    `judged`: all that "violations" was read from; its rows say "file" and "machine"."""

    parts: dict[str, dict[str, Any]]
    files: dict[str, Path]
    judged: list[Path]
    others: dict[str, File]

    def rows(self, part: str, kind: str | None = None) -> list[dict[str, Any]]:
        """Rows of a part, all or those of a kind."""
        return [row for row in self.parts[part]["rows"] if kind is None or row["kind"] == kind]

    def other_types(self) -> dict[str, str]:
        """Of the same model's evaluations in another type of numbers: part by type."""
        headline = dtype_of(self.parts["evaluate"])
        others = {dtype_of(self.parts[name]): name for name, file in self.others.items() if file.part == "evaluate" and not file.model}
        return {dtype: name for dtype, name in others.items() if dtype != headline}

    def of_all_types(self) -> list[str]:
        """The parts that are evaluations of the same model, the headline's first."""
        return ["evaluate", *self.other_types().values()]


def read(folder: Path, machines: list[str]) -> Results:
    """Every part from the first machine that has it, "violations" from all of them. Raises Unreportable naming the command that makes what
    is missing, or the part with a wrong certificate."""
    required, others = find(folder, machines, MADE_BY)
    parts = {name: json.loads(file.path.read_text()) for name, file in (required | others).items()}
    judged = {path: json.loads(path.read_text()) for name in machines if (path := folder / f"quality_violations__{name}.json").is_file()}
    parts["violations"]["rows"] = [row | _origin(path, said) for path, said in judged.items() for row in said["rows"]]
    results = Results(parts, {name: file.path for name, file in (required | others).items()}, list(judged), others)
    check(results)
    return results


def _origin(path: Path, said: dict[str, Any]) -> dict[str, str]:
    return {"file": path.name, "machine": place(said["environment"])}


def check(results: Results) -> None:
    """Raises Unreportable if anything in the results says that a promise was broken."""
    for part in results.parts:
        for row in results.rows(part):
            for name in ("violations", "broken", "over_budget"):
                if row.get(name, 0):
                    file = row.get("file", results.files[part].name)
                    raise Unreportable(f"{file} counts {row[name]} {name} of {row.get('variant')}: nothing is reported")
    if not any(row.get("head_steps") for row in results.rows("violations")):
        raise Unreportable(f"{results.files['violations'].name} judged no head-step")


def headline(results: Results) -> dict[str, float]:
    """The figures by which the evidence is judged. Critical failures also of the other types of numbers, whose name their keys then end
    in. Raises Unreportable for a figure that no part measured."""
    ours = [name for name in results.parts if name not in results.others or not results.others[name].model]
    judged = [row for part in ours for row in results.rows(part) if "head_steps" in row]
    found: dict[str, Any] = {name: sum(row[name] for row in judged) for name in ("violations", "head_steps")}
    found |= {name: value for name, value in results.parts["evaluate"]["headline"].items() if name not in found}
    shares = results.parts["catastrophic"]["headline"]
    found |= {f"{name}_catastrophic_accuracy": shares.get(f"{variant}_accuracy") for name, variant in CATASTROPHIC.items()}
    found["bytes_vs_paper_rtol5"] = results.parts["tightness"]["headline"]["bytes_vs_paper_rtol5"]
    missing = [name for name in HEADLINE if found.get(name) is None]
    if missing:
        raise Unreportable(f"no part measured {', '.join(missing)}: evaluate.py needs a context of 8192, rtol2, rtol5 and naive")
    top = {name: found[name] for name in HEADLINE} | {"prompts_rtol2": prompts(results, "evaluate")}
    for dtype, part in results.other_types().items():
        if "critical_failures_rtol2" in results.parts[part]["headline"]:
            top[f"critical_failures_rtol2_{dtype}"] = results.parts[part]["headline"]["critical_failures_rtol2"]
            top[f"prompts_rtol2_{dtype}"] = prompts(results, part)
    return top


def prompts(results: Results, part: str) -> int:
    """Among how many the critical failures at 2 % were counted."""
    return sum(row["examples"] for row in results.rows(part, "task") if row["variant"] == "rtol2")


def write(results: Results, machine: str, folder: Path) -> Path:
    """REPORT.md and figures/ into `folder`, quality__<machine>.json beside the parts; returns the report's path."""
    top = headline(results)
    drawn = figures.draw(results, folder / "figures")
    text = sections.document(results, top, drawn)
    environment = {part: results.parts[part]["environment"] for part in results.parts}
    sources = [
        {"part": part, "file": path.name, "run": results.parts[part].get("run", {}), "headline": results.parts[part]["headline"]}
        for part, path in results.files.items()
    ]
    others = ((path.name, json.loads(path.read_text())["headline"]) for path in results.judged if path not in results.files.values())
    sources += [{"part": "violations", "file": name, "headline": said} for name, said in others]
    target = results.files["violations"].parent / f"quality__{machine}.json"
    target.write_text(json.dumps({"environment": environment, "headline": top, "rows": sources}, indent=1) + "\n")
    path = folder / "REPORT.md"
    path.write_text(text)
    return path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", action="append", help="whose results, the preferred one first (default: this one)")
    options = parser.parse_args(arguments)
    machines = options.machine or [machine_name()]
    try:
        print(write(read(RESULTS, machines), machines[0], HERE))
    except Unreportable as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
