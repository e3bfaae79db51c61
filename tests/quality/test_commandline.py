"""What several commands take is the same in all of them, and what they refuse they refuse in the words of what refuses it."""

import argparse
from collections.abc import Callable
from pathlib import Path

import commandline
import evaluate
import peers
import pytest
import violations
from ledger import WHOLE, Share

RUNS = [evaluate.parse, violations.parse, peers.parse]


@pytest.mark.parametrize("parse", RUNS, ids=lambda parse: str(parse.__module__))
@pytest.mark.parametrize("share", ["x", "0/2", "3/2"])
def test_a_share_that_is_none_is_refused_with_what_is_allowed(
    parse: Callable[[list[str]], argparse.Namespace], share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--share", share])
    assert f"share is '{share}'; allowed: 1/n to n/n" in capsys.readouterr().err


@pytest.mark.parametrize("parse", RUNS, ids=lambda parse: str(parse.__module__))
def test_what_is_given_is_taken_and_the_rest_is_the_small_model_in_one_process(
    parse: Callable[[list[str]], argparse.Namespace], tmp_path: Path
) -> None:
    given = parse(["--model", str(tmp_path), "--share", "2/4", "--minutes", "1.5", "--device", "cpu", "--dtype", "float16"])
    assert (given.model, given.share, given.minutes, given.device, given.dtype) == (tmp_path, Share(2, 4), 1.5, "cpu", "float16")
    default = parse([])
    assert (default.model.name, default.share, default.minutes) == ("byte-llama", WHOLE, None)
    assert default.device is None, "found by the machine"
    assert default.dtype == ("float32" if parse is evaluate.parse else None), "found by the checkpoint, but where rounding is compared"


def test_a_command_names_its_own_ledger() -> None:
    parser = argparse.ArgumentParser()
    commandline.add_run(parser, "mine.jsonl")
    assert parser.parse_args([]).ledger == Path("mine.jsonl")
    assert len({parse([]).ledger for parse in RUNS}) == len(RUNS)
