"""The CUDA sources, their build options and the shared memory of their launches. Needs no GPU."""

from pathlib import Path

from tierd_kernels.cuda.record import TILE, Record
from tierd_kernels.layout import DTYPE_CODE, Layout

FOLDER = Path(__file__).parent.parent
PARTS = {
    "quantise": ("quantise/quantise.cu",),
    "widen": ("quantise/widen.cu",),
    "gram": ("quantise/gram.cu",),
    "score": ("score/exact.cuh", "bound/bound.cuh", "score/score.cu"),
    "value": ("bound/bound.cuh", "attend/value.cu"),
    "finish": ("bound/bound.cuh", "bound/finish.cu"),
    "rank": ("bound/rank.cu",),
    "pick": ("bound/bound.cuh", "select/threshold.cuh", "select/pick.cu"),
    "cover": ("bound/bound.cuh", "select/cover.cu"),
    "promote": ("score/exact.cuh", "bound/bound.cuh", "select/originals.cuh", "select/sharing.cuh", "select/promote.cu"),
    "candidates": ("bound/bound.cuh", "select/threshold.cuh", "select/candidates.cu"),
    "dense": ("score/exact.cuh", "dense/finish.cuh", "dense/dense.cu"),
    "canary": ("score/exact.cuh", "score/canary.cu"),
    "gather": ("gather/gather.cu",),
    "self_test": ("cuda/self_test.cu",),
}
SHARED_MAX = 227 * 1024  # of a thread block, static and dynamic, from compute capability 9.0 on
# As in the sources.
WARPS, LANES, ROW_TILE, FINISH_THREADS, COVER_THREADS, RANK_THREADS, QUANTISE_THREADS, GATHER_THREADS = 4, 32, 4, 512, 512, 256, 512, 256
LINE = 128
GROUP_THREADS, GRAM_SIDE = 256, 64  # of what measures groups; of a tile of a Gram matrix
SCORE_STAGES, SCORE_CHUNK, VALUE_STAGES = 2, 8, 4
RESIDENT = 4  # thread blocks of a pass on one multiprocessor, of a head dimension up to 128
# A thread block of the value pass begins where one of the score pass has ended, in the shared memory that it left: that must do for it, and
# not for a fifth (131,072 tokens: 142 us where it was 1 KB too small, 152 where some multiprocessors took five and others three, else 137;
# with blocks of 64 the naive passes took 94 us on an H200, and 80 with no more than four).
SCORE_SPARE, VALUE_LEAST = 2048, 44 * 1024
STATISTIC_WORDS, PARTIALS, SUMMED, SKIPS, SPLITS_MAX, SPLIT_TOKENS_MAX = 32, 19, 17, 4, 2048, 2048
SPLIT_TOKENS_SHORT = 512  # a split of fewer tokens is short
ROW_FACTS, DENSE_FACTS, PICK_PARTS, PICK_THREADS, PICK_BINS, READERS = 7, 6, 32, 256, 64, 8
CANDIDATE_PARTS, CANDIDATE_THREADS = 16, 512
TILE_WEIGHT_FLOATS = ROW_TILE * TILE + ROW_TILE
PROMOTE_STAGED_SMALL = 11 * 1024  # bytes of a block, at most, of which four are staged


def source(layout: Layout, kernel: str, naive: bool = False) -> tuple[str, tuple[str, ...]]:
    """CUDA C++ of one kernel of `PARTS`, and the options that fix the layout. `naive`: without what only the certificate needs; of score,
    value and finish."""
    text = "".join((FOLDER / name).read_text() for name in ("cuda/ptx.cuh", "cuda/common.cuh", *PARTS[kernel]))
    sizes = {"D": layout.head_dim, "BLOCK": layout.block_size, "GROUP": layout.value_group, "DTYPE": DTYPE_CODE[layout.dtype]}
    sizes |= {"NAIVE": 1} if naive else {}
    return text, ("--std=c++17", *(f"-D{name}={value}" for name, value in sizes.items()))


def _lines(nbytes: int) -> int:
    """`nbytes`, up to whole lines."""
    return -(-nbytes // LINE) * LINE


def shared_bytes(layout: Layout, kernel: str) -> int:
    """Dynamic shared memory of a kernel's thread block, at most."""
    record, rows = Record(layout), layout.block_size * (layout.head_dim + 1)
    if kernel == "score":  # a warp's codes under way, scales and offsets of chunks; the trailing block's keys or values in FP32
        staged = SCORE_STAGES * _lines(record.score_bytes - record.key_codes_at) + LINE
        staged += SCORE_CHUNK * (record.key_codes_at + 2 * record.key_dim)
        return max(WARPS * staged + SCORE_SPARE, 4 * rows)
    if kernel == "value":  # tiles of tokens with their weights under way, a warp's sums; statistics of a split
        staged = max(VALUE_STAGES * (record.value_bytes + 4 * TILE_WEIGHT_FLOATS), 4 * ROW_TILE * layout.head_dim)
        own = WARPS * staged + LINE + 4 * STATISTIC_WORDS * SPLIT_TOKENS_MAX // layout.block_size
        return max(own, min(VALUE_LEAST, shared_bytes(layout, "score")))
    if kernel == "finish":  # the row's partials and skips
        return 4 * SPLITS_MAX * (SUMMED + SKIPS)
    if kernel == "promote":  # of a block original keys and values, coded values, weights, norms, notes; then the split's statistics
        staged = 2 * layout.original_record_bytes + layout.block_size // TILE * (record.value_bytes + 4 * TILE_WEIGHT_FLOATS)
        staged = _lines(staged + 4 * layout.block_size + 64)
        blocks = 4 if staged <= PROMOTE_STAGED_SMALL else 1
        return max(blocks * staged, 4 * STATISTIC_WORDS * SPLIT_TOKENS_MAX // layout.block_size)
    if kernel == "canary":  # a record of keys in FP32
        return 4 * rows
    if kernel == "dense":  # the scores of a split; a record in FP32
        return 8 * ROW_TILE * SPLIT_TOKENS_MAX + 4 * rows
    if kernel == "widen":  # a record of values as it is
        return layout.original_record_bytes
    if kernel != "quantise":
        return 0
    return 8 * rows + max(16 * layout.block_size**2, 4 * rows)  # residuals in double; their Gram matrices, or the originals in FP32
