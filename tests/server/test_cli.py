"""The command line: what configures the daemon, in which order, and what a mistake says."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess, Worker

from tierd.cli import main
from tierd.config import Settings


def config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["config", *arguments]) == 0
    return tomllib.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return code, err


def test_flags_go_before_environment_before_file_before_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tierd.toml"
    file.write_text('queue_max = 11\nsessions_max = 12\nworkers_max = 13\nlog_level = "error"\n')
    monkeypatch.setenv("TIERD_QUEUE_MAX", "21")
    monkeypatch.setenv("TIERD_SESSIONS_MAX", "22")
    values = config(capsys, "--config", str(file), "--queue-max", "31")
    assert [values[name] for name in ("queue_max", "sessions_max", "workers_max", "log_level")] == [31, 22, 13, "error"]
    assert values["batch_rows_max"] == Settings.model_fields["batch_rows_max"].default


def test_what_config_prints_configures_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = config(capsys, "--canary-share", "0.25", "--metrics-port", "9", "--listen", "unix:///run/a \"b\"/t.sock")
    assert (first["canary_share"], first["metrics_port"], first["listen"]) == (0.25, 9, 'unix:///run/a "b"/t.sock')
    assert set(first) == set(Settings.model_fields)
    main(["config", "--canary-share", "0.25", "--metrics-port", "9", "--listen", "unix:///run/a \"b\"/t.sock"])
    file = tmp_path / "tierd.toml"
    file.write_text(capsys.readouterr().out)
    assert config(capsys, "--config", str(file)) == first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--queue-max", "0"], "queue_max: Input should be greater than or equal to 1"),
        (["--queue-max", "many"], "queue_max: Input should be a valid integer"),
        (["--backend", "tpu"], "backend: Input should be 'cpu', 'cuda' or 'auto'"),
        (["--listen", "0.0.0.0:7400"], "'0.0.0.0' is not a loopback address; allowed: 127.0.0.1"),
        (["--listen", "somewhere"], "neither unix:///path nor host:port"),
        (["--listen", "unix://relative.sock"], "must be absolute"),
        (["--append-bytes-max", "1048576"], "append_bytes_max 1048576 is below message_bytes_max"),
        (["--config", "/nonexistent.toml"], "/nonexistent.toml does not exist"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    for command in ("serve", "config"):
        code, said = failure(capsys, command, *arguments)
        assert code == 2
        assert text in said


@pytest.mark.parametrize("content", ["queue_max = \n", "que_max = 3\n"])
def test_a_wrong_file_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "tierd.toml"
    file.write_text(content)
    assert failure(capsys, "config", "--config", str(file))[0] == 2


def test_status_for_programs_and_for_people(capsys: pytest.CaptureFixture[str], daemon: DaemonProcess, worker: Worker) -> None:
    worker.open()
    assert main(["status", "--listen", daemon.target, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["sessions"] == 1
    assert status["epoch"] == worker.hello.epoch
    assert main(["status", "--listen", daemon.target]) == 0
    table = capsys.readouterr().out
    assert worker.hello.epoch in table
    assert "pool originals" in table
    assert "8,388,608" in table
    assert "predictive" in table


def test_status_without_a_daemon_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, said = failure(capsys, "status", "--listen", f"unix://{folder}/t.sock")
    assert code == 1
    assert "no answer from a daemon" in said
