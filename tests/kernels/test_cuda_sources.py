"""What can be held of the CUDA kernels without a GPU: the record's layout, and that every source compiles for sm_90 as it should."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tierd_kernels.cuda.record import KEYS_RAW, LANES, NOTES, TILE, VALUES_RAW, Record, encode
from tierd_kernels.cuda.sources import PARTS, RESIDENT, SHARED_MAX, SHARED_TOTAL, shared_bytes, source
from tierd_kernels.layout import BLOCK_SIZES, HEAD_DIMS, VALUE_GROUPS, Layout
from tierd_kernels.quantise.reference import quantise_block

NVCC = shutil.which("nvcc")
MMA = dict.fromkeys(("attend", "promote"), ("mma.sync.aligned.m16n8k32.row.col.s32.s8", "mma.sync.aligned.m16n8k16.row.col.f32.f16"))
REGISTERS_MAX, SPILL_BYTES_MAX = 255, 16  # a pair of registers, outside of the loops
LAYOUTS = [Layout(2, 128, 16, 16, "float16"), Layout(1, 256, 64, 32, "float32"), Layout(3, 80, 32, 16, "bfloat16")]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(HEAD_DIMS), st.sampled_from(BLOCK_SIZES), st.sampled_from(VALUE_GROUPS), st.integers(0, 2**32 - 1))
def test_a_record_holds_every_code_and_scale_where_a_lane_looks_for_it(d: int, B: int, group: int, seed: int) -> None:
    random, layout = np.random.default_rng(seed), Layout(1, d, B, group, "float16")
    block = quantise_block(*(random.standard_normal((B, d)).astype(np.float16) for _ in range(2)), layout)
    record, raw = Record(layout), encode(block, layout)
    assert raw.size == record.nbytes and record.nbytes % 16 == record.score_bytes % 16 == record.value_bytes % 16 == 0
    lane = int(random.integers(LANES))
    r, c, tile, byte = lane // 4, lane % 4, int(random.integers(B // TILE)), int(random.integers(16))
    step = int(random.integers(record.key_dim // 32))
    token, channel = tile * TILE + r + 8 * (byte // 4 % 2), 32 * step + 8 * c + 4 * (byte // 8) + byte % 4
    code = raw[record.key_codes_at + ((tile * (record.key_dim // 32) + step) * LANES + lane) * 16 + byte].view(np.int8)
    assert code == (block.key_codes_Bd[token, channel] if channel < d else 0)
    part = raw[record.score_bytes + tile * record.value_bytes :]
    m, place = int(random.integers(d // 16)), int(random.integers(8))
    word = part[(m * LANES + lane) * 4 :][:4].view(np.uint32)[0]
    token, channel = 2 * c + 8 * (place % 2) + place // 4, 16 * m + r + 8 * (place // 2 % 2)
    assert word >> (4 * place) & 15 == block.value_codes_Bd[tile * TILE + token, channel]
    pairs = part[record.value_scales_at + (channel // group * 4 + c) * 16 :][:16].view(np.float16)
    at = 2 * (place % 2) + place // 4
    assert pairs[at] == block.value_scale_BG[tile * TILE + token, channel // group]
    assert pairs[4 + at] == block.value_offset_BG[tile * TILE + token, channel // group]
    notes = raw[record.notes_at : record.notes_at + 4 * NOTES].view(np.float32)
    assert np.array_equal(notes[:8], block.annotations)
    assert notes[KEYS_RAW : VALUES_RAW + 1].view(np.uint32).tolist() == [block.raw_keys, block.raw_values]


def built(kernel: str, layout: Layout, folder: Path) -> str:
    """What the assembler says of a kernel; its PTX is in the folder."""
    text, options = source(layout, kernel)
    (folder / "kernel.cu").write_text(text)
    assert NVCC is not None
    command = [NVCC, "-arch=sm_90", *options, "-Xptxas", "-v", "-keep", "-keep-dir", str(folder), "-cubin", "-o", str(folder / "out")]
    done = subprocess.run([*command, str(folder / "kernel.cu")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    return done.stderr


def shared(kernel: str, layout: Layout, said: str) -> int:
    """Bytes of a thread block, static and dynamic."""
    return sum(map(int, re.findall(r"(\d+) bytes smem", said))) + shared_bytes(layout, kernel)


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.head_dim}-{x.block_size}-{x.value_group}-{x.dtype}")
@pytest.mark.parametrize("kernel", PARTS)
def test_a_source_compiles_for_hopper_within_its_registers(kernel: str, layout: Layout, tmp_path: Path) -> None:
    said = built(kernel, layout, tmp_path)
    assert max(map(int, re.findall(r"(\d+) bytes spill", said))) <= SPILL_BYTES_MAX, said
    (registers,) = re.findall(r"Used (\d+) registers", said)
    assert shared(kernel, layout, said) <= SHARED_MAX and int(registers) < REGISTERS_MAX
    ptx = (tmp_path / "kernel.ptx").read_text()
    for instruction in MMA.get(kernel, ()):
        assert instruction in ptx
    if kernel in MMA:
        assert "cp.async.bulk.shared" in ptx and ".local" not in ptx  # no array that is indexed at run time


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize(("kernel", "block_size"), [("attend", 16), ("attend", 64), ("promote", 16)])
def test_four_thread_blocks_share_a_multiprocessor(kernel: str, block_size: int, tmp_path: Path) -> None:
    """As many as splits are cut for; a fifth would take turns with them on some multiprocessors and not on others."""
    reserved, layout = 1024, replace(LAYOUTS[0], block_size=block_size)
    said = built(kernel, layout, tmp_path)
    own = shared(kernel, layout, said) + reserved
    assert max(map(int, re.findall(r"(\d+) bytes spill", said))) == 0  # of 128 registers
    assert RESIDENT * own <= SHARED_TOTAL < (RESIDENT + 1) * own
