"""One worker's Decode stream: requests in, replies out as they complete, errors among them."""

import asyncio
from typing import Any

import grpc
from tierd_proto.v1 import tierd_pb2 as pb

from tierd.calls import Calls
from tierd.errors import CapacityExceeded, InvalidArgument
from tierd.metrics import Metrics
from tierd.parsing import parsed
from tierd.service import ByteQuota, describe

Context = Any  # grpc.aio.ServicerContext


class DecodeStream:
    """Holds at most `requests_max` requests; one counts until its reply is written, so a worker that does not read is held up."""

    def __init__(self, calls: Calls, metrics: Metrics, quota: ByteQuota, requests_max: int, context: Context, worker: str) -> None:
        self._calls = calls
        self._metrics = metrics
        self._quota = quota
        self._requests_max = requests_max
        self._context = context
        self._worker = worker
        self._ids: set[int] = set()
        self._writing = asyncio.Lock()  # gRPC takes one message at a time

    async def serve(self) -> None:
        """Until the worker half-closes and every request is answered, or the call is cancelled."""
        await self._write(pb.DecodeReply())
        async with asyncio.TaskGroup() as tasks:
            while (request := await self._context.read()) is not grpc.aio.EOF:
                try:
                    self._check(parsed(request))
                except Exception as error:
                    await self._write(self._failure(request.id, error))
                    continue
                self._ids.add(request.id)
                tasks.create_task(self._answer(request))

    def _check(self, request: pb.DecodeRequest) -> None:
        if request.id < 1 or request.id in self._ids:
            raise InvalidArgument(f"request id is {request.id}; it must be at least 1 and of no request in flight")
        if len(self._ids) >= self._requests_max:
            raise CapacityExceeded(
                f"{len(self._ids)} requests are in flight on this stream, 0 free: stream_requests_max is {self._requests_max}"
            )

    async def _answer(self, request: pb.DecodeRequest) -> None:
        try:
            with self._calls.admitted():
                await self._write(await self._reply(request))
        except Exception as error:
            await self._write(self._failure(request.id, error))
        finally:
            self._ids.remove(request.id)

    async def _reply(self, request: pb.DecodeRequest) -> pb.DecodeReply:
        with self._quota.held(request.ByteSize()):
            return pb.DecodeReply(id=request.id, attend=await self._calls.answer(request.attend, self._worker, request.timeout_s))

    def _failure(self, request_id: int, error: Exception) -> pb.DecodeReply:
        message = describe(error)
        self._metrics.count_error(message.code)
        return pb.DecodeReply(id=request_id, error=message)

    async def _write(self, reply: pb.DecodeReply) -> None:
        async with self._writing:
            await self._context.write(reply)
