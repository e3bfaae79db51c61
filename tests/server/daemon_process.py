"""A real daemon in a process of its own, and a raw client of its wire: stubs only, nothing of tierd_client."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray
from tierd_proto import coding
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1 import tierd_pb2_grpc

ROOT = Path(__file__).parents[2]
CALL_S = 120.0  # the first call may compile kernels
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
SMALL = {"hot-bytes": 4 << 20, "originals-bytes": 8 << 20, "scratch-bytes": 1 << 20, "message-bytes-max": 1 << 20}


def environment(*first: Path) -> dict[str, str]:
    """That of a child which finds our packages, whether or not they are installed, without settings of whoever runs the tests. `first`:
    where it looks for packages before that."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIERD_")}
    return kept | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (*first, ".", "proto", "kernels", "client"))}


class DaemonProcess:
    """`tierd serve` with `flags`; construction returns once it listens, or raises RuntimeError with what it said. `first`: as of
    `environment`. `prelude`: Python that the process runs first."""

    def __init__(self, flags: dict[str, Any], *first: Path, prelude: str = "") -> None:
        arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        program = ["-c", f"{prelude}\nfrom tierd.cli import main\nraise SystemExit(main())"] if prelude else ["-m", "tierd"]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *program, "serve", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(*first),
        )  # fmt: skip
        self.said: dict[str, str] = {}
        assert self.process.stdout is not None
        while "listening" not in self.said:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"exit {self.process.wait()}: {self.process.communicate()[1]}")
            word, _, target = line.strip().partition(" on ")
            self.said[word] = target
        self.target = self.said["listening"]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit code and what it wrote to stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()


class Worker:
    """Shook hands, and has its stream open."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)
        self.stub: Any = tierd_pb2_grpc.TierStub(self.channel)
        self.hello: pb.HandshakeReply = self.stub.Handshake(pb.HandshakeRequest(protocol=1), timeout=CALL_S)
        self.metadata = (("tierd-worker", self.hello.worker),)
        self.requests: SimpleQueue[pb.DecodeRequest | None] = SimpleQueue()
        self.replies = self.stub.Decode(iter(self.requests.get, None), metadata=self.metadata)
        first = next(self.replies)
        assert (first.id, first.WhichOneof("result")) == (0, None)

    def call(self, name: str, request: Any, timeout: float = CALL_S) -> Any:
        return getattr(self.stub, name)(request, metadata=self.metadata, timeout=timeout)

    def ask(self, request: pb.DecodeRequest) -> pb.DecodeReply:
        self.requests.put(request)
        reply: pb.DecodeReply = next(self.replies)
        return reply

    def open(self, **changes: Any) -> str:
        return str(self.call("OpenSession", open_request(**changes)).session_id)

    def status(self) -> dict[str, Any]:
        return status(self.stub)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.requests.put(None)
        for _ in () if self.replies.done() else self.replies:
            pass  # until the daemon has closed the sessions
        self.channel.close()


def status(stub: Any) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(stub.Status(pb.StatusRequest(), timeout=CALL_S).json)
    return decoded


def open_request(max_tokens: int = 1000, rtol: float = 0.1, **geometry: Any) -> pb.OpenSessionRequest:
    shape: dict[str, Any] = {
        "num_layers": LAYERS, "num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "dtype": pb.FLOAT32, "block_size": 16, "value_group": 16,
    }  # fmt: skip
    return pb.OpenSessionRequest(
        geometry=pb.Geometry(**shape | geometry), tolerance=pb.Tolerance(rtol=rtol), budget=pb.BudgetPolicy(skip_share=0.1),
        max_tokens=max_tokens,
    )  # fmt: skip


def numbers(seed: int, heads: int, n: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((heads, n, HEAD_DIM)).astype(np.float32)


def chunks(session: str, k: NDArray[Any], v: NDArray[Any], size: int, layer: int = 0) -> Iterator[pb.AppendRequest]:
    """An append of `k`, `v` [Hkv, n, d] in messages of `size` tokens."""
    for start in range(0, k.shape[1], size):
        header = pb.AppendHeader(session_id=session, layer=layer, num_tokens=k.shape[1]) if start == 0 else None
        part = slice(start, start + size)
        yield pb.AppendRequest(header=header, k=coding.encode_tensor(k[:, part]), v=coding.encode_tensor(v[:, part]))


def row(session: str, q: NDArray[Any], layer: int = 0, **more: Any) -> pb.Row:
    return pb.Row(session_id=session, layer=layer, q=coding.encode_tensor(q), **more)
