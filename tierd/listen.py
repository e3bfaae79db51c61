"""Taking the address to serve on: never one that is in use, and a socket that only its owner may open."""

import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tierd.config import default_target, parse_target

SOCKET_UMASK = 0o177  # leaves mode 0600


class CannotListen(Exception):
    """The address cannot be served on; the message says why."""


def listen(target: str, bind: Callable[[str], int]) -> str:
    """Bind `target` by `bind`, gRPC's `add_insecure_port`; returns the target with its real port. Raises CannotListen."""
    address = parse_target(target)
    try:
        if isinstance(address, Path):
            _bind_socket(address, bind, may_make_folder=target == default_target())
            return f"unix://{address}"
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"{host}:{bind(f'{host}:{address[1]}')}"
    except (OSError, RuntimeError) as error:
        raise CannotListen(f"cannot listen on {target}: {error}") from error


def _bind_socket(path: Path, bind: Callable[[str], int], may_make_folder: bool) -> None:
    if may_make_folder:
        _make_folder(path.parent)
    if not path.parent.is_dir():
        raise CannotListen(f"cannot listen on {path}: its folder does not exist; make it, readable by you alone")
    with _locked(path.parent):  # gRPC would take a socket away from a daemon that is just starting
        _clear(path)
        umask = os.umask(SOCKET_UMASK)
        try:
            bind(f"unix://{path}")
        finally:
            os.umask(umask)


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CannotListen(f"{folder} belongs to another user; name a socket with --listen")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock lives in the kernel and leaves no file."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _clear(path: Path) -> None:
    """Remove the socket of a dead daemon. Raises CannotListen if it is alive, or if `path` is something else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise CannotListen(f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise CannotListen(f"cannot listen on {path}: a daemon serves there already; stop it or name another socket")
