"""What Prometheus sees: the engine's status at each scrape, and how long calls took."""

from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tierd.commands import Command
from tierd.engine.timed import TimedFuture

SCRAPE_TIMEOUT_S = 10.0
BUCKETS_S = tuple(base * 10.0**exponent for exponent in range(-5, 2) for base in (1, 2, 5))  # 10 us to 50 s
GAUGES = {
    "sessions": "sessions open",
    "workers": "workers that hold a session",
    "queue": "commands waiting",
    "blocks": "blocks stored",
    "tokens": "tokens stored, all layers",
    "copies": "copies of originals in the scratch cache",
    "workers_connected": "workers with an open stream",
    "calls_under_way": "calls admitted and not answered",
    "request_bytes": "bytes of requests under way",
}
COUNTERS = {
    "commands": "commands completed",
    "launches": "kernel launches",
    "head_steps": "pairs of query head and token answered",
    "exact_heads": "of these, answered exactly",
    "promoted_blocks": "blocks read as originals",
    "skipped_blocks": "blocks left out under their bound",
    "host_bytes": "originals read from the host",
    "canaries": "blocks scored again from originals",
    "hits": "originals read from the scratch cache",
    "misses": "originals read from the host while promoted",
    "prefetched": "originals copied ahead of need",
    "late": "of the misses, those whose copy was on its way",
    "wasted": "copies dropped without having been read",
    "evicted": "copies dropped for better ones",
}


class Metrics:
    """One daemon's registry. `status`: numbers as the `Status` command gives them, called on the scraper's thread."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StatusCollector(status))
        self._queue_s = Histogram(
            "tierd_call_queue_seconds", "waiting for the engine", ["command"], buckets=BUCKETS_S, registry=self.registry
        )
        self._compute_s = Histogram(
            "tierd_call_compute_seconds", "from taken to answered", ["command"], buckets=BUCKETS_S, registry=self.registry
        )
        self._of_command = {
            kind: (self._queue_s.labels(kind.__name__), self._compute_s.labels(kind.__name__)) for kind in Command.__subclasses__()
        }  # looked up once: a label costs more than an observation
        self._errors = Counter("tierd_call_errors", "calls that failed", ["code"], registry=self.registry)

    def observe(self, command: Command, future: TimedFuture) -> None:
        """Count an answered command."""
        queue_s, compute_s = self._of_command[type(command)]
        queue_s.observe(future.queue_s)
        compute_s.observe(future.compute_s)

    def count_error(self, code: str) -> None:
        self._errors.labels(code).inc()


class MetricsEndpoint:
    """Serves a registry on 127.0.0.1:`port` (0: any) from a thread of its own. Raises OSError if the port is taken."""

    def __init__(self, metrics: Metrics, port: int) -> None:
        served: tuple[WSGIServer, Thread] = start_http_server(port, "127.0.0.1", metrics.registry)
        self._server, self._thread = served
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _StatusCollector(Collector):
    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterator[Metric]:
        """Empty: registering must not ask an engine that does not run yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield InfoMetricFamily("tierd", "what runs", value={name: status[name] for name in ("backend", "epoch")})
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"tierd_{name}", text, value=status[name])
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"tierd_{name}", text, value=status[name])
        pools = GaugeMetricFamily("tierd_pool_bytes", "bytes of a pool", labels=["pool", "state"])
        for pool, sizes in status["pools"].items():
            pools.add_metric([pool, "used"], sizes["used_bytes"])
            pools.add_metric([pool, "free"], sizes["free_bytes"])
        yield pools
        yield from _tiering(status)
        events = CounterMetricFamily("tierd_events", "rare events, by name", labels=["event"])
        for event, count in status["events"].items():
            events.add_metric([event], count)
        yield events


def _tiering(status: dict[str, Any]) -> Iterator[Metric]:
    tiering = status["tiering"]
    link = CounterMetricFamily("tierd_link_bytes", "bytes of originals over the host link, by cause", labels=["cause"])
    for cause in ("demand", "prefetch", "wasted"):  # wasted ones are prefetched ones
        link.add_metric([cause], status[f"{cause}_bytes"])
    link.add_metric(["retry"], tiering["retry_bytes"])
    yield link
    yield GaugeMetricFamily("tierd_link_share", "part of the host link that was used since the start", value=tiering["link_share"])
    records = CounterMetricFamily("tierd_session_records", "originals by what became of them", labels=["session", "layer", "outcome"])
    for account in tiering["sessions"]:
        for outcome in ("hits", "misses", "late", "prefetched", "wasted"):
            for layer, amount in enumerate(account["layers"][outcome]):
                if amount:
                    records.add_metric([str(account["session"]), str(layer), outcome], amount)
    yield records
