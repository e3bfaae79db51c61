"""Results of another type of numbers stand beside the headline's and never in their place."""

import json
from pathlib import Path
from typing import Any

import found
import pytest
import report
from test_report import ENVIRONMENT, MACHINE, parts, save

MODEL = "second-0a1b2c3d"
PROMPT = {"task": "cwe", "tokens": 8192, "number": 13}


def also(
    folder: Path, name: str, headline: dict[str, Any], rows: list[dict[str, Any]], dtype: str = "bfloat16", machine: str = MACHINE
) -> None:
    said = {"environment": ENVIRONMENT, "run": {"dtype": f"torch.{dtype}"}, "headline": headline, "rows": rows}
    (folder / f"quality_{name}__{machine}.json").write_text(json.dumps(said))


def written(folder: Path, *machines: str) -> tuple[str, dict[str, Any]]:
    text = report.write(report.read(folder, list(machines) or [MACHINE]), MACHINE, folder).read_text()
    return text, json.loads((folder / f"quality__{MACHINE}.json").read_text())["headline"]


def test_the_other_type_stands_beside_with_how_many_prompts_it_had(tmp_path: Path) -> None:
    save(tmp_path)
    alone, _ = written(tmp_path)
    assert "What rounding does" not in alone
    rows = [row | {"critical_failures": 7, "only_dense_right": 7, "examples": 40} for row in parts()["evaluate"][1][:4]]
    also(tmp_path, "evaluate_bfloat16", {"critical_failures_rtol2": 7}, rows)
    text, top = written(tmp_path)
    assert (top["critical_failures_rtol2"], top["prompts_rtol2"]) == (3, 4)
    assert (top["critical_failures_rtol2_bfloat16"], top["prompts_rtol2_bfloat16"]) == (7, 40)
    assert "of a model that computes in float32; those whose names end" in text
    assert "| float32 | P, 2 cores | rtol2 | 1 | 8192 | 4 | 2 | 0.75 | 0.5 | 3 | 1 | 0.625 |" in text
    assert "| bfloat16 | P, 2 cores | rtol2 | 1 | 8192 | 40 | 2 | 0.75 | 0.5 | 7 | 1 | 0.07031 |" in text
    needles, text_of_types = text.split("## Needles and RULER")[1].split("## Perplexity")[0], text.split("## Perplexity")[1].split("## ")[0]
    for section in (needles, text_of_types):
        assert section.index("the model in float32") < section.index(f"quality_evaluate_bfloat16__{MACHINE}.json")
    assert needles.count("| rtol2 | 40 |") == 1


def test_types_are_also_compared_where_both_have_been_measured(tmp_path: Path) -> None:
    save(tmp_path)
    other = [row | {"tokens": 2048} for row in parts()["evaluate"][1][:3]] + [parts()["evaluate"][1][2]]
    also(tmp_path, "evaluate_bfloat16", {"critical_failures_rtol2": 7}, other)
    text, _ = written(tmp_path)
    first, second = (text.index(title) for title in ("measured in all types:", "All that has been measured:"))
    between, after = text[first:second], text[second : text.index("## ", second) if "## " in text[second:] else None]
    assert "| bfloat16 | P, 2 cores | rtol2 | 1 | 8192 | 4 |" in between and "naive" not in between
    assert "| bfloat16 | P, 2 cores | rtol2 | 1 | 2048, 8192 | 8 |" in after and "| float32 | P, 2 cores | naive |" in after


def test_the_preferred_machine_decides_which_type_is_the_headlines(tmp_path: Path) -> None:
    changed = parts()
    evaluated = changed.pop("evaluate")
    save(tmp_path, changed)
    also(tmp_path, "evaluate_bfloat16", *evaluated)
    also(tmp_path, "evaluate", {"critical_failures_rtol2": 0}, [], "float32", "there")
    text, top = written(tmp_path, MACHINE, "there")
    assert top["critical_failures_rtol2"] == 3 and top["critical_failures_rtol2_float32"] == 0
    assert "computes in bfloat16" in text
    assert report.headline(report.read(tmp_path, [MACHINE]))["critical_failures_rtol2"] == 3


def test_the_place_where_answers_part_is_shown_with_its_margin(tmp_path: Path) -> None:
    save(tmp_path)
    words = {"kind": "margin", "variant": "rtol2", "begins": " s", "dense": "ecret.", "variant_says": "afe."}
    rows = [PROMPT | words | {"dtype": dtype, "margin": margin, "spacing": spacing}
            for dtype, margin, spacing in (("bfloat16", 0.0, 0.0625), ("float32", 0.0016, 1e-6))]  # fmt: skip
    rows += [PROMPT | {"kind": "answer", "dtype": "float32", "variant": name, "answer": "", "score": 0.9} for name in ("dense", "rtol2")]
    also(tmp_path, "margins", {}, rows)
    text, _ = written(tmp_path)
    line = "| cwe, 8192 tokens, 13 | rtol2 | ` s` | `ecret.` | `afe.` | 0 | 0.0625 | 0.0016 | 1e-06 |  | dense 0.9, rtol2 0.9 |"
    assert line in text


@pytest.mark.parametrize("name", ["evaluate_bfloat16", f"violations_{MODEL}"])
def test_a_wrong_certificate_there_stops_the_report_too(name: str, tmp_path: Path) -> None:
    save(tmp_path)
    also(tmp_path, name, {}, [{"kind": "task", "variant": "rtol2", "violations": 1}])
    with pytest.raises(found.Unreportable, match=rf"quality_{name}__here\.json counts 1 violations of rtol2"):
        report.read(tmp_path, [MACHINE])


@pytest.mark.parametrize(
    ("name", "what"),
    [("quality_evaluate__m-1.json", ("evaluate", "", "")), ("quality_evaluate_bfloat16__m-1.json", ("evaluate", "", "bfloat16")),
     ("quality_catastrophic_my_model-0123abcd__m-1.json", ("catastrophic", "my_model-0123abcd", "")),
     ("quality_evaluate_model-0123abcd_float16__m-1.json", ("evaluate", "model-0123abcd", "float16")),
     ("quality__m-1.json", None)],
)  # fmt: skip
def test_a_file_is_what_its_name_says(name: str, what: tuple[str, str, str] | None, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    _, others = found.find(tmp_path, ["m-1"], {})
    assert [file.what for file in others.values()] == ([] if what is None else [what])
