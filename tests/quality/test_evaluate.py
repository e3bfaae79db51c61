"""The commands, at a size that takes seconds: they resume, they count, and they say when something is wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import common
import evaluate
import pytest
import summarise
import tiny
import traces
import truth
import violations
from ledger import Ledger

ARGUMENTS = ["--contexts", "1200", "--tasks", "niah", "niah_multiquery", "--variants", "naive", "rtol5", "--examples", "3", "--batch", "2",
             "--windows", "1", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def rows(results: Path, part: str) -> Any:
    (path,) = results.glob(f"quality_{part}_tiny-*__*.json")
    found = json.loads(path.read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found["rows"]], found["headline"]


def test_an_evaluation_cut_again_and_again_comes_to_the_same(
    checkpoint: Path, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", str(checkpoint), *ARGUMENTS]
    assert evaluate.main([*arguments, "--ledger", str(tmp_path / "whole.jsonl")]) == 0
    whole = rows(results, "evaluate")
    inner, done = Ledger.part, []

    def five_at_most(self: Ledger, key: str, compute: Any, group: int = 0) -> bool:
        if key not in self._done and len(self._done) - done[-1] >= 5:
            return False
        return inner(self, key, compute, group)

    monkeypatch.setattr(Ledger, "part", five_at_most)
    ended = []
    for _ in range(4):
        path = tmp_path / "cut.jsonl"
        done.append(len(path.read_text().splitlines()) - 1 if path.exists() else 0)
        ended.append(evaluate.main([*arguments, "--ledger", str(path)]))
    assert ended == [3, 3, 0, 0]
    assert rows(results, "evaluate") == whole
    kinds = [(row["kind"], row.get("task"), row["variant"]) for row in whole[0] if row["kind"] != "depth"]
    assert len(kinds) == len(set(kinds)) == 3 + 2 * 3
    assert all(row["examples"] == 3 and len(row["scores"]) == 3 for row in whole[0] if row["kind"] == "task")
    assert whole[1]["violations"] == 0 and whole[1]["head_steps"] == (1200 - 1 - 256) * 2 * 4
    for share in ("1/2", "2/2"):
        assert evaluate.main([*arguments, "--ledger", str(tmp_path / "shared.jsonl"), "--share", share]) == 0
    assert evaluate.main([*arguments, "--ledger", str(tmp_path / "shared.jsonl"), "--minutes", "0"]) == 0
    assert rows(results, "evaluate")[1] == whole[1]


def test_the_rescaled_model_is_another_evaluation(checkpoint: Path, tmp_path: Path, results: Path) -> None:
    arguments = ["--model", str(checkpoint), "--contexts", "1200", "--tasks", "niah", "--variants", "naive", "--examples", "1",
                 "--windows", "1", "--device", "cpu", "--ledger", str(tmp_path / "run.jsonl")]  # fmt: skip
    assert evaluate.main(arguments) == 0
    with pytest.raises(ValueError, match="another run"):
        evaluate.main([*arguments, "--catastrophic"])
    assert evaluate.main([*arguments[:-1], str(tmp_path / "other.jsonl"), "--catastrophic"]) == 0
    (plain, _), (rescaled, _) = rows(results, "evaluate"), rows(results, "catastrophic")
    text = [{row["variant"]: row["variant_perplexity"] for row in side if row["kind"] == "perplexity"} for side in (plain, rescaled)]
    dense, naive = ([side[name] for side in text] for name in ("dense", "naive"))
    assert dense[0] == pytest.approx(dense[1], rel=1e-6) and naive[0] != naive[1]


def test_only_what_is_done_for_dense_too_is_compared() -> None:
    def part(variant: str, numbers: list[int], scores: list[float]) -> dict[str, Any]:
        return {"kind": "task", "task": "niah", "tokens": 8192, "variant": variant, "numbers": numbers, "scores": scores,
                "completions": [f"{variant} {i}" for i in numbers], "depths": [0.0] * len(numbers), "seconds": 1.0}  # fmt: skip

    records = [part("dense", [0, 1], [1.0, 1.0]), part("rtol5", [1], [0.5]), part("rtol2", [1, 0], [0.5, 1.0])]
    found = {row["variant"]: row for row in summarise.summarise(records) if row["kind"] == "task"}
    assert (found["rtol5"]["examples"], found["rtol5"]["delta"], found["rtol5"]["critical_failures"]) == (1, -0.5, 1)
    assert found["rtol2"]["scores"] == [1.0, 0.5]
    assert found["rtol2"]["failures"] == [{"number": 1, "dense": "dense 1", "variant": "rtol2 1"}] and not found["dense"]["failures"]
    assert [found[name]["differing"] for name in ("dense", "rtol5", "rtol2")] == [0, 1, 2]
    top = summarise.headline(list(found.values()))
    assert top["niah_delta_8k_rtol5"] == -0.5 and top["critical_failures_rtol2"] == 1 and "ppl_delta_rtol5" not in top


def test_violations_are_counted_and_end_the_command_with_an_error(
    checkpoint: Path, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", str(checkpoint), "--context", "1200", "--head-steps", "12000", "--device", "cpu", "--ledger"]
    assert violations.main([*arguments, str(tmp_path / "honest.jsonl")]) == 0
    found, top = rows(results, "violations")
    assert {row["variant"] for row in found} == {"coverage", "rtol1", "rtol2", "rtol5", "rtol10"}
    assert top["head_steps"] == sum(row["head_steps"] for row in found) >= 12000 and top["violations"] == 0
    inner = truth.judge
    import running

    def halved(*arguments: Any) -> Any:
        q, k, v, scale, output, certificate, rtol = arguments
        return inner(q, k, v, scale, output, dataclasses.replace(certificate, bound=0.5 * certificate.bound), rtol)

    monkeypatch.setattr(running, "judge", halved)
    assert violations.main([*arguments, str(tmp_path / "halved.jsonl")]) == 1
    assert rows(results, "violations")[1]["violations"] > 0


@pytest.mark.parametrize("command", [evaluate, violations], ids=lambda command: str(command.__name__))
def test_what_was_read_of_another_text_is_another_run(checkpoint: Path, tmp_path: Path, command: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Of each part that is done, a line. " * 100)
    arguments = ["--model", str(checkpoint), "--device", "cpu", "--minutes", "0", "--share", "1/2", "--ledger", str(tmp_path / "run.jsonl")]
    contexts = ["--windows", "0"] if command is evaluate else ["--context", "1200"]
    command.main([*arguments, *contexts])
    with pytest.raises(ValueError, match=r"another run.*text\.txt"):
        command.main([*arguments, *contexts, "--text", str(text)])


def test_a_trace_is_recorded_by_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in ([], ["--task", "niah"]):
        out = tmp_path / f"trace{len(source)}"
        arguments = ["--model", str(checkpoint), "--context", "1200", "--steps", "3", "--device", "cpu", "--out", str(out)]
        assert traces.main([*arguments, *source]) == 0
        trace = traces.Trace(out)
        assert trace.layer(1)["queries"].shape == (3, 4, 64)
        assert trace.meta.prefill == 1200 if not source else 900 < trace.meta.prefill < 1200
    assert "3 steps of 2 layers after 1200 tokens" in capsys.readouterr().out
