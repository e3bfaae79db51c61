"""The CUDA sources, their build options and the shared memory of their launches. Needs no GPU."""

from pathlib import Path

from tierd_kernels.cuda.record import TILE, Record
from tierd_kernels.layout import DTYPE_CODE, Layout

FOLDER = Path(__file__).parent.parent
PARTS = {
    "quantise": ("quantise/quantise.cu",),
    "widen": ("quantise/widen.cu",),
    "gram": ("quantise/gram.cu",),
    "score": ("score/exact.cuh", "bound/bound.cuh", "score/score.cuh", "score/score.cu"),
    "value": ("bound/bound.cuh", "attend/values.cuh", "attend/value.cu"),
    "attend": ("score/exact.cuh", "bound/bound.cuh", "score/score.cuh", "attend/values.cuh", "attend/attend.cu"),
    "finish": ("bound/bound.cuh", "bound/finish.cu"),
    "finish_many": ("bound/bound.cuh", "bound/finish.cu"),
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
# Of a thread block, static and dynamic, and of a multiprocessor, from compute capability 9.0 on.
SHARED_MAX, SHARED_TOTAL = 227 * 1024, 228 * 1024
ATTEND_BESIDE = 13 * 1024  # of attend's thread blocks, static arrays and what is reserved, with head dimensions up to 128
# As in the sources.
WARPS, LANES, ROW_TILE, COVER_THREADS, RANK_THREADS, QUANTISE_THREADS, GATHER_THREADS = 4, 32, 4, 512, 256, 512, 256
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
JOINT_TOKENS = 512  # of a split, at most, whose passes are one kernel
BRIEF_TOKENS = 256  # of a split, at most, whose weights stay in shared memory besides
ROW_FACTS, DENSE_FACTS, PICK_PARTS, PICK_THREADS, PICK_BINS = 7, 6, 32, 256, 64
CANDIDATE_PARTS, CANDIDATE_THREADS = 16, 512
# Thread blocks of selection, and of a KV head those that tell what was read, all calls together: where nothing is promoted each has to come
# and go, one or two at a time on a multiprocessor. Eight sessions of 32,768 tokens spent 16 us of 202 on that, on an H200; of 4,096 tokens
# 11 of 45.
PICK_BLOCKS, READERS = 256, 8
# Rows from which on fewer threads put one together, two of them on a multiprocessor: rung 0 of eight sessions of 4,096 tokens takes an H200
# 30.5 us for 33.8, of 32 sessions 100 for 115; but of one with 131,072 88.6 for 87.3.
MANY_ROWS, FINISHES = 129, ("finish", "finish_many")
TILE_WEIGHT_FLOATS, KEPT_TILE_BYTES = ROW_TILE * TILE + ROW_TILE, 8 * ROW_TILE * TILE  # the latter: of a brief split's weights
PROMOTE_STAGED_SMALL = 11 * 1024  # bytes of a block, at most, of which four are staged


def passes_of(layout: Layout, split_tokens: int, a_processor: float) -> tuple[bool, bool]:
    """Whether splits, of so many tokens at most and so many thread blocks to a multiprocessor, have both passes in one kernel, and whether
    that keeps their weights. In two waves it is slower: of 32,768 tokens in blocks of 64 rung 0 takes an H200 35.9 us for 33.2."""
    brief = split_tokens <= BRIEF_TOKENS
    resident = min(RESIDENT, SHARED_TOTAL // (attend_bytes(layout, brief) + ATTEND_BESIDE))
    joint = split_tokens <= JOINT_TOKENS and a_processor <= resident
    return joint, joint and brief


def source(layout: Layout, kernel: str, naive: bool = False) -> tuple[str, tuple[str, ...]]:
    """CUDA C++ of one kernel of `PARTS`, and the options that fix the layout. `naive`: without what only the certificate needs; of score,
    value, both in one, and finish."""
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


def attend_bytes(layout: Layout, brief: bool) -> int:
    """Dynamic shared memory of a thread block of attend: as for scores; where splits are `brief`, their weights besides."""
    return shared_bytes(layout, "score") - SCORE_SPARE + (BRIEF_TOKENS // TILE * KEPT_TILE_BYTES if brief else 0)


def shared_bytes(layout: Layout, kernel: str) -> int:
    """Dynamic shared memory of a kernel's thread block, at most."""
    record, rows = Record(layout), layout.block_size * (layout.head_dim + 1)
    if kernel == "attend":
        return attend_bytes(layout, True)
    if kernel == "score":  # a warp's codes under way, scales and offsets of chunks; the trailing block's keys or values in FP32
        staged = SCORE_STAGES * _lines(record.score_bytes - record.key_codes_at) + LINE
        staged += SCORE_CHUNK * (record.key_codes_at + 2 * record.key_dim)
        return max(WARPS * staged, 4 * rows) + SCORE_SPARE
    if kernel == "value":  # tiles of tokens with their weights under way, a warp's sums; statistics of a split
        staged = max(VALUE_STAGES * (record.value_bytes + 4 * TILE_WEIGHT_FLOATS), 4 * ROW_TILE * layout.head_dim)
        own = WARPS * staged + LINE + 4 * STATISTIC_WORDS * SPLIT_TOKENS_MAX // layout.block_size
        return max(own, min(VALUE_LEAST, shared_bytes(layout, "score")))
    if kernel in FINISHES:  # the row's partials and skips
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
