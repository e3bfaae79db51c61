"""Errors that only a model's forward can cause."""

from typing import ClassVar

from tierd_client.errors import TierdError, UnsupportedModel

__all__ = ["IncompleteForward", "UnsupportedModel", "unsupported"]


class IncompleteForward(TierdError):
    """The forward before this call ended between two layers. The cache is back at the tokens that all layers hold: run the forward
    again."""

    code: ClassVar[str] = "incomplete_forward"


def unsupported(feature: str, explanation: str) -> UnsupportedModel:
    """The error that names `feature`."""
    return UnsupportedModel(f"{feature}: {explanation}")
