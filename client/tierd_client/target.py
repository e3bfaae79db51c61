"""Where a daemon listens, as text."""

import os
from collections.abc import Mapping

from tierd_client.errors import InvalidArgument

INPROC = "inproc://"
TIMEOUT_S_MAX = 86400.0  # of connecting; what calls may take is the daemon's to say


def default_target() -> str:
    """The daemon's own default: under XDG_RUNTIME_DIR, else in a folder of this user under /tmp."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    return f"unix://{runtime_dir}/tierd.sock" if runtime_dir else f"unix:///tmp/tierd-{os.getuid()}/tierd.sock"


def resolve(target: str | None, settings: object) -> str:
    """`target`, or the default for None. Raises InvalidArgument for text of no known form, and for settings nobody would read."""
    chosen = default_target() if target is None else target
    if not isinstance(chosen, str) or (chosen != INPROC and not _is_socket(chosen) and not _is_address(chosen)):
        raise InvalidArgument(f"target is {chosen!r}; allowed: unix:///path, host:port, {INPROC}")
    if chosen != INPROC and settings is not None:
        raise InvalidArgument(f"settings are for {INPROC} only; the daemon at {chosen} has its own")
    if settings is not None and not isinstance(settings, Mapping):
        raise InvalidArgument(f"settings is a {type(settings).__name__}; it must be a mapping from names to values")
    return chosen


def _is_socket(target: str) -> bool:
    return target.startswith("unix:///") and len(target) > len("unix:///")


def _is_address(target: str) -> bool:
    host, _, port = target.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal() and 0 < int(port) < 1 << 16
