"""Whether a device computes float32 in float32: an evaluation in that type is only worth its name if no unit rounds to TF32 on the way."""

import torch
from torch.nn.functional import scaled_dot_product_attention

SIZE = 128
STEP = 2.0**-13  # 1 + STEP is a float32; TF32 has ten bits behind the point and BF16 seven: both make 1 of it


def require_float32(device: torch.device) -> None:
    """Forbid TF32 to this process, and see that products and attention on `device` have float32's bits.

    Raises ArithmeticError where they do not, for instance under NVIDIA_TF32_OVERRIDE=1, which no setting of PyTorch's can undo.
    """
    torch.set_float32_matmul_precision("highest")
    for name, found, expected, allowed in ((*_product(device), STEP / 8), (*_attention(device), 0.02)):
        if not abs(found - expected) <= allowed:
            raise ArithmeticError(
                f"{name} in float32 on {device} gives {found}, right is {expected:.6g}: it is computed in fewer bits. "
                "Unset NVIDIA_TF32_OVERRIDE and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, or pass another --dtype"
            )


def _product(device: torch.device) -> tuple[str, float, float]:
    """What it is, a mean of 1 + STEP by a product of matrices, and what it should be."""
    a = torch.full((SIZE, SIZE), 1.0 + STEP, device=device)
    return "a product of matrices", float((a @ torch.full_like(a, 1.0 / SIZE))[0, 0]), 1.0 + STEP


def _attention(device: torch.device) -> tuple[str, float, float]:
    """What it is, the weight of tokens whose score is greater by 1 because their keys are 1 + STEP and not 1, and what it should be.
    Scores near 8192 have a millinat of rounding in float32; with the keys rounded they are all equal, and the weight is a half."""
    tokens, d = 64, 128
    key = torch.ones(1, 1, tokens, d, device=device)
    key[:, :, ::2] += STEP
    value = torch.zeros_like(key)
    value[:, :, ::2] = 1.0
    query = torch.full_like(key, 1.0 / (STEP * d))
    weight = scaled_dot_product_attention(query, key, value, scale=1.0, is_causal=True)[0, 0, -1, 0]
    return "attention", float(weight), float(torch.tensor(1.0).sigmoid())
