"""What every benchmark reports of the machine, and where its results go."""

import importlib
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "numba", "torch", "grpcio", "protobuf")


def environment(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Processor, cores, kernel, Python and the versions of what does the work, `packages` besides those of every benchmark."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES + packages},
        **_device(),
    }


def _device() -> dict[str, Any]:
    """The GPU, its driver, clocks and compilers, where there is one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    names = ("name", "driver_version", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "clocks.mem")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    versions = {name: importlib.import_module(name).__version__ for name in ("cupy", "triton")}
    return {"gpu": dict(zip(names, values, strict=True)), "cuda": torch.version.cuda, **versions}


def machine_name() -> str:
    """Short, for file names: the GPU, or the processor and its cores."""
    gpu = _device().get("gpu")
    if gpu:
        return re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{_processor()} {os.cpu_count()} cores".lower()).strip("-")


def write_results(
    name: str, headline: dict[str, float], rows: list[dict[str, Any]], packages: tuple[str, ...] = (), run: dict[str, Any] | None = None
) -> Path:
    """Write benchmarks/results/<name>__<machine>.json; returns its path. `run`: what was run, where the name does not say all of it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}__{machine_name()}.json"
    said = {"environment": environment(packages)} | ({"run": run} if run else {}) | {"headline": headline, "rows": rows}
    path.write_text(json.dumps(said, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
