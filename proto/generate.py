"""Generates the Python stubs from the .proto file: `python proto/generate.py`, with the grpcio-tools that the `dev` extra pins.

The stubs are committed. That version is the oldest that we support: the protobuf runtime accepts stubs of its own version or
an older one, and refuses newer ones, so the lower bound of `protobuf` in pyproject.toml is the version that this one writes.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
SOURCE = ROOT / "tierd_proto" / "v1" / "tierd.proto"


def generate(target: Path) -> None:
    """Write the stubs under `target`, an existing folder. Raises RuntimeError when the .proto does not compile."""
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    # With -I above the package, the stubs import each other as tierd_proto.v1, wherever they are installed.
    if protoc.main(["protoc", f"-I{ROOT}", *outputs, str(SOURCE)]) != 0:
        raise RuntimeError(f"{SOURCE} does not compile")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
