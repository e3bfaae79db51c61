"""What a caller says of a session: its shape, how wrong an answer may be, and how blocks are chosen for promotion."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from tierd_proto.coding import DTYPES

from tierd_client.errors import InvalidArgument

RelativeTo = Literal["values", "output"]
RELATIVE_TO: tuple[RelativeTo, ...] = ("values", "output")
UINT32_MAX = (1 << 32) - 1
INT64_MAX = (1 << 63) - 1


def check_count(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int. Raises InvalidArgument unless it is a whole number from `low` to `high`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InvalidArgument(f"{name} is {value!r}; it must be a whole number")
    count = int(value)
    if not low <= count <= high:
        raise InvalidArgument(f"{name} is {count}; allowed: {low} to {high}")
    return count


def check_number(name: str, value: object, allowed: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises InvalidArgument unless `value` is a finite number from `low` to `high`; `allowed` says so in words."""
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an int beyond every double
        number = math.inf
    if not (math.isfinite(number) and low <= number <= high):
        raise InvalidArgument(f"{name} is {value!r}; allowed: {allowed}")


def check_flag(name: str, value: object) -> None:
    """Raises InvalidArgument unless `value` is a bool."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} is {value!r}; allowed: True, False")


@dataclass(frozen=True)
class Geometry:
    """Shape of one model's attention.

    `dtype`: of q, k, v and the output: "float16", "bfloat16" or "float32". `softmax_scale` None: `head_dim ** -0.5`. `block_size`: tokens
    in a block; `value_group`: channels that share a value scale. Raises InvalidArgument; which sizes exist is the daemon's to say.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    softmax_scale: float | None = None
    block_size: int = 16
    value_group: int = 16

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim", "block_size", "value_group"):
            check_count(name, getattr(self, name), 1, UINT32_MAX)
        if self.num_q_heads % self.num_kv_heads:
            raise InvalidArgument(f"num_q_heads is {self.num_q_heads}; it must be a multiple of num_kv_heads, {self.num_kv_heads}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.softmax_scale is not None:
            check_number("softmax_scale", self.softmax_scale, "a finite number, or None for head_dim ** -0.5")


@dataclass(frozen=True)
class Tolerance:
    """The budget of each head: `atol + rtol * reference`; both 0: exact.

    The reference is the attention-weighted mean norm of the values ("values") or the norm of the returned output ("output", stricter where
    attention is spread). Raises InvalidArgument.
    """

    rtol: float
    atol: float = 0.0
    relative_to: RelativeTo = "values"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            check_number(name, getattr(self, name), "a finite number of at least 0", low=0.0)
        if self.relative_to not in RELATIVE_TO:
            raise InvalidArgument(f"relative_to is {self.relative_to!r}; allowed: {', '.join(RELATIVE_TO)}")


@dataclass(frozen=True)
class Budget:
    """Promote whatever the error budget needs. `skip_share`: part of the budget that skipped blocks may spend; a daemon with a
    device skips none. `require_rank`: a head whose heaviest block cannot be certified is computed exactly."""

    skip_share: float = 0.1
    require_rank: bool = False

    def __post_init__(self) -> None:
        check_number("skip_share", self.skip_share, "0 <= skip_share < 1", 0.0, math.nextafter(1.0, 0.0))
        check_flag("require_rank", self.require_rank)


@dataclass(frozen=True)
class Coverage:
    """Promote the blocks that hold the share `tau_cov` of a head's attention mass, from `k_min` to `k_max` of them.

    Above `key_bound_max`, the key bound of this policy, the set doubles once; values promote above `v_tol`, a norm. A head is computed
    exactly where its heaviest block is not certain, and, with `boundary_check`, where the promoted blocks do not certainly outweigh
    all others.
    """

    tau_cov: float = 0.995
    k_min: int = 2
    k_max: int = 128
    key_bound_max: float = 0.02
    v_tol: float = 0.05
    boundary_check: bool = True

    def __post_init__(self) -> None:
        check_number("tau_cov", self.tau_cov, "0 < tau_cov <= 1", math.nextafter(0.0, 1.0), 1.0)
        check_count("k_max", self.k_max, 0, UINT32_MAX)
        check_count("k_min", self.k_min, 0, self.k_max)
        for name in ("key_bound_max", "v_tol"):
            check_number(name, getattr(self, name), "a finite number of at least 0", low=0.0)
        check_flag("boundary_check", self.boundary_check)


Policy = Budget | Coverage
PolicyChoice = Policy | Literal["budget", "coverage"]


def as_policy(choice: PolicyChoice) -> Policy:
    """`choice`, or the defaults of the policy that it names. Raises InvalidArgument."""
    if isinstance(choice, Budget | Coverage):
        return choice
    if choice not in ("budget", "coverage"):
        raise InvalidArgument(f"policy is {choice!r}; allowed: 'budget', 'coverage', Budget(...), Coverage(...)")
    return Budget() if choice == "budget" else Coverage()


def as_tolerance(value: object) -> Tolerance:
    """`value`, if it is a Tolerance. Raises InvalidArgument: a bare number would not say what it is relative to."""
    if not isinstance(value, Tolerance):
        raise InvalidArgument(f"tolerance is {value!r}; it must be a Tolerance(rtol, atol, relative_to)")
    return value


@dataclass(frozen=True)
class Limits:
    """What the daemon allows. `message_bytes_max`: one message either way; `max_tokens`: of one session; `stream_requests_max`: attend
    and step calls of this connection in flight at once; `timeout_s_max`: the longest timeout, seconds; `head_dims`: what `head_dim` of a
    geometry may be."""

    message_bytes_max: int
    max_tokens: int
    stream_requests_max: int
    timeout_s_max: float
    head_dims: tuple[int, ...]
