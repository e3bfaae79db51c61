"""The configuration: where values come from, and what is said about wrong ones."""

import os
from pathlib import Path
from typing import Any

import pytest

from tierd.config import EngineConfig, default_target, load, parse_target
from tierd.errors import InvalidArgument


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("TIERD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")


def file(folder: Path, text: str) -> Path:
    path = folder / "tierd.toml"
    path.write_text(text)
    return path


def test_flags_go_before_environment_before_file_before_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, "queue_max = 1\nsessions_max = 1\nworkers_max = 1\nmetrics_port = 9000\n")
    monkeypatch.setenv("TIERD_QUEUE_MAX", "2")
    monkeypatch.setenv("TIERD_SESSIONS_MAX", "2")
    settings = load({"queue_max": 3, "sessions_max": None}, path)
    assert (settings.queue_max, settings.sessions_max, settings.workers_max, settings.batch_rows_max) == (3, 2, 1, 256)
    assert settings.metrics_port == 9000 and load({}).metrics_port is None


def test_the_engine_gets_its_part_and_the_same_defaults() -> None:
    assert load({}).engine() == EngineConfig()
    assert load({"lease_s": 2.5, "scratch_bytes": 0}).engine() == EngineConfig(lease_s=2.5, scratch_bytes=0)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load({}).queue_max = 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("backend", "tpu", "backend: Input should be 'cpu', 'cuda' or 'auto'"),
        ("hot_bytes", 100, "hot_bytes: Input should be greater than or equal to 1048576"),
        ("originals_bytes", -1, "originals_bytes: Input should be greater than or equal to 1048576"),
        ("scratch_bytes", -1, "scratch_bytes: Input should be greater than or equal to 0"),
        ("sessions_max", 0, "sessions_max: Input should be greater than or equal to 1"),
        ("queue_max", "many", "queue_max: Input should be a valid integer"),
        ("queue_max", 0, "queue_max: Input should be greater than or equal to 1"),
        ("batch_rows_max", 0, "batch_rows_max: Input should be greater than or equal to 1"),
        ("max_tokens", 0, "max_tokens: Input should be greater than or equal to 1"),
        ("canary_share", 1.5, "canary_share: Input should be less than or equal to 1"),
        ("canary_share", float("nan"), "canary_share: Input should be"),
        ("lease_s", -1.0, "lease_s: Input should be greater than or equal to 0"),
        ("scratch_key_share", 1.1, "scratch_key_share: Input should be less than or equal to 1"),
        ("tiering_policy", "lru", "tiering_policy: Input should be 'none', 'reactive' or 'predictive'"),
        ("prefetch_candidates_max", 0, "prefetch_candidates_max: Input should be greater than or equal to 1"),
        ("prefetch_link_share", -0.1, "prefetch_link_share: Input should be greater than or equal to 0"),
        ("prefetch_wait_us_max", -1, "prefetch_wait_us_max: Input should be greater than or equal to 0"),
        ("link_bytes_per_s", 0, "link_bytes_per_s: Input should be greater than 0"),
        ("link_bytes_per_s", float("inf"), "link_bytes_per_s: Input should be a finite number"),
        ("migrations_max", -1, "migrations_max: Input should be greater than or equal to 0"),
        ("threads", -1, "threads: Input should be greater than or equal to 0"),
        ("threads", 1 << 20, "threads: Input should be less than or equal to"),
        ("message_bytes_max", 10, "message_bytes_max: Input should be greater than or equal to 65536"),
        ("message_bytes_max", 1 << 31, "message_bytes_max: Input should be less than or equal to 2147483647"),
        ("append_bytes_max", 1 << 20, "settings: Value error, append_bytes_max 1048576 is below message_bytes_max 67108864"),
        ("workers_max", 0, "workers_max: Input should be greater than or equal to 1"),
        ("stream_requests_max", 0, "stream_requests_max: Input should be greater than or equal to 1"),
        ("timeout_s_max", 0.0, "timeout_s_max: Input should be greater than 0"),
        ("grace_s", -0.1, "grace_s: Input should be greater than or equal to 0"),
        ("metrics_port", 65536, "metrics_port: Input should be less than or equal to 65535"),
        ("log_level", "loud", "log_level: Input should be 'debug', 'info', 'warning' or 'error'"),
        ("listen", "nowhere", "listen: Value error, 'nowhere' is neither unix:///path nor host:port"),
        ("colour", "red", "colour: Extra inputs are not permitted"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "file"])
def test_a_wrong_value_is_named(name: str, value: Any, said: str, source: str, tmp_path: Path) -> None:
    text = "nan" if value != value else repr(value)
    with pytest.raises(InvalidArgument) as caught:
        load({name: value}) if source == "flag" else load({}, file(tmp_path, f"{name} = {text}\n"))
    assert str(caught.value).startswith("configuration: ") and said in str(caught.value)


def test_a_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERD_LEASE_S", "soon")
    with pytest.raises(InvalidArgument, match="lease_s: Input should be a valid number"):
        load({})


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument, match=r"queue_max: .*; workers_max: "):
        load({"queue_max": 0, "workers_max": 0})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e12])
@pytest.mark.parametrize("name", ["lease_s", "timeout_s_max", "grace_s"])
def test_durations_are_finite(name: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=f"{name}: "):
        load({name: value})


def test_a_file_must_exist_and_be_toml(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"configuration file .*none\.toml does not exist"):
        load({}, tmp_path / "none.toml")
    with pytest.raises(InvalidArgument, match=r"configuration file .*tierd\.toml: "):
        load({}, file(tmp_path, "queue_max = = 3"))


def test_the_default_socket_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load({}).listen == default_target() == "unix:///run/user/1/tierd.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_target().startswith("unix:///tmp/tierd-") and default_target().endswith("/tierd.sock")


@pytest.mark.parametrize(
    ("target", "meaning"),
    [
        ("unix:///tmp/x.sock", Path("/tmp/x.sock")), ("unix:/tmp/x.sock", Path("/tmp/x.sock")),
        ("127.0.0.1:7400", ("127.0.0.1", 7400)), ("localhost:0", ("127.0.0.1", 0)), ("[::1]:7400", ("::1", 7400)),
        ("127.9.9.9:65535", ("127.9.9.9", 65535)), ("unix:///" + "a" * 106, Path("/" + "a" * 106)),
    ],
)  # fmt: skip
def test_targets(target: str, meaning: Path | tuple[str, int]) -> None:
    assert parse_target(target) == meaning


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("unix://relative.sock", "must be absolute"), ("unix:", "must be absolute"), ("unix:///" + "a" * 107, "at most 107 bytes"),
        ("0.0.0.0:7400", "not a loopback address"), ("example.org:7400", "not a loopback address"), (":7400", "not a loopback address"),
        ("127.0.0.1", "neither"), ("127.0.0.1:", "neither"), ("127.0.0.1:65536", "neither"), ("127.0.0.1:-1", "neither"), ("", "neither"),
    ],
)  # fmt: skip
def test_wrong_targets(target: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_target(target)
    with pytest.raises(InvalidArgument, match=f"listen: .*{said}"):
        load({"listen": target})
