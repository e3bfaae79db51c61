"""The weights that promotion takes back, of every block."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.cuda.sources import source

SOURCE = """
extern "C" __global__ void coded_weights(const Call *call, int heads, int group, float *out) {
  __shared__ Scratch room;
  __shared__ __align__(128) unsigned char record[RECORD_BYTES];
  const int tiles = (group * call->n + ROW_TILE - 1) / ROW_TILE, h = blockIdx.x / tiles, tile = blockIdx.x % tiles, block = blockIdx.y;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const unsigned char *from = call->pool + call->hot[block] + (i64)h * RECORD_BYTES;
  for (int i = threadIdx.x; i < RECORD_BYTES; i += THREADS) record[i] = from[i];
  leave_query(*call, read_query(*call, h, group, tile * ROW_TILE + (lane >> 3), lane % 4, lane >> 2 & 1), room);
  __syncthreads();
  const float top = statistic(call->statistics + ((i64)blockIdx.x * (call->full + 1) + block) * STATISTIC_WORDS, block, warp, TOP);
  float w[TILES];
  weights_of_codes(record, block, warp, top, room, w);
  for (int t = 0; t < TILES; t++)
    if (lane < TILE) out[(((i64)blockIdx.x * call->full + block) * ROW_TILE + warp) * BLOCK + t * TILE + lane] = w[t];
}
"""


def coded_weights(step: Any) -> NDArray[np.float32]:
    """Of a step of one call whose rung 0 has run, relative to the block's largest, [tiles of all KV heads, full, 4, B]."""
    import cupy
    from tierd_kernels.cuda.launch import CALL

    layout, memory = step.layout, step.memory
    call = memory.inputs.view(step.at - memory.inputs.at, (1,), CALL)[0]
    tiles, full = layout.num_kv_heads * -(-step.grid.group * int(call["n"]) // 4), int(call["full"])
    text, options = source(layout, "promote")
    kernel = cupy.RawModule(code=text + SOURCE, options=options, backend="nvrtc").get_function("coded_weights")
    out = cupy.asarray(np.full((tiles, full, 4, layout.block_size), np.nan, np.float32))
    cupy.cuda.Device().synchronize()
    kernel((tiles, full), (128,), (np.uint64(step.at), np.int32(layout.num_kv_heads), np.int32(step.grid.group), out))
    cupy.cuda.Device().synchronize()
    return np.array(out.get())
