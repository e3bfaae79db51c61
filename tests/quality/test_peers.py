"""Peers answer the same prompts as dense attention; who cannot run is named; times are of a process alone, shares score."""

import contextlib
import json
from pathlib import Path
from typing import Any

import caches
import common
import peers
import pytest
import tiny
import torch

ARGUMENTS = ["--contexts", "1200", "--tasks", "niah", "vt", "--examples", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(caches.importlib.util, "find_spec", lambda name: None)  # quanto compiles for half a minute when first used
    monkeypatch.setattr(peers, "TIMED", 1)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def rows(results: Path) -> list[dict[str, Any]]:
    (path,) = results.glob("quality_peers*__*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_shares_score_and_the_process_alone_times(checkpoint: Path, tmp_path: Path, results: Path) -> None:
    arguments = ["--model", str(checkpoint), *ARGUMENTS, "--ledger", str(tmp_path / "peers.jsonl")]
    for share in ("1/2", "2/2"):
        assert peers.main([*arguments, "--share", share]) == 0
    assert not results.exists() and not (tmp_path / "peers.jsonl").exists()
    shared = [records(tmp_path / f"peers-{share}of2.jsonl") for share in (1, 2)]
    assert all(len(part) == 2 * 3 and {line["kind"] for line in part} == {"score"} for part in shared)
    assert peers.main(arguments) == 0
    assert [line["kind"] for line in records(tmp_path / "peers.jsonl")] == ["time"] * 3
    found = {row["peer"]: row for row in rows(results)}
    assert found.keys() == {"dense", "offloaded", "QuantizedCache int4", "QuantizedCache int2", *caches.OURS}
    assert found["QuantizedCache int4"]["missing"] == "optimum-quanto is not installed"
    assert found["offloaded"]["missing"] == "offloading needs a GPU"
    for name in ("dense", *caches.OURS):
        row = found[name]
        assert row["examples"] == 6 and row["over_budget"] == 0 and row["task_scores"].keys() == {"niah", "vt"}
        assert 0.0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["timed"] > 20
    # Two layers of two KV heads: 512 bytes a token, head and layer in FP32, keys and values; when quantised 9.5 bits a number at most.
    assert 900 * 2 * 2 * 512 < found["dense"]["device_bytes"] <= 1234 * 2 * 2 * 512
    assert found["rtol5"]["device_bytes"] < 0.35 * found["dense"]["device_bytes"]
    assert found["rtol5"]["host_bytes"] > 0.9 * found["dense"]["device_bytes"]


def test_each_prompt_is_answered_once_before_its_tokens_are_timed(
    checkpoint: Path, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, asked = peers.complete, list[tuple[str, bool]]()

    def complete(*arguments: Any) -> Any:
        asked.append((arguments[2][0], len(arguments) == 5))
        return inner(*arguments)

    monkeypatch.setattr(peers, "complete", complete)
    arguments = ["--model", str(checkpoint), *ARGUMENTS, "--examples", "0", "--ledger", str(tmp_path / "peers.jsonl")]
    assert peers.main(arguments) == 0
    assert len(asked) == 3 * 2 * 2, "three peers, two tasks"
    for (first, metered), (second, again) in zip(asked[::2], asked[1::2], strict=True):
        assert first == second and not metered and again


def test_a_peer_that_must_be_alone_is_scored_by_the_process_that_runs_alone() -> None:
    able = [caches.Peer("dense", lambda *_: contextlib.nullcontext()), caches.Peer("shy", lambda *_: contextlib.nullcontext(), alone=True)]

    def keys(*share: str) -> list[str]:
        options = peers.parse(["--contexts", "8192", "--tasks", "vt", "--examples", "2", *share])
        return [key for _, key, _ in peers.parts(options, None, able)]  # type: ignore[arg-type]

    assert keys("--share", "1/2") == ["score/8192/vt/0/dense"]
    assert keys() == ["score/8192/vt/0/dense", "score/8192/vt/0/shy", "time/8192/dense", "time/8192/shy"]


@pytest.mark.parametrize(("held", "peak"), [({"cuda": 20}, 38), ({"cuda": 5, "cpu": 15}, 23), ({"hot": 30, "originals": 40}, 48)])
def test_the_peak_is_the_caches_alone(held: dict[str, int], peak: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """132 bytes are allocated after the prefill, and 150 at most; what of the 132 is not the cache's has no part in the peak."""
    allocated = iter([132])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 150)
    monkeypatch.setattr(caches, "held_bytes", lambda cache: dict(held))
    meter = caches.Meter(lambda *_: contextlib.nullcontext(object()), torch.device("cuda"))
    with meter.attend(1, (0,)):
        for _ in range(3):
            meter.tick()
    assert meter.largest() == held | {"peak": peak} and len(meter.seconds) == 2


def test_only_what_dense_answered_is_compared_and_the_most_memory_counts() -> None:
    def part(peer: str, task: str, numbers: list[int], scores: list[float], **held: int) -> dict[str, Any]:
        place = {"kind": "score", "peer": peer, "tokens": 8192, "task": task, "numbers": numbers, "scores": scores}
        return place | {"held_bytes": held, "over_budget": 0}

    found = [
        part("dense", "niah", [0, 1], [1.0, 1.0], cuda=100, peak=300),
        part("dense", "vt", [0, 1], [1.0, 0.5], cuda=120, peak=200),
        part("offloaded", "niah", [0, 1], [1.0, 0.0], cuda=10, cpu=90, peak=50),
        part("offloaded", "vt", [2, 3], [0.0, 0.0], cuda=9, cpu=99, peak=40),
        part("rtol5", "vt", [1, 0], [0.75, 1.0], hot=30, originals=120, peak=60),
        part("rtol2", "vt", [9], [1.0], hot=1, originals=1, peak=1),
        {"kind": "time", "peer": "rtol5", "tokens": 8192, "timed": 7, "p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0},
    ]
    dense, offloaded, ours = peers.rows_of(found, "cuda")
    assert [row["peer"] for row in (dense, offloaded, ours)] == ["dense", "offloaded", "rtol5"]
    assert (dense["device_bytes"], dense["host_bytes"], dense["peak_bytes"], dense["delta"]) == (120, 0, 300, 0.0)
    assert (offloaded["device_bytes"], offloaded["host_bytes"], offloaded["peak_bytes"]) == (10, 99, 50)
    assert (offloaded["examples"], offloaded["delta"], offloaded["critical_failures"]) == (2, -0.5, 1)
    assert (ours["device_bytes"], ours["host_bytes"], ours["task_scores"], ours["delta"]) == (30, 120, {"vt": 0.875}, 0.125)
    assert (ours["timed"], ours["p50_ms"]) == (7, 2.0) and "p50_ms" not in dense
