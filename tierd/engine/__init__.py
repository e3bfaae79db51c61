"""The engine: the single owner of all that changes."""

from tierd.config import EngineConfig
from tierd.engine.batch import Kernels
from tierd.engine.loop import STATUS_WAITING_MAX, Engine

__all__ = ["STATUS_WAITING_MAX", "Engine", "EngineConfig", "Kernels"]
