"""Parts of a long run, each written down when it is done, so that a run that is cut off goes on where it stopped."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """The work of one of `count` processes that do a run together, `index` from 1: every `count`-th of its groups of parts."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Of "2/4". Raises ValueError for anything else than 1/n to n/n."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise ValueError(f"share is {text!r}; allowed: 1/n to n/n, for instance 2/4")
        return cls(int(index), int(count))

    def has(self, group: int) -> bool:
        return group % self.count == self.index - 1


WHOLE = Share(1, 1)


class Ledger:
    """A file of JSON lines: first what the run is (`identity`), then one line a part, by `key`.

    A process that does a share of the run writes a file of its own beside `path`. Parts that any of these files has are done. Raises
    ValueError where one is of a run with another identity. A last line without its newline was cut off while it was written; that part is
    done again.
    """

    def __init__(
        self, path: Path, identity: Record, minutes: float | None = None, share: Share = WHOLE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        own = path if share == WHOLE else path.with_stem(f"{path.stem}-{share.index}of{share.count}")
        self._path, self._clock, self._share = own, clock, share
        self._end = None if minutes is None else clock() + 60.0 * minutes
        self._done: dict[str, Record] = {}
        identity = json.loads(json.dumps(identity))
        for file in (path, *sorted(path.parent.glob(f"{path.stem}-*of*{path.suffix}"))):
            if file.exists() and file != own:
                self._read(file, identity)
        if own.exists():
            os.truncate(own, self._read(own, identity))
        else:
            own.parent.mkdir(parents=True, exist_ok=True)
            self._append({"identity": identity})

    @property
    def records(self) -> list[Record]:
        """What is done, in the order in which it was."""
        return list(self._done.values())

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed."""
        return self._end is not None and self._clock() >= self._end

    def part(self, key: str, compute: Callable[[], Record], group: int = 0) -> bool:
        """Do the part unless it is done, another share has its group, or time is up; `compute` gives its record. Returns whether it is
        done now, or another's."""
        if key in self._done or not self._share.has(group):
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

    def _read(self, path: Path, identity: Record) -> int:
        """Its parts are done; returns how many bytes the whole lines take."""
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        found = lines[0].get("identity") if lines else None
        if found != identity:
            raise ValueError(f"{path} holds parts of another run, {found}; this one is {identity}: name another file")
        self._done |= {line["key"]: line for line in lines[1:]}
        return len(whole.encode())
