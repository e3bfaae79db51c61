"""Everything that a command can fail with. `code` is what travels on the wire."""

from typing import ClassVar


class TierdError(Exception):
    """Base of all errors that the daemon reports to a worker."""

    code: ClassVar[str] = "unavailable"


class InvalidArgument(TierdError, ValueError):
    """The request itself is wrong: the message says what was given and what is allowed."""

    code = "invalid_argument"


class SessionNotFound(TierdError):
    """No such session is open for this worker (closed, expired, or of an earlier daemon)."""

    code = "session_not_found"


class CapacityExceeded(TierdError):
    """A pool, a queue or a table is full; the message names what is used and what is free."""

    code = "capacity_exceeded"


class CertificateUnavailable(TierdError):
    """Neither a certified nor an exact answer can be given, for instance because an original fails its checksum."""

    code = "certificate_unavailable"


class Unavailable(TierdError):
    """The daemon is stopping, or a fault of its own kept it from answering."""

    code = "unavailable"


class DeadlineExceeded(TierdError):
    """The command's deadline passed before its turn came; nothing was done."""

    code = "deadline_exceeded"
