"""What a kernel call can refuse, and what ends a backend."""


class ScoreOverflow(ValueError):
    """A score lies above `SCORE_MAX`, the largest that is answered."""


class DeviceUnavailable(RuntimeError):
    """The backend cannot start; the message names the cause and the remedy."""


class DeviceLost(RuntimeError):
    """A fault from which the device does not recover: nothing more may be asked of the backend."""


SCORE_MAX = 3e38
