"""Attention over tierd's quantised KV cache, each answer with a certificate: `connect`, open a session, append, attend.

`tierd_client.aio` is the same for event loops; `tierd_client.hf` plugs into transformers.
"""

from tierd_client.certificate import Certificate, Result
from tierd_client.errors import (
    CapacityExceeded,
    CertificateUnavailable,
    DaemonUnavailable,
    DeadlineExceeded,
    InvalidArgument,
    SessionNotFound,
    TierdError,
    UnsupportedModel,
)
from tierd_client.session import Session
from tierd_client.tier import Tier, connect
from tierd_client.types import Budget, Coverage, Geometry, Limits, Tolerance

__all__ = [
    "Budget",
    "CapacityExceeded",
    "Certificate",
    "CertificateUnavailable",
    "Coverage",
    "DaemonUnavailable",
    "DeadlineExceeded",
    "Geometry",
    "InvalidArgument",
    "Limits",
    "Result",
    "Session",
    "SessionNotFound",
    "Tier",
    "TierdError",
    "Tolerance",
    "UnsupportedModel",
    "connect",
]
