"""The daemon under the soak: a process of its own, its status asked as a monitor would, its memory read from the system."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tierd_client import Tier, connect

PROGRAM = ["-m", "tierd"]  # what Python runs
LEASE_S = 4.0
# Scratch of 128 KiB a kind holds 4 to 64 records, and sessions need hundreds: every copy pushes others out. The other pools are full at
# times.
FLAGS = {
    "hot-bytes": 6 << 20, "originals-bytes": 14 << 20, "scratch-bytes": 256 << 10, "message-bytes-max": 4 << 20, "threads": 1,
    "canary-share": 0.01, "log-level": "warning",
}  # fmt: skip
STOP_S = 60.0
MONITOR_S = 300.0  # of its calls: the first of a geometry may have a GPU's kernels to compile


@dataclass(frozen=True)
class Daemon:
    """One that runs. `monitor`: a connection that holds no session."""

    target: str
    process: "subprocess.Popen[str]"
    monitor: Tier
    log: Path

    def status(self) -> dict[str, Any]:
        return self.monitor.status()

    def memory(self) -> dict[str, float]:
        """What the system knows of the process: resident MiB, threads, open files; on a GPU also MiB of the whole device in use."""
        proc = Path(f"/proc/{self.process.pid}")
        values = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", (proc / "status").read_text(), re.MULTILINE))
        files = len(list((proc / "fd").iterdir()))
        mine = {"rss_mib": int(values["VmRSS"]) / 1024, "threads": float(values["Threads"]), "open_files": float(files)}
        return mine | ({"device_mib": _device_mib()} if self.monitor.backend == "cuda" else {})

    def faults(self) -> list[str]:
        """What it logged as an error, each line."""
        return [line for line in self.log.read_text().splitlines() if "Traceback" in line or " ERROR " in line]


def _device_mib() -> float:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0])


@contextmanager
def running(backend: str) -> Iterator[Daemon]:
    """`tierd serve` until the context is left. Raises RuntimeError if it does not begin to listen, with what it said."""
    with TemporaryDirectory(prefix="tierd-") as folder:
        target, log = f"unix://{folder}/tierd.sock", Path(folder) / "log"
        flags = {"listen": target, "backend": backend, "lease-s": LEASE_S} | FLAGS
        command = [sys.executable, *PROGRAM, "serve", *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIERD_")}
        files: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log.open("w")}
        with files["stderr"], subprocess.Popen(command, text=True, env=environment, **files) as process:
            try:
                assert process.stdout is not None
                if not process.stdout.readline():
                    raise RuntimeError(f"the daemon ended with {process.wait()}: {log.read_text()}")
                with connect(target, timeout=MONITOR_S) as monitor:
                    yield Daemon(target, process, monitor, log)
            finally:
                process.kill()


def stopped(daemon: Daemon) -> int:
    """The exit code after SIGTERM. Raises subprocess.TimeoutExpired."""
    daemon.process.terminate()
    return daemon.process.wait(STOP_S)
