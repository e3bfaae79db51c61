"""Requests that cannot be parsed. gRPC would end their calls with UNKNOWN and a traceback; handlers get to refuse them by name instead."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tierd.errors import InvalidArgument


class Unparsable(InvalidArgument):
    """Comes in place of a request. `id`: that of a DecodeRequest if it came before what is broken, else 0."""

    def __init__(self, partial: Message, error: DecodeError) -> None:
        super().__init__(f"the message cannot be parsed as {partial.DESCRIPTOR.full_name}: {error}")
        self.id: int = getattr(partial, "id", 0)


def parsed(request: Any) -> Any:
    """`request`. Raises it if it is Unparsable."""
    if isinstance(request, Unparsable):
        raise request
    return request


class Parsing(grpc.aio.ServerInterceptor):
    """Handlers of `service` are given what `parsed` takes; those of other services are left alone."""

    def __init__(self, service: ServiceDescriptor) -> None:
        self._parsers = {f"/{service.full_name}/{method.name}": _parser(method.input_type) for method in service.methods}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        parser = self._parsers.get(details.method)
        return handler._replace(request_deserializer=parser) if handler and parser else handler


def _parser(descriptor: Any) -> Callable[[bytes], Message | Unparsable]:
    kind = GetMessageClass(descriptor)

    def parse(data: bytes) -> Message | Unparsable:
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            return Unparsable(message, error)
        return message

    return parse
