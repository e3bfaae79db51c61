"""Settings of the daemon: one schema, read from flags, then `TIERD_*` environment, then a TOML file, then the defaults below.

Sizes are bytes, durations seconds, unless a name says otherwise. Every queue, pool and message has a limit here.
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from tierd.errors import InvalidArgument

GIB = 1 << 30
MIB = 1 << 20
CORES = len(os.sched_getaffinity(0))
DAY_S = 86400.0  # no wait is longer: threads cannot wait for ever by number


@dataclass(frozen=True)
class EngineConfig:
    """What the engine needs to know; all of it is fixed at start."""

    backend: str = "cpu"
    hot_bytes: int = GIB  # quantised blocks
    originals_bytes: int = 2 * GIB  # blocks in the model's own type
    scratch_bytes: int = 256 * MIB  # copies of originals near the kernels
    sessions_max: int = 1024
    queue_max: int = 4096  # commands waiting
    batch_rows_max: int = 256  # attend rows in one launch
    max_tokens: int = 1 << 20  # the most one session may ask for
    canary_share: float = 1e-3  # part of the full blocks re-scored from originals in each call
    lease_s: float = 0.0  # a session without a call for this long is closed; 0: never
    scratch_key_share: float = 0.5  # of scratch_bytes; values get the rest
    tiering_policy: str = "predictive"
    prefetch_candidates_max: int = 32  # of each layer, KV head and kind, that the policy looks at after a call
    prefetch_link_share: float = 0.5  # of the host link
    prefetch_wait_us_max: float = 20.0  # a gather of 64 blocks of 4 KB takes 14 us on an H200
    link_bytes_per_s: float = 50e9  # a gather of random 4 KB blocks from pinned memory, PCIe 5
    migrations_max: int = 256  # records on their way to the scratch cache at once
    threads: int = 0  # of the CPU backend's kernels; 0: one a core


class Settings(BaseSettings):
    """The effective configuration. Raises pydantic.ValidationError naming the field; `load` turns it into InvalidArgument."""

    model_config = SettingsConfigDict(env_prefix="TIERD_", extra="forbid", frozen=True)

    listen: str = Field(default_factory=lambda: default_target(), description="unix:///path, or a loopback host:port (port 0: any)")
    backend: Literal["cpu", "cuda", "auto"] = Field("cpu", description="cpu, cuda, or auto: cuda where it can start, else cpu")
    hot_bytes: int = Field(GIB, ge=MIB, description="pool of quantised blocks, bytes")
    originals_bytes: int = Field(2 * GIB, ge=MIB, description="pool of originals, bytes")
    scratch_bytes: int = Field(256 * MIB, ge=0, description="scratch cache of originals, bytes")
    sessions_max: int = Field(1024, ge=1, description="sessions open at once")
    queue_max: int = Field(4096, ge=1, description="commands waiting for the engine")
    batch_rows_max: int = Field(256, ge=1, description="attend rows in one launch")
    max_tokens: int = Field(1 << 20, ge=1, description="the most tokens one session may ask for")
    canary_share: float = Field(1e-3, ge=0.0, le=1.0, description="share of blocks re-scored from originals in each call")
    lease_s: float = Field(0.0, ge=0.0, le=DAY_S, description="close a session unused for this long, seconds (0: never)")
    scratch_key_share: float = Field(0.5, ge=0.0, le=1.0, description="share of the scratch cache that holds keys; values get the rest")
    tiering_policy: Literal["none", "reactive", "predictive"] = Field("predictive", description="what gets a copy in scratch, what goes")
    prefetch_candidates_max: int = Field(32, ge=1, le=4096, description="blocks a layer, KV head and kind that the policy looks at")
    prefetch_link_share: float = Field(0.5, ge=0.0, le=1.0, description="most of the host link that copies ahead of need may take")
    prefetch_wait_us_max: float = Field(20.0, ge=0.0, le=1e6, description="how long a call waits for copies under way, microseconds")
    link_bytes_per_s: float = Field(50e9, gt=0.0, allow_inf_nan=False, description="what the host link carries, bytes a second")
    migrations_max: int = Field(256, ge=0, description="records on their way to the scratch cache at once (0: no copies)")
    threads: int = Field(0, ge=0, le=CORES, description="threads of the CPU backend's kernels (0: one a core)")
    message_bytes_max: int = Field(64 * MIB, ge=64 << 10, le=(1 << 31) - 1, description="one message, bytes")
    append_bytes_max: int = Field(2 * GIB, ge=MIB, description="appends being received at once, all workers, bytes")
    workers_max: int = Field(64, ge=1, description="workers connected at once")
    stream_requests_max: int = Field(256, ge=1, description="requests in flight on one worker's stream")
    timeout_s_max: float = Field(600.0, gt=0.0, le=DAY_S, description="the longest deadline a call may ask for, seconds")
    grace_s: float = Field(30.0, ge=0.0, le=DAY_S, description="how long a stop waits for calls in flight, seconds")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="Prometheus on 127.0.0.1:port (0: any; none: off)")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log level")

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        parse_target(value)
        return value

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.append_bytes_max < self.message_bytes_max:
            raise ValueError(f"append_bytes_max {self.append_bytes_max} is below message_bytes_max {self.message_bytes_max}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def engine(self) -> EngineConfig:
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.__dataclass_fields__})


def load(flags: dict[str, Any], file: Path | None = None) -> Settings:
    """The settings from `flags` (None: not given), the environment and `file`. Raises InvalidArgument."""
    if file is not None and not file.is_file():
        raise InvalidArgument(f"configuration file {file} does not exist")

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return FromFile(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise InvalidArgument(f"configuration: {problems}") from error
    except ValueError as error:  # TOML syntax
        raise InvalidArgument(f"configuration file {file}: {error}") from error


def default_target() -> str:
    """The socket used when none is named: under XDG_RUNTIME_DIR, else in a folder of this user under /tmp."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    return f"unix://{runtime_dir}/tierd.sock" if runtime_dir else f"unix:///tmp/tierd-{os.getuid()}/tierd.sock"


def parse_target(target: str) -> Path | tuple[str, int]:
    """A socket path, or (loopback host, port). Raises ValueError for anything else: there is no authentication beyond the host's."""
    if target.startswith("unix:"):
        path = Path(target.removeprefix("unix:").removeprefix("//"))
        if not path.is_absolute():
            raise ValueError(f"{target!r}: the socket path must be absolute, like unix:///run/user/1000/tierd.sock")
        if len(os.fsencode(path)) > 107:  # sun_path holds 108 bytes with its final zero
            raise ValueError(f"{target!r}: a socket path has at most 107 bytes")
        return path
    host, _, port = target.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{target!r} is neither unix:///path nor host:port")
    if host != "localhost" and not _is_loopback(host):
        raise ValueError(f"{host!r} is not a loopback address; allowed: 127.0.0.1, ::1, localhost")
    return ("127.0.0.1" if host == "localhost" else host), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
