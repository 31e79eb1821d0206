"""Matrices of numbers of 8 and 4 bits that share scales, as numbers of the usual types: FP8 by blocks, and MXFP4."""

from collections.abc import Iterator

import torch

_ROWS = 128
"""Rows at once: fp32 copies of so many stay in the processor's cache."""
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Code of 4 bits → its number (OCP Microscaling Formats 1.0, 5.3.3)."""
_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)
"""Byte → its two numbers, that of the low bits first."""
MXFP4_BLOCK = 32
"""Numbers that share a scale."""


def scale_numbers(scales: torch.Tensor) -> torch.Tensor:
    """Scales as fp32. A byte, or E8M0, is an exponent of 2 that is 127 too large; of these 255 is no number (NaN)."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype is torch.uint8 else scales).float()


def fp8_matrix(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, block: tuple[int, int]
) -> torch.Tensor:
    """The numbers of FP8 codes times the scales of their blocks, multiplied in fp32 and then rounded to `dtype`.

    `codes`: float8_e4m3fn [rows, columns]; `scales`: one for each block of so many rows and columns, row by row, in any shape.
    Blocks at the right and at the bottom may be smaller. Raises ValueError for what is no number, or too large for `dtype`.
    """
    num_rows, num_columns = codes.shape
    height, width = block
    made = torch.empty(codes.shape, dtype=dtype)
    for number, scale in enumerate(scale_numbers(scales).reshape(-(-num_rows // height), -1)):
        of_columns = scale.repeat_interleave(width)[:num_columns]
        for rows in _bands(number * height, min((number + 1) * height, num_rows)):
            made[rows] = _checked(codes[rows].float().mul_(of_columns), dtype)
    return made


def mxfp4_matrix(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of one expert's MXFP4 codes, with inputs first, as GPT-OSS holds them in BF16: `dtype` [inputs, outputs].

    `blocks`: uint8 [outputs, inputs / 32, 16], two codes a byte; `scales`: uint8 [outputs, inputs / 32]. Raises ValueError as
    `fp8_matrix`.
    """
    outputs, groups, width = blocks.shape
    made = torch.empty(groups * 2 * width, outputs, dtype=dtype)
    for rows in _bands(0, outputs):
        numbers = _PAIRS[blocks[rows].int()].flatten(2)  # [rows, groups, 32]
        numbers.mul_(scale_numbers(scales[rows])[:, :, None])
        made[:, rows] = _checked(numbers, dtype).flatten(1).T
    return made


def _bands(start: int, stop: int) -> Iterator[slice]:
    """Slices of at most `_ROWS` rows."""
    for first in range(start, stop, _ROWS):
        yield slice(first, min(first + _ROWS, stop))


def _checked(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`numbers`, fp32, if `dtype` holds them all."""
    low, high = torch.aminmax(numbers)
    if not max(-low.item(), high.item()) <= torch.finfo(dtype).max:  # nor of NaN
        raise ValueError(f"holds codes of no number, or numbers too large for {dtype}")
    return numbers
