"""Parts of a long run, each written down when it is done, so that a run that is cut off goes on where it stopped."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Ledger:
    """A file of JSON lines: first what the run is (`identity`), then one line a part, by `key`.

    Raises ValueError where the file is of a run with another identity. A last line without its newline was cut off while it was
    written; that part is done again.
    """

    def __init__(self, path: Path, identity: Record, minutes: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._end = None if minutes is None else clock() + 60.0 * minutes
        self._done: dict[str, Record] = {}
        identity = json.loads(json.dumps(identity))
        if path.exists():
            self._read(identity)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"identity": identity})

    @property
    def records(self) -> list[Record]:
        """What is done, in the order in which it was."""
        return list(self._done.values())

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed."""
        return self._end is not None and self._clock() >= self._end

    def part(self, key: str, compute: Callable[[], Record]) -> bool:
        """Do the part unless it is done or time is up; `compute` gives its record. Returns whether it is done now."""
        if key in self._done:
            return True
        if self.out_of_time:
            return False
        start = self._clock()
        record = {"key": key, **compute(), "seconds": self._clock() - start}
        self._append(record)
        self._done[key] = record
        return True

    def _append(self, line: Record) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, identity: Record) -> None:
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        found = lines[0].get("identity") if lines else None
        if found != identity:
            raise ValueError(f"{self._path} holds parts of another run, {found}; this one is {identity}: name another file")
        self._done = {line["key"]: line for line in lines[1:]}
        if whole != text:
            os.truncate(self._path, len(whole.encode()))
