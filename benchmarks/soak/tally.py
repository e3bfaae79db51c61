"""What a worker has done so far, and all of them together."""

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass
class Tally:
    """`calls`: answered, refusals included; `head_steps`: rows judged, of which `exact`; `worst`: the largest error / bound of these,
    `worst_certified`: of those not exact. `refused`: a pool was full; `expired`: sessions left until their lease ran out; `silent`: how
    often a busy machine kept a worker from calling for half a lease; `dropped`: connections cut while a call was under way; `left`:
    connections closed with sessions open."""

    calls: int = 0
    head_steps: int = 0
    exact: int = 0
    worst: float = 0.0
    worst_certified: float = 0.0
    opened: int = 0
    forked: int = 0
    truncated: int = 0
    refused: int = 0
    expired: int = 0
    silent: int = 0
    dropped: int = 0
    left: int = 0


def together(tallies: Iterable[Tally]) -> Tally:
    """Sums; of what is worst the largest."""
    total = Tally()
    for tally in tallies:
        for field in fields(Tally):
            mine, more = getattr(total, field.name), getattr(tally, field.name)
            setattr(total, field.name, max(mine, more) if field.name.startswith("worst") else mine + more)
    return total
