"""What a kernel call can refuse, and what a backend can die of."""


class ScoreOverflow(ValueError):
    """A score lies above `SCORE_MAX`, the largest that is answered."""


class DeviceUnavailable(RuntimeError):
    """A backend cannot start here; the text names the cause and the remedy."""


class DeviceLost(RuntimeError):
    """A fault from which the device does not recover: nothing more may be asked of the backend, and nothing in its memory counts."""


SCORE_MAX = 3e38
