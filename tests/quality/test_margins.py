"""Where two answers part, and by what margin: against logits of the whole text at once."""

import json
from pathlib import Path
from typing import Any

import common
import evaluate
import margins
import pytest
import tasks
import tiny
import torch
from checkpoints import Bytes
from vocabulary import END

TOKENS = 600
DENSE = " 1234567."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def result(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An evaluation of one prompt, told that it was answered otherwise by the variant, and nothing by "naive"."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    arguments = ["--model", str(checkpoint), "--contexts", str(TOKENS), "--tasks", "niah_single", "--variants", "rtol2", "naive"]
    arguments += ["--examples", "1", "--windows", "0", "--device", "cpu", "--seed", "4", "--ledger", str(tmp_path / "quality.jsonl")]
    assert evaluate.main(arguments) == 0
    (path,) = tmp_path.glob("quality_evaluate_tiny-*.json")
    said = json.loads(path.read_text())
    for row in said["rows"]:
        row["failures"] = [{"number": 0, "dense": DENSE, "variant": " 1234"}] if row["variant"] == "rtol2" else []
    path.write_text(json.dumps(said))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("quality_margins_tiny-*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


def test_the_margin_is_that_of_the_bytes_at_which_answers_part(checkpoint: Path, result: Path, tmp_path: Path) -> None:
    given = [str(result), "--model", str(checkpoint), "--device", "cpu", "--ledger", str(tmp_path / "margins.jsonl")]
    assert margins.main([*given, "--minutes", "0"]) == 3
    assert margins.main(given) == 0
    rows = rows_of(tmp_path)
    found = {row["dtype"]: row for row in rows if row["kind"] == "margin"}
    assert len(found) == 2 and all((row["begins"], row["dense"], row["variant_says"]) == (" 1234", "567.", "") for row in found.values())
    prompt = tasks.example("niah_single", TOKENS, len, 4).prompt + " 1234"
    logits = tiny.build()(torch.tensor([Bytes().encode(prompt)])).logits[0, -1]
    margin = float(logits[ord("5")] - logits[END])
    assert found["float32"]["margin"] == pytest.approx(margin, rel=1e-3, abs=1e-4)
    assert found["bfloat16"]["margin"] == pytest.approx(margin, abs=8 * found["bfloat16"]["spacing"])
    top = max(float(logits[ord("5")]), float(logits[END]), key=abs)
    assert found["bfloat16"]["spacing"] / 2 <= abs(top) * 2**-8 * 2 <= found["bfloat16"]["spacing"] * 2
    answered = {(row["dtype"], row["variant"]) for row in rows if row["kind"] == "answer"}
    assert answered == {(dtype, variant) for dtype in margins.DTYPES for variant in margins.ANSWERED}


def test_of_a_variant_without_failures_there_is_nothing(checkpoint: Path, result: Path, tmp_path: Path) -> None:
    given = [str(result), "--model", str(checkpoint), "--device", "cpu", "--ledger", str(tmp_path / "margins.jsonl")]
    assert margins.main([*given, "--variants", "naive"]) == 0
    assert rows_of(tmp_path) == []


def test_another_model_than_the_results_is_refused(result: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is of the model tiny-.*, and byte-llama was given"):
        margins.main([str(result), "--device", "cpu", "--ledger", str(tmp_path / "margins.jsonl")])
