"""Plain text that every machine has: the source of Python's standard library, in a part to train on and a part held out."""

import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Literal

Part = Literal["train", "held-out"]
HELD_OUT_IN = 20  # one file of twenty is held out
MIN_BYTES = 512
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"})


@lru_cache(maxsize=2)
def documents(part: Part) -> tuple[str, ...]:
    """The files of one part, ASCII only, in the order of their paths; which part a file is in depends on its relative path alone.

    Tests, character tables and packages installed beside the library are left out. Another version of Python has other files:
    figures that rest on this text name the version (`environment()` of the benchmarks does).
    Raises FileNotFoundError where the library's source is not installed.
    """
    if part not in ("train", "held-out"):
        raise ValueError(f"part is {part!r}; allowed are 'train' and 'held-out'")
    root = Path(sysconfig.get_path("stdlib"))
    texts = tuple(_ascii(root / name) for name in _names(root) if (zlib.crc32(name.encode()) % HELD_OUT_IN == 0) == (part == "held-out"))
    texts = tuple(text for text in texts if len(text) >= MIN_BYTES)
    if not texts:
        raise FileNotFoundError(f"no Python source under {root}: is the standard library installed with its .py files?")
    return texts


def _names(root: Path) -> list[str]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if SKIPPED.isdisjoint(path.parts))


def _ascii(path: Path) -> str:
    return path.read_bytes().decode("ascii", errors="ignore").replace("\r\n", "\n")
