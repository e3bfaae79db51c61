"""Times of graphs on a CUDA device, of our kernels and of dense attention."""

from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROUNDS = 60
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Times = dict[str, float]


def percentiles(samples_us: list[float]) -> Times:
    return dict(zip(("p20_us", "p50_us", "p80_us"), np.percentile(samples_us, [20, 50, 80]).tolist(), strict=True))


def timed(run: Callable[[], None], stream: Any, repeats: int) -> Times:
    """Microseconds of one of the `repeats` steps that `run` holds."""
    samples = []
    with stream:
        for _ in range(10):
            run()
        for _ in range(ROUNDS):
            start, stop = cp.cuda.Event(), cp.cuda.Event()
            start.record(stream)
            run()
            stop.record(stream)
            stop.synchronize()
            samples.append(cp.cuda.get_elapsed_time(start, stop) * 1e3 / repeats)
    return percentiles(samples)


def captured(run: Callable[[Any], None], stream: Any) -> Any:
    run(stream)
    stream.synchronize()
    stream.begin_capture()
    run(stream)
    return stream.end_capture()


def dense(name: str, groups: list[list[tuple[torch.Tensor, ...]]]) -> Times:
    """Groups of sessions, each answered in one call."""
    stacked = [tuple(torch.stack(x) for x in zip(*group, strict=True)) for group in groups]

    def run() -> None:
        for k, v, q in stacked:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with sdpa_kernel(BACKENDS[name]):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        stream = cp.cuda.Stream(non_blocking=True)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            return timed(graph.replay, stream, len(groups))


def profile(graph: Any, stream: Any, steps: int) -> dict[str, Any]:
    """Of the kernels of a graph of so many steps, from a trace: how many a step has, the microseconds from each one's first thread block to
    its last, while it may wait for the one ahead, and the share of the time in which any runs."""
    replays = 5
    cp.cuda.Device().synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(replays):
            graph.launch(stream)
        stream.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    steps, by_name = replays * steps, dict[str, float]()
    for event in events:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us() / steps
    ranges = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, until = 0.0, ranges[0][0]
    for start, end in ranges:
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
    return {"kernels_per_step": len(events) / steps, "busy": busy / (until - ranges[0][0]), "us_by_kernel": by_name}
