"""What a step is like, by how much of the training's time has gone: rows' lengths, micro-steps, learning rate.

Time, not a count of steps, is what is given: the same recipe fits a fast and a slow GPU. The log has the step at which each stage began.
"""

from random import Random

WARM_UP_STEPS = 150
DECAY_FROM = 0.55  # from here the rate falls linearly to FINAL_RATE
FINAL_RATE = 0.01
TWO_MICRO_STEPS_FROM = 0.25  # later steps take two batches, of different lengths: fewer rows fit into one, and noise matters more

# From which part of the time on, with which chance a batch has rows of which length. Heads that copy form in rows so short that what is
# to be copied is never far (60 steps of 2,048 bytes at 64, none yet at 256); every later stage keeps some short rows.
Stages = tuple[tuple[float, dict[int, float]], ...]
STAGES: Stages = (
    (0.00, {64: 0.5, 128: 0.5}),
    (0.02, {64: 0.2, 128: 0.4, 256: 0.4}),
    (0.04, {128: 0.2, 256: 0.3, 512: 0.5}),
    (0.065, {256: 0.1, 512: 0.4, 1024: 0.5}),
    (0.11, {512: 0.2, 1024: 0.4, 2048: 0.4}),
    (0.18, {512: 0.1, 1024: 0.2, 2048: 0.3, 4096: 0.4}),
    (0.30, {512: 0.05, 1024: 0.15, 2048: 0.2, 4096: 0.3, 8192: 0.3}),
    (0.50, {512: 0.05, 1024: 0.1, 2048: 0.15, 4096: 0.2, 8192: 0.3, 16384: 0.2}),
    (0.75, {1024: 0.1, 2048: 0.1, 4096: 0.2, 8192: 0.3, 16384: 0.2, 32768: 0.1}),
)


# For a model of two layers on two CPU cores, at 2,048 bytes a step.
SMOKE_STAGES: Stages = ((0.0, {64: 1.0}), (0.12, {64: 0.2, 128: 0.8}), (0.35, {128: 0.3, 256: 0.7}), (0.7, {128: 0.2, 256: 0.4, 512: 0.4}))


def stage(progress: float, stages: Stages) -> int:
    """The number of the stage at `progress` in 0..1."""
    return max(number for number, (start, _) in enumerate(stages) if start <= max(progress, 0.0))


def length(progress: float, stages: Stages, seed: int, number: int) -> int:
    """How long the rows of the `number`-th batch are, in predictions."""
    chances = stages[stage(progress, stages)][1]
    return Random(f"length {seed} {number}").choices(list(chances), list(chances.values()))[0]


def micro_steps(progress: float) -> int:
    """How many batches a step takes."""
    return 1 if progress < TWO_MICRO_STEPS_FROM else 2


def rate(progress: float, step: int) -> float:
    """The learning rate as a share of its height: warm-up by steps, then constant, then falling."""
    fall = (1.0 - min(progress, 1.0)) / (1.0 - DECAY_FROM)
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (FINAL_RATE + (1.0 - FINAL_RATE) * min(1.0, fall))
