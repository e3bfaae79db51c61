"""Tensors of either library become raw arrays and back, bit for bit; what does not fit is named."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tierd_client.errors import InvalidArgument
from tierd_client.tensors import all_raw, check_pair, joined, like, queries, to_raw

DTYPES = ("float16", "bfloat16", "float32")
BITS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}


def tensor_of(bits: Any, dtype: str, library: str) -> Any:
    """The same bits as a tensor of `library`; numpy's bfloat16 is the bits themselves."""
    if library == "numpy":
        return bits if dtype == "bfloat16" else bits.view(dtype)
    signed = torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.int32).copy())
    return signed.view(getattr(torch, dtype))


def bits_of(tensor: Any) -> Any:
    if isinstance(tensor, torch.Tensor):
        return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy().view(f"u{tensor.itemsize}")
    return np.ascontiguousarray(tensor).view(f"u{tensor.itemsize}")


@given(
    dtype=st.sampled_from(DTYPES),
    library=st.sampled_from(("numpy", "torch")),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    turned=st.booleans(),
    flat=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_there_and_back(dtype: str, library: str, shape: tuple[int, int, int], turned: bool, flat: bool, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << 15, shape).astype(BITS[dtype])
    tensor = tensor_of(bits, dtype, library)
    if turned:
        tensor, bits = tensor.swapaxes(0, 2), bits.swapaxes(0, 2)
    if flat:
        tensor, bits = tensor[:, 0], bits[:, 0]
    raw = queries(to_raw("q", tensor, dtype), bits.shape[0], bits.shape[-1])
    assert (raw.ndim, raw.dtype.name) == (3, "uint16" if dtype == "bfloat16" else dtype)
    back = like(np.ascontiguousarray(raw), tensor)
    assert type(back) is type(tensor) and back.dtype == tensor.dtype and back.shape == tensor.shape
    np.testing.assert_array_equal(bits_of(back), bits)
    back[0] = 0  # the caller's own: writable, and not a view of q
    np.testing.assert_array_equal(bits_of(tensor), bits)


@pytest.mark.parametrize("kind", ["f2", "u2", "f4"])
def test_another_byte_order_is_read_and_given_back(kind: str) -> None:
    swapped = np.arange(6).reshape(2, 1, 3).astype(f">{kind}")
    raw = to_raw("q", swapped, {"f2": "float16", "u2": "bfloat16", "f4": "float32"}[kind])
    assert raw.dtype == np.dtype(kind) and (raw == swapped).all()
    back = like(raw, swapped)
    assert back.dtype == swapped.dtype and (back == swapped).all()


def test_a_tensor_that_wants_gradients_is_read_all_the_same() -> None:
    tensor = torch.ones(2, 3, requires_grad=True)
    np.testing.assert_array_equal(to_raw("q", tensor, "float32"), np.ones((2, 3)))
    assert not like(np.ones((2, 1, 3), np.float32), tensor).requires_grad


@pytest.mark.parametrize(
    ("tensor", "dtype", "said"),
    [
        (np.zeros((1, 1)), "float32", "x is numpy float64; the session's geometry says float32"),
        (torch.zeros(1, 1), "bfloat16", "x is float32; the session's geometry says bfloat16"),
        (np.zeros((1, 1), np.float16), "bfloat16", r"x is float16; .* bfloat16 \(as a numpy array: its bits, uint16\)"),
        (np.zeros((1, 1), np.uint16), "float16", "x is bfloat16; .* float16"),
        (np.zeros((1, 1), np.int32), "float32", "x is numpy int32"),
        ([[0.0]], "float32", "x is a list; allowed: torch tensors and numpy arrays"),
        (None, "float32", "x is a NoneType"),
    ],
)
def test_other_types_are_named(tensor: Any, dtype: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        to_raw("x", tensor, dtype)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (3, 8), (4, 1, 7), (4, 0, 8), (4, 1, 8, 1)])
def test_other_shapes_of_queries_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match=r"q has shape .*expected \[4, 8\] or \[4, n, 8\]"):
        queries(np.zeros(shape, np.float32), 4, 8)


def test_pairs_must_agree() -> None:
    check_pair(np.zeros((2, 3, 8)), np.zeros((2, 3, 8)), 2, 8)
    with pytest.raises(InvalidArgument, match=r"v has shape \[2, 8\]; expected \[2, n, 8\]"):
        check_pair(np.zeros((2, 3, 8)), np.zeros((2, 8)), 2, 8)
    with pytest.raises(InvalidArgument, match="must be the same"):
        check_pair(np.zeros((2, 3, 8)), np.zeros((2, 4, 8)), 2, 8)


def test_the_package_imports_neither_torch_nor_the_daemon() -> None:
    script = "import sys, tierd_client, tierd_client.aio, tierd_client.transports.grpc_sync, tierd_client.transports.inproc\n"
    script += "print(sorted({'torch', 'tierd', 'tierd_kernels', 'transformers', 'cupy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


@given(st.sampled_from(DTYPES), st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=3), min_size=1, max_size=3), st.integers(0, 1000))
def test_tensors_that_come_in_one_copy_are_what_they_were(dtype: str, shapes: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = [tensor_of(rng.integers(0, 1 << 15, shape).astype(BITS[dtype]), dtype, "torch").swapaxes(0, 1) for shape in shapes]
    for tensor, back in zip(tensors, joined(tensors), strict=True):
        np.testing.assert_array_equal(back, to_raw("x", tensor, dtype), strict=True)


def test_only_tensors_of_one_gpu_come_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """"meta" stands for a GPU."""
    monkeypatch.setattr("tierd_client.tensors.joined", lambda tensors: ["joined", *tensors])
    monkeypatch.setattr("tierd_client.tensors._raw", lambda tensor: tensor)
    far, near, raw = torch.zeros(2, 3, device="meta"), torch.zeros(2, 3), np.zeros((2, 3), np.float32)
    for others in ((near, near), (raw, raw), (far, far, near), (far, raw, far)):
        given = all_raw({str(i): tensor for i, tensor in enumerate(others)}, "float32")
        assert all(a is b for a, b in zip(given, others, strict=True))
    assert all_raw({"q": far, "k": far, "v": far}, "float32")[0] == "joined"
    for other in (far.half(), None):
        with pytest.raises(InvalidArgument, match="v is "):
            all_raw({"q": far, "k": far, "v": other}, "float32")
