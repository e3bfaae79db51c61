"""What a device's errors mean. Needs CuPy."""

from typing import Any

from tierd_kernels.cuda.start import FAULTS
from tierd_kernels.errors import DeviceLost


class faults:
    """Around what a device does. One that reports an error is lost: its context does not recover, what it holds cannot be trusted."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, FAULTS):
            raise DeviceLost(f"the CUDA device failed: {error}; restart the daemon") from error
