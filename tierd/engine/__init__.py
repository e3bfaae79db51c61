"""The engine: the single owner of all that changes."""

from tierd.config import EngineConfig
from tierd.engine.batch import Kernels
from tierd.engine.loop import Engine

__all__ = ["Engine", "EngineConfig", "Kernels"]
