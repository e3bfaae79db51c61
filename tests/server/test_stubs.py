"""The committed stubs are what the pinned compiler makes of the .proto."""

import runpy
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_the_committed_stubs_are_fresh(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "proto" / "generate.py"))["generate"](tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py*")}
    assert sorted(path.name for path in made) == ["tierd_pb2.py", "tierd_pb2.pyi", "tierd_pb2_grpc.py"]
    for path, content in made.items():
        assert (ROOT / "proto" / path).read_bytes() == content, f"{path} is stale: run proto/generate.py"


def test_the_dependencies_admit_no_runtime_that_refuses_the_stubs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    tools = metadata.version("grpcio-tools")
    assert str(needed["grpcio"].specifier) == f">={tools}"
    made_for = [requirement for requirement in map(Requirement, metadata.requires("grpcio-tools") or []) if requirement.name == "protobuf"]
    assert needed["protobuf"].specifier == made_for[0].specifier
