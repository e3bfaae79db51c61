"""The floor under the load test: a gRPC stream without tierd, an awaitable server that answers bytes with bytes, a blocking client. What
a message costs on it changes with the machine's state by half and more, and every figure of the load test with it.

    python benchmarks/bench_transport_bare.py unix:///path/of.sock      # serves, until it is terminated
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np

REQUEST, REPLY = bytes(2096), bytes(3098)  # as long as the messages of the null engine
CALLS, WARM_UP_CALLS = 1500, 300


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: Any) -> Any:
        async def answer(_: Any, context: Any) -> None:
            while await context.read() is not grpc.aio.EOF:
                await context.write(REPLY)

        return grpc.stream_stream_rpc_method_handler(answer)


async def serve(target: str) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Echo(),))
    server.add_insecure_port(target)
    await server.start()
    print(target, flush=True)
    await server.wait_for_termination()


def bare_stream_p50_us() -> float:
    """From a message's sending to its answer, closed loop."""
    seconds = []
    with tempfile.TemporaryDirectory(prefix="tierd-") as folder:
        command = [sys.executable, __file__, f"unix://{folder}/bare.sock"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            with grpc.insecure_channel(process.stdout.readline().strip()) as channel:
                requests: SimpleQueue[bytes | None] = SimpleQueue()
                replies = channel.stream_stream("/bare/Echo")(iter(requests.get, None))
                for _ in range(CALLS):
                    start = time.perf_counter()
                    requests.put(REQUEST)
                    next(replies)
                    seconds.append(time.perf_counter() - start)
                requests.put(None)
                assert list(replies) == []
            process.terminate()
    return float(np.median(seconds[WARM_UP_CALLS:]) * 1e6)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
