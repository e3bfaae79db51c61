"""Spectral bounds of groups of blocks, in double on the device. Needs CuPy."""

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from tierd_kernels.cuda.launch import kernel
from tierd_kernels.cuda.memory import DeviceMemory
from tierd_kernels.cuda.record import Record
from tierd_kernels.cuda.sources import GRAM_SIDE, GROUP_THREADS, shared_bytes
from tierd_kernels.cuda.staging import Region
from tierd_kernels.layout import Layout
from tierd_kernels.numerics import Array
from tierd_kernels.quantise.reference import SPECTRAL_ROOM

LEAST = 2.0**-126  # FP32's smallest normal: kernels flush what is below


def records_at(
    layout: Layout, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Where each KV head's values lie in the originals, and its record in hot: int64 [G, Hkv, n] of blocks [G, n]."""
    head = np.arange(layout.num_kv_heads)[:, None]
    values = original_offsets[:, None] + (layout.num_kv_heads + head) * layout.original_record_bytes
    return values, hot_offsets[:, None] + head * Record(layout).nbytes


def widen(layout: Layout, memory: DeviceMemory, values_at: int, records_at: int, out: int, pairs: int, per: int) -> None:
    """V and V - V_hat of `pairs` runs of `per` records, float64 [pairs, 2, per * B, d] at `out`; offsets int64 [pairs, per]. Addresses."""
    args = (*map(np.uint64, (memory.originals_at, memory.hot_at, values_at, records_at, out)), np.int32(per))
    kernel(layout, "widen")((pairs * per,), (GROUP_THREADS,), args, shared_mem=shared_bytes(layout, "widen"), stream=memory.stream)


def group_bounds(
    layout: Layout, memory: DeviceMemory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
) -> NDArray[np.float32]:
    """SV and SR, float32 [2, G, Hkv], of G groups of full blocks; offsets [G, blocks of a group].

    Pairs of a group and a KV head go through the workspace, which calls do not need meanwhile, as many at once as it holds: 204 of
    1024 tokens and 128 channels. A pair takes 2 MiB there in double, two Gram matrices 256 KiB each; nothing but the facts is allocated.
    """
    (groups, per), heads, d = hot_offsets.shape, layout.num_kv_heads, layout.head_dim
    assert per * layout.block_size <= 1024, "SPECTRAL_ROOM is for 1024 terms"
    pairs, sides = groups * heads, -(-d // GRAM_SIDE)
    sizes = 16 * per * layout.block_size * d, 16 * d * d, 16 * d * d
    at_once = memory.workspace.nbytes // sum(sizes)
    values_at, hot_at = records_at(layout, original_offsets, hot_offsets)
    places, facts = cp.asarray(np.stack([values_at, hot_at])), cp.empty((2, pairs, 2, sides * (sides + 1) // 2, 2))
    (from_values, from_hot), (of_gram, of_fourth) = ([int(x.data.ptr) for x in y] for y in (places, facts))
    region = Region(memory.workspace.nbytes)
    x, gram, squared = (int(memory.workspace.data.ptr) + region.take(at_once * size) for size in sizes)
    for start in range(0, pairs, at_once):
        count = min(at_once, pairs - start)
        trace, total = (at + start * facts[0, 0].nbytes for at in (of_gram, of_fourth))
        widen(layout, memory, from_values + start * 8 * per, from_hot + start * 8 * per, x, count, per)
        for source, before, out, out_facts, rows in (
            (x, 0, gram, trace, per * layout.block_size), (gram, trace, squared, total, d), (squared, 0, gram, total, d),
        ):  # fmt: skip
            args = (*map(np.uint64, (source, before, out, out_facts)), np.int32(rows))
            kernel(layout, "gram")((facts.shape[3], 2 * count), (GROUP_THREADS,), args, stream=memory.stream)
    sums: Array = facts.get(stream=memory.stream).sum(axis=3).reshape(2, groups, heads, 2, 2)
    memory.stream.synchronize()
    return np.moveaxis(_above(sums[0, ..., 0], sums[1, ..., 1]), -1, 0)


def _above(trace: Array, total: Array) -> NDArray[np.float32]:
    """As `quantise/reference.py::spectral_norm_above`, from the trace of x^T x and the squared norm of the fourth power of what it is over
    its trace; rounded up, and never subnormal."""
    with np.errstate(invalid="ignore", over="ignore"):
        above = np.sqrt(trace * np.minimum(1.0, total**0.125)) * SPECTRAL_ROOM
        above = np.where(trace < np.inf, np.maximum(above, LEAST), np.inf)
        single = above.astype(np.float32)
        return np.where(trace == 0, np.float32(0), np.where(single < above, np.nextafter(single, np.float32(np.inf)), single))
