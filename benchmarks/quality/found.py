"""Which results there are, by what their files' names say: quality_PART[_MODEL][_DTYPE]__MACHINE.json.

MODEL is named where it is not the small model of this repository, DTYPE where `evaluate.py` did not run in its default type.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = re.compile(r"quality_(?P<part>[a-z]+)(?:_(?P<model>.+-[0-9a-f]{8}))?(?:_(?P<dtype>b?float16))?__(?P<machine>[^_].*)\.json")


class Unreportable(Exception):
    """A result is missing, or a certificate was wrong."""


@dataclass(frozen=True)
class File:
    """A result. `model` and `dtype` are empty where the name has none."""

    path: Path
    part: str
    model: str
    dtype: str
    machine: str

    @property
    def what(self) -> tuple[str, str, str]:
        """What tells it from the other results of its machine."""
        return self.part, self.model, self.dtype


def find(folder: Path, machines: list[str], made_by: Mapping[str, str]) -> tuple[dict[str, File], dict[str, File]]:
    """Of every part of `made_by` (and the command that makes it) the result of this repository's model of the first machine that has one,
    in the default type if that machine has it in several; then all others of another type, model or part, by their file's stem, each of the
    first machine that has it. Raises Unreportable where a part is missing."""
    files = [file for machine in machines for file in _files(folder) if file.machine == machine]
    required = {}
    for part, script in made_by.items():
        chosen = next((file for file in files if file.part == part and not file.model), None)
        if chosen is None:
            names = ", ".join(f"quality_{part}__{machine}.json" for machine in machines)
            raise Unreportable(f"none of {names} is in {folder}; {script} makes it")
        required[part] = chosen
    first: dict[tuple[str, str, str], File] = {file.what: file for file in required.values()}
    for file in files:
        first.setdefault(file.what, file)
    return required, {file.path.stem: file for file in first.values() if file not in required.values()}


def _files(folder: Path) -> list[File]:
    matches = ((path, NAME.fullmatch(path.name)) for path in sorted(folder.glob("quality_*.json")))
    found = [File(path, m["part"], m["model"] or "", m["dtype"] or "", m["machine"]) for path, m in matches if m]
    return sorted(found, key=lambda file: (file.part, file.model, file.dtype))


def dtype_of(said: Mapping[str, Any]) -> str:
    """The type of numbers that the model computed in, by the result itself."""
    return str(said["run"]["dtype"]).removeprefix("torch.")
