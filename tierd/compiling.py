"""How the daemon's own loops are compiled."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])
compiled: Callable[[Function], Function] = numba.njit(cache=True)
"""`numba.njit`, typed. What is compiled is kept on disk beside the function's own file."""
