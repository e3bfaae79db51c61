"""A run that is cut off anywhere goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger import Ledger, Share

IDENTITY = {"model": "m", "contexts": [1, 2]}


def run(path: Path, parts: int, calls: list[int], **options: Any) -> list[dict[str, Any]]:
    ledger = Ledger(path, IDENTITY, **options)
    for part in range(parts):
        ledger.part(str(part), lambda part=part: calls.append(part) or {"square": part * part}, part)
    return [{"key": r["key"], "square": r["square"]} for r in ledger.records]


@given(st.data())
def test_wherever_it_is_cut_each_part_is_done_and_none_that_was_written_again(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("ledger") / "run.jsonl"
    whole = run(path, 5, [], clock=lambda: 0.0)
    text = path.read_text()
    header = text.index("\n") + 1
    cut = data.draw(st.integers(header, len(text)))
    path.write_text(text[:cut])
    again: list[int] = []
    assert run(path, 5, again) == whole
    assert len(again) == 5 - (text[:cut].count("\n") - 1)
    assert [json.loads(line).get("square") for line in path.read_text().splitlines()[1:]] == [0, 1, 4, 9, 16]


def test_a_limit_starts_no_part_after_it_and_the_next_run_goes_on(tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 50))
    calls: list[int] = []
    run(tmp_path / "run.jsonl", 9, calls, minutes=5.0, clock=lambda: float(next(now)))
    assert 0 < len(calls) < 9
    run(tmp_path / "run.jsonl", 9, calls)
    assert calls == list(range(9))


def test_parts_of_another_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    Ledger(tmp_path / "run.jsonl", IDENTITY)
    with pytest.raises(ValueError, match=r"another run.*name another file"):
        Ledger(tmp_path / "run.jsonl", IDENTITY | {"model": "other"})


@given(parts=st.integers(0, 12), count=st.integers(1, 5), missing=st.integers(0, 5))
def test_shares_do_every_part_once_and_the_whole_only_what_they_left(tmp_path_factory: Any, parts: int, count: int, missing: int) -> None:
    path, calls = tmp_path_factory.mktemp("ledger") / "run.jsonl", list[int]()
    for index in range(1, count + 1):
        if index != missing:
            run(path, parts, calls, share=Share(index, count))
    assert len(calls) == len(set(calls)), "two shares did the same part"
    whole = run(path, parts, calls)
    assert sorted(calls) == list(range(parts))
    assert sorted(int(part["key"]) for part in whole) == list(range(parts))


def test_a_share_of_another_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    Ledger(tmp_path / "run.jsonl", IDENTITY | {"model": "other"}, share=Share(2, 3))
    with pytest.raises(ValueError, match=r"run-2of3.*another run"):
        Ledger(tmp_path / "run.jsonl", IDENTITY)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3"])
def test_a_share_is_one_of_n(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: 1/n to n/n"):
        Share.parse(text)
