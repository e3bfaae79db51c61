"""Results of another model stand beside those of this repository's, and never in their place."""

import json
from pathlib import Path
from typing import Any

import another
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_beside import MODEL, also, written
from test_report import MACHINE, parts, save

Row = dict[str, Any]
SHARES = st.dictionaries(st.tuples(st.sampled_from(["niah", "vt"]), st.sampled_from(["1024", "8192"])), st.integers(0, 50), max_size=4)
TEXT = st.dictionaries(st.sampled_from(["256", "512", "1024"]), st.integers(1, 9), max_size=3)


def save_log(path: Path, seed: int, share: float, perplexity: float) -> None:
    """A log of two parts: the first one's figures, all 0.25 and 9.0, are not the model's that came of it."""
    lines: list[Row] = [{"event": "start"}, {"step": 50, "loss": 1.0}]
    for shares, text in ((0.25, 9.0), (share, perplexity)):
        lines.append({"event": "exact", "task": "vt", "length": 1024, "of": 50, "share": shares})
        lines += [{"event": "perplexity", "by_context": {"256": text}}, {"event": "end", "seed": seed, "step": 10, "tokens": 99}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "training-log.jsonl"
    save_log(path, 1, 0.75, 2.0)
    monkeypatch.setattr(another, "LOG", path)
    return path


def section(folder: Path) -> str:
    """What the report says of the other model."""
    text, _ = written(folder)
    return text[text.index(f"## Another model: `{MODEL}`") :]


def beside(folder: Path) -> str:
    """Of that, where both models are compared."""
    return section(folder).split("### Beside")[1].split("\n### ")[0]


def test_another_model_has_a_section_and_none_of_the_headline(tmp_path: Path, own_log: Path) -> None:
    save(tmp_path)
    _, before = written(tmp_path)
    evaluated, judged = parts()["evaluate"], parts()["violations"]
    also(tmp_path, f"evaluate_{MODEL}_bfloat16", {"critical_failures_rtol2": 9}, [row | {"examples": 17} for row in evaluated[1][:4]])
    also(tmp_path, f"violations_{MODEL}", {}, [row | {"head_steps": 4321} for row in judged[1]])
    _, after = written(tmp_path)
    assert after == before
    found = section(tmp_path)
    assert "| niah | 8192 | rtol2 | 17 |" in found and "4,321" in found
    assert f"`benchmarks/results/quality_evaluate_{MODEL}_bfloat16__{MACHINE}.json`" in found
    assert "Seed" not in found, "no log of its training is there"


def test_training_stands_beside_the_other_seeds_and_says_where_it_is_worse(tmp_path: Path, own_log: Path) -> None:
    save(tmp_path)
    also(tmp_path, f"violations_{MODEL}", {}, parts()["violations"][1])
    save_log(tmp_path / f"quality_training_{MODEL}.jsonl", 2, 0.5, 2.5)
    found = section(tmp_path)
    assert found.index("Seed 2, 10 steps, 99 bytes") < found.index("Seed 1, 10 steps, 99 bytes")
    assert f"| vt | byte-llama | 0.75 |\n| vt | {MODEL} | 0.5 |" in found
    assert f"| byte-llama | 2 |\n| {MODEL} | 2.5 |" in found
    assert "higher at 1 of 1 (by 0.5 at most) of the contexts, lower at 0 of 1;" in found
    assert "1 of 1 (by 0.25 at most) are lower, 0 of 1 higher." in found


@given(SHARES, SHARES, TEXT, TEXT)
def test_better_and_worse_change_places_with_the_models(own: Row, other: Row, own_text: Row, other_text: Row) -> None:
    sides = []
    for shares, text in ((own, own_text), (other, other_text)):
        exact: dict[str, Row] = {}
        for (task, length), share in shares.items():
            exact.setdefault(task, {})[length] = share
        sides.append({"exact": exact, "perplexity": text})
    there, back = another._worse(*sides), another._worse(*sides[::-1])
    assert there.split("higher at ")[1].split(" of the contexts")[0] == back.split("lower at ")[1].split(";")[0]
    lower = sum(other[at] < own[at] for at in own.keys() & other.keys())
    assert f"answers {lower} of {len(own.keys() & other.keys())}" in there
    assert back.endswith(there.split("answers ")[1].split(" are lower")[0] + " higher.")


def test_what_one_of_them_alone_was_asked_is_not_compared(tmp_path: Path, own_log: Path) -> None:
    save(tmp_path)
    dense, naive, rtol2, _, text, _ = parts()["evaluate"][1]
    more = [rtol2 | {"task": "vt"}, naive | {"task": "vt"}, *(row | {"tokens": 16384} for row in (rtol2, text))]
    also(tmp_path, f"evaluate_{MODEL}", {}, [dense, rtol2, *more, text | {"windows": 7}], "float32")
    found = beside(tmp_path)
    assert (
        found.count("| 8192 | rtol2 | byte-llama | float32 | 1 | 4 |") == 1 == found.count(f"| 8192 | rtol2 | {MODEL} | float32 | 1 | 4 |")
    )
    assert f"| 8192 | rtol5 | {MODEL} | float32 | 7 |" in found and "| 8192 | rtol5 | byte-llama | float32 | 2 |" in found
    assert "naive" not in found and "16384" not in found and "| 8192 | dense |" not in found


def test_tasks_weigh_the_same_and_prompts_are_added_up(tmp_path: Path, own_log: Path) -> None:
    changed = parts()
    rtol2 = changed["evaluate"][1][2]
    changed["evaluate"][1].append(rtol2 | {"task": "vt"})
    save(tmp_path, changed)
    fewer = rtol2 | {"task": "vt", "examples": 2, "dense_score": 0.25, "variant_score": 0.0, "only_dense_right": 0}
    also(tmp_path, f"evaluate_{MODEL}", {}, [rtol2, fewer], "float32")
    assert f"| 8192 | rtol2 | {MODEL} | float32 | 2 | 6 | 4 | 0.5 | 0.25 | 3 | 2 | 1 |" in beside(tmp_path)


def test_each_type_of_this_repositorys_model_is_compared_with(tmp_path: Path, own_log: Path) -> None:
    save(tmp_path)
    tasks = parts()["evaluate"][1][:4]
    also(tmp_path, "evaluate_bfloat16", {"critical_failures_rtol2": 3}, tasks)
    also(tmp_path, f"evaluate_{MODEL}", {}, tasks, "float32")
    found = beside(tmp_path)
    assert found.count(f"beside `benchmarks/results/quality_evaluate_{MODEL}__{MACHINE}.json`:") == 2
    assert "| rtol2 | byte-llama | bfloat16 |" in found and "| rtol2 | byte-llama | float32 |" in found


def test_certificates_of_the_model_are_counted_in_all_its_results(tmp_path: Path, own_log: Path) -> None:
    save(tmp_path)
    row = parts()["violations"][1][0]
    also(tmp_path, f"violations_{MODEL}", {}, [row | {"head_steps": 700, "worst": 0.625}])
    also(tmp_path, f"evaluate_{MODEL}", {}, [row | parts()["evaluate"][1][4] | {"head_steps": 77}], "float32")
    found = beside(tmp_path)
    assert f"In all results of `{MODEL}`: 777 head-steps judged, 0 with the error above the bound." in found
    assert "| rtol1 | byte-llama | P, 2 cores | 1,000 | 0 | 0.5 |" in found
    assert f"| rtol1 | {MODEL} | P, 2 cores | 700 | 0 | 0.625 |" in found
