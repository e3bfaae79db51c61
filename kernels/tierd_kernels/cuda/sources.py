"""The CUDA sources, their build options and the shared memory of their launches. Needs no GPU."""

from pathlib import Path

from tierd_kernels.cuda.record import TILE, Record
from tierd_kernels.layout import DTYPE_CODE, Layout

FOLDER = Path(__file__).parent.parent
PARTS = {
    "quantise": ("quantise/quantise.cu",),
    "widen": ("quantise/widen.cu",),
    "gram": ("quantise/gram.cu",),
    "attend": ("score/exact.cuh", "bound/bound.cuh", "score/score.cuh", "attend/stages.cuh", "attend/values.cuh", "attend/attend.cu"),
    "finish": ("bound/bound.cuh", "bound/finish.cu"),
    "finish_many": ("bound/bound.cuh", "bound/finish.cu"),
    "rank": ("bound/rank.cu",),
    "pick": ("bound/bound.cuh", "select/threshold.cuh", "select/pick.cu"),
    "cover": ("bound/bound.cuh", "select/cover.cu"),
    "promote": ("score/exact.cuh", "bound/bound.cuh", "score/score.cuh", "select/originals.cuh", "select/sharing.cuh", "select/promote.cu"),
    "candidates": ("bound/bound.cuh", "select/threshold.cuh", "select/candidates.cu"),
    "dense": ("score/exact.cuh", "dense/finish.cuh", "dense/dense.cu"),
    "canary": ("score/exact.cuh", "score/canary.cu"),
    "gather": ("gather/gather.cu",),
    "self_test": ("cuda/self_test.cu",),
}
# Of a thread block, static and dynamic, and of a multiprocessor, from compute capability 9.0 on.
SHARED_MAX, SHARED_TOTAL = 227 * 1024, 228 * 1024
# As in the sources.
WARPS, LANES, ROW_TILE, COVER_THREADS, RANK_THREADS, QUANTISE_THREADS, GATHER_THREADS = 4, 32, 4, 512, 256, 512, 256
LINE = 128
GROUP_THREADS, GRAM_SIDE = 256, 64  # of what measures groups; of a tile of a Gram matrix
KEY_STAGES, VALUE_STAGES, CHUNK = 2, 2, 8
RESIDENT = 4  # thread blocks of attend on one multiprocessor, of a head dimension up to 128
STATISTIC_WORDS, PARTIALS, SPLITS_MAX, SPLIT_TOKENS_MAX = 32, 17, 2048, 2048
SPLIT_TOKENS_SHORT = 512  # a split of fewer tokens is short
ROW_FACTS, DENSE_FACTS, PICK_PARTS, PICK_GROUPS, PICK_THREADS, PICK_BINS = 7, 6, 32, 2, 256, 64
CANDIDATE_PARTS, CANDIDATE_THREADS = 16, 512
# Thread blocks of selection, and of a KV head those that tell what was read, all calls together: where nothing is promoted each has to come
# and go, one or two at a time on a multiprocessor. Eight sessions of 32,768 tokens spent 16 us of 202 on that, on an H200; of 4,096 tokens
# 11 of 45. One of selection has PICK_GROUPS groups side by side: 24 that had none made a step of 8,192 tokens 19.1 us, not 18.7.
PICK_BLOCKS, READERS = 256, 8
# Rows from which on fewer threads put one together, two of them on a multiprocessor: rung 0 of eight sessions of 4,096 tokens takes an H200
# 30.5 us for 33.8, of 32 sessions 100 for 115; but of one with 131,072 88.6 for 87.3.
MANY_ROWS, FINISHES = 129, ("finish", "finish_many")
PROMOTE_STAGED_SMALL = 13 * 1024  # bytes of a block, at most, of which as many are staged as there are warps


def source(layout: Layout, kernel: str, naive: bool = False) -> tuple[str, tuple[str, ...]]:
    """CUDA C++ of one kernel of `PARTS`, and the options that fix the layout. `naive`: without what only the certificate needs; of attend
    and finish."""
    text = "".join((FOLDER / name).read_text() for name in ("cuda/ptx.cuh", "cuda/common.cuh", *PARTS[kernel]))
    sizes = {"D": layout.head_dim, "BLOCK": layout.block_size, "GROUP": layout.value_group, "DTYPE": DTYPE_CODE[layout.dtype]}
    sizes |= {"NAIVE": 1} if naive else {}
    names = {"FINISH": kernel, "FINISH_WARPS": finish_warps(layout, kernel)} if kernel in FINISHES else {}
    return text, ("--std=c++17", *(f"-D{name}={value}" for name, value in (sizes | names).items()))


def finish_warps(layout: Layout, kernel: str) -> int:
    """Of a thread block of one of `FINISHES`; large heads have no use for fewer."""
    return 8 if kernel == "finish_many" and layout.head_dim <= 128 else 16


def _lines(nbytes: int) -> int:
    """`nbytes`, up to whole lines."""
    return -(-nbytes // LINE) * LINE


def shared_bytes(layout: Layout, kernel: str) -> int:
    """Dynamic shared memory of a kernel's thread block, at most."""
    record, rows = Record(layout), layout.block_size * (layout.head_dim + 1)
    if kernel == "attend":  # what warps stage, of which a trailing block needs less; then sums of values and statistics of the split
        lines = _lines if record.nbytes % LINE == 0 else int
        heads, keys = CHUNK * record.key_codes_at, KEY_STAGES * lines(TILE * record.key_dim + 4 * TILE)
        staged = keys + heads + VALUE_STAGES * lines(record.value_bytes) + lines(record.score_bytes % LINE)
        statistics = STATISTIC_WORDS * SPLIT_TOKENS_MAX // layout.block_size
        sums = WARPS * ROW_TILE * layout.head_dim + statistics + WARPS * PARTIALS * ROW_TILE
        return max(WARPS * staged, 4 * sums)
    if kernel in FINISHES:  # the row's partials
        return 4 * SPLITS_MAX * PARTIALS
    if kernel == "promote":  # of a block original keys and values, its record and statistics; then those of the split, and their sums
        staged = _lines(2 * layout.original_record_bytes + record.nbytes + 4 * STATISTIC_WORDS)
        blocks = WARPS if staged <= PROMOTE_STAGED_SMALL else 1
        return max(blocks * staged, 4 * STATISTIC_WORDS * SPLIT_TOKENS_MAX // layout.block_size + 4 * WARPS * PARTIALS * ROW_TILE)
    if kernel == "canary":  # a record of keys in FP32
        return 4 * rows
    if kernel == "dense":  # the scores of a split; a record in FP32
        return 8 * ROW_TILE * SPLIT_TOKENS_MAX + 4 * rows
    if kernel == "widen":  # a record of values as it is
        return layout.original_record_bytes
    if kernel != "quantise":
        return 0
    return 8 * rows + max(16 * layout.block_size**2, 4 * rows)  # residuals in double; their Gram matrices, or the originals in FP32
