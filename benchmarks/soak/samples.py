"""What a soak's samples say of leaks: one row is what the daemon and the system said at a moment."""

import time
from typing import Any

import numpy as np
from daemon import Daemon
from tally import Tally

Row = dict[str, float]
# Of the median of the last tenth over that of the second quarter: from sample to sample it goes up and down by 20, as messages of 2 MB come
# and go. In the first quarter what has a limit fills: on an H100, where 128 CUDA graphs are kept, it grew by 15 in a minute of three.
RSS_MARGIN_MIB = 16.0
MUST_BE_ZERO = "sessions", "copies", "workers", "blocks", "tokens", "queue", "request_bytes"
# Of the engine's events the ones that should not happen, whatever workers do.
BAD_EVENTS = "fault", "broken_promise", "corrupt_original", "corrupt_copy", "failed_copy", "canary_repaired", "device_lost"
GIVEN_BACK_S = 30.0  # for the daemon to notice that all have gone
COUNTED = "sessions", "workers_connected", "copies", "blocks", "hits", "misses", "prefetched", "evicted", "head_steps"


def sample(daemon: Daemon, tally: Tally, killed: int, began_s: float) -> Row:
    """A row of now."""
    status = daemon.status()
    used = {f"{name}_used_bytes": float(pool["used_bytes"]) for name, pool in status["pools"].items()}
    counted = {name: float(status[name]) for name in COUNTED}
    counted["daemon_head_steps"] = counted.pop("head_steps")
    mine = {"seconds": time.monotonic() - began_s, "calls": float(tally.calls), "workers_killed": float(killed)}
    return mine | counted | used | daemon.memory()


def given_back(daemon: Daemon) -> dict[str, Any]:
    """The status once nothing is held, or of the moment when that had taken too long."""
    until_s = time.monotonic() + GIVEN_BACK_S
    while (status := daemon.status()) and (left_over(status) or status["workers_connected"] > 1) and time.monotonic() < until_s:
        time.sleep(0.1)
    return status


def left_over(status: dict[str, Any]) -> list[str]:
    """What is still held by nobody, in words."""
    counts = [f"{status[name]} {name.replace('_', ' ')}" for name in MUST_BE_ZERO if status[name]]
    return counts + [f"{pool['used_bytes']} bytes of the pool {name}" for name, pool in status["pools"].items() if pool["used_bytes"]]


def pools_left_bytes(status: dict[str, Any]) -> int:
    return sum(pool["used_bytes"] for pool in status["pools"].values())


def leaks(status: dict[str, Any]) -> list[str]:
    """Problems of the last status, all workers gone but the monitor."""
    problems = [f"all workers have left, and the daemon still holds {what}" for what in left_over(status)]
    if status["workers_connected"] != 1:
        problems.append(f"all workers have left, and {status['workers_connected'] - 1} are connected")
    return problems + [f"the daemon counts {status['events'][name]} of {name}" for name in BAD_EVENTS if status["events"].get(name)]


def growth(rows: list[Row]) -> list[str]:
    """Problems of the resident memory over time: it may be no more in the end than in the second quarter."""
    rss = np.array([row["rss_mib"] for row in rows])
    early, late = float(np.median(rss[len(rss) // 4 : max(1, len(rss) // 2)])), float(np.median(rss[-max(1, len(rss) // 10) :]))
    if late > early + RSS_MARGIN_MIB:
        return [f"resident memory grew from {early:.1f} MiB in the second quarter to {late:.1f} in the end; allowed: {RSS_MARGIN_MIB} more"]
    return []


def rss_mb_per_1000_calls(rows: list[Row]) -> float:
    """The slope of the resident memory over the last half of the rows, by least squares, MB a thousand calls."""
    half = rows[len(rows) // 2 :]
    slope, _ = np.polyfit([row["calls"] for row in half], [row["rss_mib"] * 2**20 / 1e6 for row in half], 1)
    return 1000.0 * float(slope)
