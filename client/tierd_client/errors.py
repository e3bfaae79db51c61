"""Everything that a call can fail with. `code` is what travels on the wire."""

from typing import ClassVar


class TierdError(Exception):
    """Base of all errors of this package."""

    code: ClassVar[str]


class InvalidArgument(TierdError, ValueError):
    """The call itself is wrong: the message says what was given and what is allowed. Nothing stored has changed."""

    code = "invalid_argument"


class SessionNotFound(TierdError):
    """The session is closed, or its lease ran out."""

    code = "session_not_found"


class CapacityExceeded(TierdError):
    """A pool, a queue or a table is full; the message names what is used and what is free. Nothing stored has changed."""

    code = "capacity_exceeded"


class CertificateUnavailable(TierdError):
    """Neither a certified nor an exact answer can be given, for instance because an original fails its checksum."""

    code = "certificate_unavailable"


class DaemonUnavailable(TierdError):
    """Nothing answers at the target, or the connection ended: its sessions are gone, and only a new `connect` helps."""

    code = "unavailable"


class DeadlineExceeded(TierdError):
    """No answer in time. Whether the daemon acted on the call is unknown: ask for the session's lengths."""

    code = "deadline_exceeded"


class UnsupportedModel(TierdError):
    """The model uses a feature that certified attention does not have; the message names it."""

    code = "unsupported_model"


_BY_CODE: dict[str, type[TierdError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        SessionNotFound,
        CapacityExceeded,
        CertificateUnavailable,
        DaemonUnavailable,
        DeadlineExceeded,
        UnsupportedModel,
    )
}


def from_code(code: str, message: str, target: str) -> TierdError:
    """The error that the daemon at `target` reported. Codes of a newer daemon become DaemonUnavailable, named."""
    kind = _BY_CODE.get(code)
    if kind is None:
        return DaemonUnavailable(f"{target} reported {code!r}, which this client does not know: {message}")
    return kind(f"{target}: {message}" if kind is DaemonUnavailable else message)


def late(timeout_s: float) -> DeadlineExceeded:
    """No answer within `timeout_s` seconds."""
    return DeadlineExceeded(f"no answer within {timeout_s:g} seconds; whether the daemon acted on the call is unknown")
