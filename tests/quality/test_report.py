"""The report says what the results say, and nothing at all where a certificate was wrong or a part is missing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import report
from tables import number

MACHINE = "here"
ENVIRONMENT = {"processor": "P", "cores": 2, "torch": "2"}
COMPARED = {
    "examples": 4, "dense_score": 0.75, "variant_score": 0.5, "delta": -0.25, "delta_low": -0.75, "delta_high": 0.0, "mcnemar_p": 1.0,
    "critical_failures": 3, "only_dense_right": 3, "only_variant_right": 1, "differing": 2,
}  # fmt: skip
JUDGED = {"head_steps": 1000, "violations": 0, "broken": 0, "loose_budgets": 0, "exact": 10, "worst": 0.5, "seconds": 2.0}


def parts() -> dict[str, tuple[dict[str, float], list[dict[str, Any]]]]:
    task = {"kind": "task", "task": "niah", "tokens": 8192, "answers": 8, "host_bytes": 16, "rungs": [1, 2, 3, 1, 1], **COMPARED}
    tasks = [task | {"variant": name} for name in ("dense", "naive", "rtol2", "rtol5")]
    text = {
        "kind": "perplexity", "tokens": 8192, "variant": "rtol5", "windows": 2, "tokens_scored": 99, "variant_perplexity": 3.5,
        "delta": 0.0, "delta_low": 0.0, "delta_high": 0.0, **JUDGED,
    }  # fmt: skip
    depth = {"kind": "depth", "task": "niah", "tokens": 8192, "variant": "rtol5", "depth": 0.5, "score": 0.625}
    evaluated = {"niah_delta_8k_rtol5": -0.25, "ruler_delta_8k_rtol5": 0.0, "critical_failures_rtol2": 3, "ppl_delta_rtol5": 0.0}
    accuracies = {"naive_accuracy": 0.125, "rtol2_accuracy": 0.875, "rtol5_accuracy": 0.75, "dense_accuracy": 0.9}
    ratio = {"kind": "ratio", "layer": 0, "head": 0, "error_over_vbar_p50": 0.01, "ours_bound_over_vbar_p50": 0.1}
    ratio |= {"paper_bound_over_vbar_p50": 1.0} | {f"{who}_{q}": 0.2 for who in ("ours", "paper") for q in ("p10", "p50", "p90", "max")}
    cost = {"kind": "cost", "rtol": 0.05, "host_bytes": 4096.0, "key_blocks": 1.5, "value_blocks": 0.5}
    term = {"kind": "term", "term": "T1", "needs": "nothing", "decides_share": 0.5, "gain_p50": 1.0, "gain_p90": 2.0, "gain_max": 3.0}
    tight = [
        ratio, term, cost | {"policy": "budget"}, cost | {"policy": "coverage"}, {"kind": "norm", "layer": 0, "head": 0, "share": 0.25},
        {"kind": "point", "error": 0.01, "ours": 0.1, "paper": 1e300}, {"kind": "microseconds", "what": "bounds", "p50": 9.0},
        {"kind": "trace", "source": "text", "model": "m", "dtype": "float16", "prefill": 10, "steps": 3},
    ]  # fmt: skip
    peer = {"peer": "dense", "tokens": 8192, "device_bytes": 2**20, "host_bytes": 0, "task_scores": {"vt": 0.625}} | COMPARED
    measured = peer | {"tokens": 16384, "peak_bytes": 3 * 2**20, "p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0}
    return {
        "evaluate": (evaluated, [*tasks, text, depth]),
        "catastrophic": (accuracies, [*tasks, text]),
        "violations": ({}, [JUDGED | {"variant": "rtol1"}]),
        "tightness": ({"bytes_vs_paper_rtol5": 12.5}, tight),
        "peers": ({}, [peer, measured, {"peer": "offloaded", "tokens": 8192, "missing": "there is no GPU"}]),
    }


def save(folder: Path, changed: dict[str, tuple[dict[str, float], list[dict[str, Any]]]] | None = None, machine: str = MACHINE) -> None:
    for part, (headline, rows) in (parts() if changed is None else changed).items():
        written = {"environment": ENVIRONMENT, "run": {"dtype": "torch.float32"}, "headline": headline, "rows": rows}
        (folder / f"quality_{part}__{machine}.json").write_text(json.dumps(written))


def test_every_number_of_the_report_is_in_a_result(tmp_path: Path) -> None:
    save(tmp_path)
    path = report.write(report.read(tmp_path, ["other", MACHINE]), MACHINE, tmp_path)
    text = path.read_text()
    for name in re.findall(r"\]\((figures/\w+\.png)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert text.count("](figures/") == 4
    assert "Not run: offloaded at 8192 tokens, because there is no GPU." in text
    assert "| dense | 8192 | 1.00 |  | 0.00 |  | 4 | 0.5 | vt 0.625 |" in text, "neither timed nor on a GPU"
    assert "| dense | 16384 | 1.00 | 3.00 | 0.00 | 2.00 (1.00 to 3.00) | 4 | 0.5 | vt 0.625 |" in text
    assert "| `head_steps` | 3,000 |" in text and "25.0% of the head-steps" in text and "| 12.5 |" in text
    top = json.loads((tmp_path / f"quality__{MACHINE}.json").read_text())["headline"]
    assert top == {
        "violations": 0, "head_steps": 3000, "niah_delta_8k_rtol5": -0.25, "ruler_delta_8k_rtol5": 0.0, "critical_failures_rtol2": 3,
        "ppl_delta_rtol5": 0.0, "bytes_vs_paper_rtol5": 12.5, "naive_catastrophic_accuracy": 0.125,
        "certified_catastrophic_accuracy": 0.875, "certified_rtol5_catastrophic_accuracy": 0.75, "dense_catastrophic_accuracy": 0.9,
        "prompts_rtol2": 4,
    }  # fmt: skip


@pytest.mark.parametrize("part", report.MADE_BY)
def test_a_part_that_is_missing_is_named_with_what_makes_it(part: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / f"quality_{part}__{MACHINE}.json").unlink()
    with pytest.raises(report.Unreportable, match=rf"quality_{part}__here\.json is in .*{report.MADE_BY[part]} makes it"):
        report.read(tmp_path, [MACHINE])


@pytest.mark.parametrize(("part", "field"), [("violations", "violations"), ("violations", "broken"), ("evaluate", "violations"),
                                             ("evaluate", "over_budget"), ("catastrophic", "over_budget")])  # fmt: skip
def test_one_wrong_certificate_anywhere_and_nothing_is_reported(
    part: str, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = parts()
    changed[part][1][-1][field] = 1
    save(tmp_path, changed)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.main(["--machine", MACHINE]) == 1
    assert f"counts 1 {field}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"quality_{name}__{MACHINE}.json" for name in changed)


def test_certificates_are_counted_on_every_machine(tmp_path: Path) -> None:
    save(tmp_path)
    results = report.read(tmp_path, [MACHINE])
    other = tmp_path / "quality_violations__there.json"
    row = JUDGED | {"variant": "rtol2", "head_steps": 77}
    other.write_text(json.dumps({"environment": ENVIRONMENT | {"gpu": {"name": "G"}}, "headline": {"head_steps": 77}, "rows": [row]}))
    both = report.read(tmp_path, [MACHINE, "there"])
    assert report.headline(both)["head_steps"] == report.headline(results)["head_steps"] + 77
    text = report.write(both, MACHINE, tmp_path).read_text()
    assert f"`benchmarks/results/{other.name}`" in text and "| G | rtol2 | 77 |" in text and "| P, 2 cores | rtol1 | 1,000 |" in text
    rows = json.loads((tmp_path / f"quality__{MACHINE}.json").read_text())["rows"]
    assert [line["headline"] for line in rows if line["file"] == other.name] == [{"head_steps": 77}]
    other.write_text(json.dumps({"environment": ENVIRONMENT, "headline": {}, "rows": [row | {"violations": 1}]}))
    assert report.read(tmp_path, [MACHINE])
    with pytest.raises(report.Unreportable, match=r"violations__there\.json counts 1 violations of rtol2"):
        report.read(tmp_path, [MACHINE, "there"])


def test_a_run_that_judged_nothing_proves_nothing(tmp_path: Path) -> None:
    save(tmp_path, parts() | {"violations": ({}, [])})
    with pytest.raises(report.Unreportable, match="judged no head-step"):
        report.read(tmp_path, [MACHINE])


def test_a_figure_that_nothing_measured_is_named(tmp_path: Path) -> None:
    changed = parts()
    del changed["evaluate"][0]["ppl_delta_rtol5"]
    save(tmp_path, changed)
    with pytest.raises(report.Unreportable, match="no part measured ppl_delta_rtol5"):
        report.headline(report.read(tmp_path, [MACHINE]))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (12_345_678, "12,345,678"), (0.00123456, "0.001235"), (123456.7, "123,457"), (1e300, "1e+300"), (7.0, "7")],
)
def test_numbers_are_readable(value: float | None, text: str) -> None:
    assert number(value) == text
