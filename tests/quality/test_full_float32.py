"""Float32 is only called so where it has float32's bits."""

from collections.abc import Callable
from typing import Any

import checkpoints
import full_float32
import pytest
import tiny
import torch
from full_float32 import require_float32

CPU = torch.device("cpu")


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to ten bits behind the point, as a tensor core reads float32."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


@pytest.fixture(params=[tf32, bf16])
def rounding(request: pytest.FixtureRequest) -> Callable[[torch.Tensor], torch.Tensor]:
    chosen: Callable[[torch.Tensor], torch.Tensor] = request.param
    return chosen


def test_a_processor_has_all_bits_and_tf32_is_forbidden() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        require_float32(CPU)
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_attention_that_rounds_what_it_reads_is_found(
    rounding: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = full_float32.scaled_dot_product_attention

    def rounded(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return inner(*map(rounding, tensors), **options)

    monkeypatch.setattr(full_float32, "scaled_dot_product_attention", rounded)
    with pytest.raises(ArithmeticError, match=r"attention in float32 on cpu gives 0\.5.*right is 0\.731"):
        require_float32(CPU)


def test_products_that_round_what_they_read_are_found(
    rounding: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: inner(rounding(a), rounding(b)))
    with pytest.raises(ArithmeticError, match=r"a product of matrices in float32 on cpu gives 1\.0, right is 1\.00012"):
        require_float32(CPU)


@pytest.mark.parametrize(("dtype", "asked"), [("float32", 1), ("bfloat16", 0)])
def test_it_is_asked_of_a_checkpoint_in_float32_alone(dtype: str, asked: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(checkpoints, "require_float32", devices.append)
    assert str(checkpoints.load(tiny.saved(tmp_path / "model"), "cpu", dtype).model.dtype) == f"torch.{dtype}"
    assert devices == [CPU] * asked
