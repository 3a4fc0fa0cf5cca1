"""What the Triton kernels have in common: a program's tile, its rows' tokens, the product of a tile, and what is tuned.

A tile is BLOCK_M rows of one expert by BLOCK_N columns. How many tiles there are is known on the device alone, so a
grid has as many as there can be, ``R // BLOCK_M + e`` times the columns', and each program looks its own up among
``ends_e``; programs in excess of the true number leave at once.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from triton.runtime import Autotuner, JITFunction

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
BLOCK_F = 16 if INTERPRETED.value else 64
"""Half the columns of a tile of ``activation_backward``: not tuned, for weights' gradients are summed over them."""
KEY = ["size_class", "NUM_EXPERTS", "DIM", "WIDTH"]
"""What a choice of tiles holds for; besides the dtypes. size_class: the mean number of an expert's rows, by octave."""
UNSPECIALIZED = ["num_rows", "num_assignments", "size_class"]
"""Numbers that differ from step to step: a kernel is not compiled anew for one that 16 divides."""


def tuned(*shapes: tuple[int, int, int, int, int]) -> Callable[[JITFunction], Autotuner]:
    """A kernel with the fastest of (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages); the interpreter's are fixed."""
    if INTERPRETED.value:
        shapes = ((16, 16, 16, 4, 3),)
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]
    return triton.autotune(configs, KEY)


@triton.jit
def find_tile(
    ends_e: tl.tensor, NUM_COLS: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's tile of ends_e[-1] by NUM_COLS: its expert (NUM_EXPERTS if there is no such tile), its rows int64
    [BLOCK_M], which of them are any, and its first column.
    """
    num_across: tl.constexpr = tl.cdiv(NUM_COLS, BLOCK_N)
    tile = tl.program_id(0) // num_across
    e = tl.arange(0, triton.next_power_of_2(NUM_EXPERTS))
    ends = tl.load(ends_e + e, mask=e < NUM_EXPERTS, other=0)
    begins = tl.load(ends_e + e - 1, mask=(e > 0) & (e < NUM_EXPERTS), other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    passed = tl.cumsum(tiles, 0) <= tile
    expert = tl.minimum(tl.sum(passed.to(tl.int32), 0), NUM_EXPERTS)
    first = tl.sum(tl.where(passed, tiles, 0), 0)
    begin = tl.sum(tl.where(e == expert, begins, 0), 0)
    end = tl.sum(tl.where(e == expert, ends, 0), 0)
    row_M = begin + (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)
    return expert.to(tl.int64), row_M.to(tl.int64), row_M < end, tl.program_id(0) % num_across * BLOCK_N


@triton.jit
def find_tokens(
    assignment_R: tl.tensor, row_M: tl.tensor, is_row_M: tl.tensor, num_assignments: tl.tensor, TOP_K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """For each row its assignment, its token, and whether it has any: empty rows have none."""
    assignment_M = tl.load(assignment_R + row_M, mask=is_row_M, other=num_assignments)
    return assignment_M, assignment_M // TOP_K, assignment_M < num_assignments


@triton.jit
def add_product(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """``total + left right``, in fp32."""
    if INTERPRETED:  # it would multiply the bits of bf16 as integers; products of two bf16 are exact in fp32
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def two_products(
    left_M: tl.tensor,
    is_row_M: tl.tensor,
    first_N: tl.tensor,
    is_first_N: tl.tensor,
    second_N: tl.tensor,
    is_second_N: tl.tensor,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """fp32 [BLOCK_M, BLOCK_N] twice, with one reading of the left factor. Pointers say where each of its rows begins
    (INNER numbers, one after the other) and each column of the right ones (INNER numbers, STRIDE apart).
    """
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k, at = k < INNER, k[:, None] * STRIDE
        left = tl.load(left_M[:, None] + k[None, :], mask=is_row_M[:, None] & is_k[None, :], other=0.0)
        right = tl.load(first_N[None, :] + at, mask=is_first_N[None, :] & is_k[:, None], other=0.0)
        first = add_product(left, right, first)
        right = tl.load(second_N[None, :] + at, mask=is_second_N[None, :] & is_k[:, None], other=0.0)
        second = add_product(left, right, second)
    return first, second
