"""What a session may choose: how blocks are promoted, and how wrong an answer may be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The hard budget. `skip_share`: part of the budget that skipped blocks may spend, in [0, 1); on a device none are. `require_rank`: a
    head whose heaviest block cannot be certified is computed exactly."""

    skip_share: float = 0.1
    require_rank: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.skip_share < 1.0:
            raise ValueError(f"skip_share is {self.skip_share}; allowed: 0 <= skip_share < 1")


@dataclass(frozen=True)
class Coverage:
    """The policy of the paper (arXiv 2605.20868): promotion by attention mass. Shares are fractions of the head's mass, `k_*` counts
    of blocks, `key_bound_max` the paper's key bound above which the promoted set doubles once, `v_tol` a norm. With
    `boundary_check` a head whose promoted blocks cannot be certified to outweigh all others is computed exactly."""

    tau_cov: float = 0.995
    k_min: int = 2
    k_max: int = 128
    key_bound_max: float = 0.02
    v_tol: float = 0.05
    boundary_check: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.tau_cov <= 1.0:
            raise ValueError(f"tau_cov is {self.tau_cov}; allowed: 0 < tau_cov <= 1")
        if not 0 <= self.k_min <= self.k_max:
            raise ValueError(f"k_min, k_max are {self.k_min}, {self.k_max}; allowed: 0 <= k_min <= k_max")
        if not (self.key_bound_max >= 0.0 and self.v_tol >= 0.0):
            raise ValueError("key_bound_max and v_tol must be at least 0")


Policy = Budget | Coverage
