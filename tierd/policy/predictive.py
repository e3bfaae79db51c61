"""The default policy: what is needed, and what comes near it, gains worth and, where that has been worth it, a copy; worth fades.

Worths are kept multiplied by `weight(now)`, which grows as others fade, so that nothing needs to be touched to grow old and two worths of
different times compare as they are (the trick of VSIDS: Moskewicz et al., "Chaff", DAC 2001).
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tierd.policy.snapshot import Choice, Snapshot
from tierd.policy.weighing import GRADES, weigh

# Looking at a call and beginning its copies took an H100's host 0.6 ms; what it spared the next one's kernels and checks, 1 us a record. So
# calls that had nearly all at hand are looked at seldom. At every second one, drifting needles would wait for 1.8 % of what they do under
# `reactive` and not 4.4 %, a recorded text for 29 and not 34 %, topics that switch for the same; at every sixth, drifting ones for 13 %.
EVERY = 4  # calls of a layer
MISSES_SHARE = 1 / 32  # of what a call needed, above which it is looked at anyway
# After each look in a row that finds its layer settled the next one comes after twice as many calls, so many times at most: a look at a
# call of 690 needs that wants two copies keeps an H200's host 0.15 ms. Four layers' steps take 8.5 % longer than with all at hand where
# every fourth call is looked at, 4.1 % with these doublings, 5.9 with 3, 3.8 without any look, all to 1.2 %. Settled: of so many records
# that are needed fewer than one wants a copy. Recorded text and prompts, mostly of fewer needs, wait up to 3 % longer with it; were a layer
# settled wherever a look wants none, up to 8 %, for nothing: they are looked at when they miss.
DOUBLINGS, SETTLED = 2, 64
RESCALE_AT = 512.0  # powers of two: worths and their sums stay far from the largest double


@dataclass
class Predictive:
    """A need adds 1 to a record's worth; coming near one adds up to `near`; worth halves every `half_life` steps.

    Near: the share expected of the next look (this one's, and once more what it has grown since the layer's last) over the share from
    which its head promoted (1, the whole budget, where it did not promote). Below `floor` of that a candidate is left alone; above, it gets
    a copy, but only in place of copies of less than `displace` of its own worth, and while enough of what was asked for at such a worth, in
    whatever session, is needed soon after (`weighing.py`).

    Where a call chooses what to promote, an original that has a copy counts `preference` times; what is read instead of what the host has
    was needed as well. With 1, recorded text and prompts would wait about twice as long, and half of the copies be made in vain. With 40 a
    step of four layers of 131,072 tokens on an H200 reads 4.1 originals from the host and takes 4.5 % longer than with all at hand, with
    160 1.7 and 1.4 %, with 640 1.0 and 3.5 %, each to 1.1 %; of 2,830, 2,950 and 3,020 in all. At 8,192 tokens, where that is next to
    nothing, it is a fifth to three fifths more than was needed; up to 34 % of the copies are never read with 40, 26 with 128. A head that
    needs more than it may name candidates pays: it waits for 53 % of what it does under `reactive`, 33 with 40.

    Fitted to the regimes of `benchmarks/bench_tiering.py` and to recorded traces. With a floor of 0.1 drifting needles wait for 45 % of
    what they do under `reactive`, not 4: what calls prefer raises the share from which heads promote what the host has. With a half-life of
    three steps a prompt that asks for frequent words waits for 52 % (two: 48), more needs than candidates for 65 (53). What else was tried
    on the traces: a need of one layer as a sign for the next two, of a KV head for the others, of a block for its neighbours. None foresees
    a need that a record's own share does not; the few that layers share are of blocks that have just filled, which are a tail in the layers
    to come.
    """

    half_life: float = 2.0
    near: float = 0.9
    floor: float = 0.03
    displace: float = 0.5
    name: str = "predictive"
    wants_candidates: bool = True
    preference: int = 128
    since: float = 0.0  # when the weight was 1
    looked: float = 0.0  # when a call was last looked at
    asks: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, GRADES)))  # see `weighing.py`

    def looks_at(self, turn: int, settled: int, needs: int, misses: int) -> bool:
        return misses > MISSES_SHARE * needs or turn % (EVERY << min(settled, DOUBLINGS)) == 0

    def choose(self, snapshot: Snapshot) -> Choice:
        most = snapshot.blocks.size + snapshot.reads.shape[1]
        found, worths = np.empty((most, 3), np.int64), np.empty(most)
        # A time of its own for each look, by which a record is known that it has come to: forks share blocks, and are answered together.
        now = max(snapshot.now, math.nextafter(self.looked, math.inf))
        passed, self.looked = now - self.looked, now
        asked = *snapshot[:-2], now, snapshot.last, self._weight(snapshot.now), self.near, self.floor, self.asks, passed
        count, known, needs = weigh(*asked, found, worths)
        settled = count < needs // SETTLED or not snapshot.reads.size + count + known
        return Choice(found[:count], worths[:count], self.displace, found[most - known :, 0], worths[most - known :], settled)

    def rescale(self, now: float) -> float:
        if now - self.since < RESCALE_AT * self.half_life:
            return 1.0
        self.since += RESCALE_AT * self.half_life
        return float(2.0**-RESCALE_AT)

    def _weight(self, now: float) -> float:
        return float(2.0 ** ((now - self.since) / self.half_life))
