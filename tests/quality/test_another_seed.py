"""Another seed makes another model, and what is promised of the one that is kept here holds of that one, too."""

import argparse
import json
from pathlib import Path
from typing import Any

import checkpoints
import common
import evaluate
import pytest
import tightness
import tiny
import torch
import traces
import violations
from test_training import run
from training.run import SMOKE, Run

SEED = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    done = run("--smoke", "--out", str(out), "--minutes", "0.3", "--seed", str(SEED))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[0]["seed"] == lines[-1]["seed"] == SEED and lines[-1]["step"] > 0, "nothing was trained"
    return out / "model"


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def headline(results: Path, part: str) -> dict[str, Any]:
    (path,) = results.glob(f"quality_{part}*__*.json")
    found: dict[str, Any] = json.loads(path.read_text())["headline"]
    return found


def first_model(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """What training with this seed starts from."""
    arguments = argparse.Namespace(out=folder, part=(1, 1), minutes=1.0, seed=seed, resume=None)
    training = Run(arguments, SMOKE, print, 0.0)  # type: ignore[arg-type]
    training.stream.close()
    return {name: weight.detach() for name, weight in training.model.named_parameters()}


def test_a_seed_is_a_model_of_its_own(tmp_path: Path) -> None:
    one, two, again = (first_model(tmp_path / str(number), seed) for number, seed in enumerate((1, SEED, 1)))
    assert all(torch.equal(weight, again[name]) for name, weight in one.items())
    random = [name for name, weight in one.items() if weight.ndim == 2 and weight.any()]
    assert len(random) >= 8 and not any(torch.equal(one[name], two[name]) for name in random)


def test_no_certificate_of_its_head_steps_is_wrong(trained: Path, tmp_path: Path, results: Path) -> None:
    arguments = ["--model", str(trained), "--context", "1200", "--head-steps", "20000", "--device", "cpu"]
    assert violations.main([*arguments, "--ledger", str(tmp_path / "violations.jsonl")]) == 0
    found = headline(results, "violations")
    assert found["head_steps"] >= 20000 and found["violations"] == found["broken"] == found["loose_budgets"] == 0


def test_it_is_evaluated_and_its_bounds_are_taken_apart(trained: Path, tmp_path: Path, results: Path) -> None:
    given = ["--model", str(trained), "--device", "cpu"]
    sizes = ["--contexts", "600", "--tasks", "niah_single", "--variants", "rtol5", "--examples", "2", "--batch", "2", "--windows", "1"]
    assert evaluate.main([*given, *sizes, "--ledger", str(tmp_path / "quality.jsonl")]) == 0
    assert headline(results, "evaluate")["violations"] == 0
    assert traces.main([*given, "--context", "600", "--steps", "4", "--out", str(tmp_path / "trace")]) == 0
    assert traces.Trace(tmp_path / "trace").meta.model.startswith("model-")
    assert tightness.main([str(tmp_path / "trace"), "--steps", "2"]) == 0
    assert headline(results, "tightness")["bytes_vs_paper_rtol5"] > 0.0


def test_models_in_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) / "model" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        tiny.build(seed=seed).save_pretrained(folder)
    names = [checkpoints.load(folder, "cpu").name for folder in (*folders, folders[0])]
    assert names[0] != names[1] and names[0] == names[2] and all(name.startswith("model-") for name in names)
    assert checkpoints.load(folders[0], "cpu", "bfloat16").name == names[0], "in another type it is the same model"
    arguments = ["--device", "cpu", "--context", "600", "--minutes", "0", "--share", "1/2", "--ledger", str(tmp_path / "run.jsonl")]
    violations.main(["--model", str(folders[0]), *arguments])
    with pytest.raises(ValueError, match="another run"):
        violations.main(["--model", str(folders[1]), *arguments])
    assert checkpoints.load(checkpoints.SMALL, "cpu").name == "byte-llama"
