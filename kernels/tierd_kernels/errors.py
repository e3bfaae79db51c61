"""What a kernel call can refuse."""


class ScoreOverflow(ValueError):
    """A score lies above `SCORE_MAX`, the largest that is answered."""


SCORE_MAX = 3e38
