"""The Triton kernels behind ``triton_swiglu``: rows grouped by expert, gathered from their tokens where they are read.

Products are summed in fp32, fp32 factors are multiplied as such (no TF32). Nothing is added up by atomics. Pointers are
called after what they point to, with the legend of types.py; everything lies contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moetrain.ops.triton_tiles import BLOCK_F, UNSPECIALIZED, add_product, find_tile, find_tokens, tuned, two_products


@tuned(
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 4),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 8, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 3),
)
@triton.jit(do_not_specialize=UNSPECIALIZED)
def gathered_swiglu(
    x_CD: tl.tensor,
    assignment_R: tl.tensor,
    gate_up_eFD: tl.tensor,
    ends_e: tl.tensor,
    h_RF: tl.tensor,
    act_RF: tl.tensor,
    num_assignments: tl.tensor,
    size_class: tl.tensor,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """``h = x[token] gate_up_e^T`` [R, 2F] and ``act = silu(gate) * up`` [R, F], of h as it was rounded."""
    expert, row_M, is_row_M, col = find_tile(ends_e, WIDTH, NUM_EXPERTS, BLOCK_M, BLOCK_N)
    if expert >= NUM_EXPERTS:
        return
    col_N = col + tl.arange(0, BLOCK_N)
    is_col_N = col_N < WIDTH
    _, token_M, is_token_M = find_tokens(assignment_R, row_M, is_row_M, num_assignments, TOP_K)
    x_M = x_CD + token_M * DIM
    gate_N = gate_up_eFD + (expert * 2 * WIDTH + col_N) * DIM
    up_N = gate_N + WIDTH * DIM
    gate, up = two_products(x_M, is_token_M, gate_N, is_col_N, up_N, is_col_N, DIM, 1, BLOCK_M, BLOCK_N, BLOCK_K)
    gate, up = gate.to(h_RF.dtype.element_ty), up.to(h_RF.dtype.element_ty)
    is_out = is_row_M[:, None] & is_col_N[None, :]
    h_MN = h_RF + row_M[:, None] * 2 * WIDTH + col_N[None, :]
    tl.store(h_MN, gate, mask=is_out)
    tl.store(h_MN + WIDTH, up, mask=is_out)
    act = gate.to(tl.float32) * tl.sigmoid(gate.to(tl.float32)) * up.to(tl.float32)
    tl.store(act_RF + row_M[:, None] * WIDTH + col_N[None, :], act, mask=is_out)


@tuned(
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (64, 256, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (64, 64, 32, 4, 4),
)
@triton.jit(do_not_specialize=UNSPECIALIZED)
def rows_product(
    left_RW: tl.tensor,
    weight_eDW: tl.tensor,
    ends_e: tl.tensor,
    out_RD: tl.tensor,
    size_class: tl.tensor,
    STRIDE_D: tl.constexpr,
    STRIDE_W: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """[R, W] by each expert's [D, W], however that lies in memory, to [R, D]."""
    expert, row_M, is_row_M, col = find_tile(ends_e, DIM, NUM_EXPERTS, BLOCK_M, BLOCK_N)
    if expert >= NUM_EXPERTS:
        return
    col_N = col + tl.arange(0, BLOCK_N)
    is_col_N = col_N < DIM
    weight_N = weight_eDW + expert * DIM * WIDTH + col_N * STRIDE_D
    left_M = left_RW + row_M * WIDTH
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(left_M[:, None] + k[None, :], mask=is_row_M[:, None] & (k < WIDTH)[None, :], other=0.0)
        is_weight = is_col_N[None, :] & (k < WIDTH)[:, None]
        weight = tl.load(weight_N[None, :] + k[:, None] * STRIDE_W, mask=is_weight, other=0.0)
        out = add_product(left, weight, out)
    tl.store(out_RD + row_M[:, None] * DIM + col_N[None, :], out, mask=is_row_M[:, None] & is_col_N[None, :])


@triton.jit
def through_swiglu(
    dact: tl.tensor,
    weight_M: tl.tensor,
    row_M: tl.tensor,
    is_row_M: tl.tensor,
    col_N: tl.tensor,
    is_col_N: tl.tensor,
    h_RF: tl.tensor,
    dh_RF: tl.tensor,
    act_RF: tl.tensor,
    dot_R: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """The last step of ``activation_backward`` for a block of columns; in an order that needs few registers."""
    is_out = is_row_M[:, None] & is_col_N[None, :]
    at_h = row_M[:, None] * 2 * WIDTH + col_N[None, :]
    gate = tl.load(h_RF + at_h, mask=is_out, other=0.0).to(tl.float32)
    up = tl.load(h_RF + at_h + WIDTH, mask=is_out, other=0.0).to(tl.float32)
    chance = tl.sigmoid(gate)
    silu = gate * chance
    dgate = dact * up * (chance + silu * (1 - chance))
    act = silu * up
    dup = dact * silu
    tl.store(dot_R + row_M, tl.sum(dact * act, 1), mask=is_row_M)
    tl.store(dh_RF + at_h, dgate * weight_M[:, None], mask=is_out)
    tl.store(dh_RF + at_h + WIDTH, dup * weight_M[:, None], mask=is_out)
    tl.store(act_RF + row_M[:, None] * WIDTH + col_N[None, :], act * weight_M[:, None], mask=is_out)


@tuned((128, BLOCK_F, 64, 8, 3), (128, BLOCK_F, 64, 8, 4), (64, BLOCK_F, 64, 8, 3), (64, BLOCK_F, 64, 4, 4))
@triton.jit(do_not_specialize=UNSPECIALIZED)
def activation_backward(
    grad_CD: tl.tensor,
    assignment_R: tl.tensor,
    weight_CK: tl.tensor,
    down_eDF: tl.tensor,
    ends_e: tl.tensor,
    h_RF: tl.tensor,
    dh_RF: tl.tensor,
    act_RF: tl.tensor,
    dot_BR: tl.tensor,
    num_rows: tl.tensor,
    num_assignments: tl.tensor,
    size_class: tl.tensor,
    WEIGHTED: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """From the gradient of the layer's sums: that of h, [R, 2F]; the activation times its row's weight, [R, F]; and for
    each block of columns the row's part of its weight's gradient, ``(grad[token] down_e) . act``, fp32
    [F / BLOCK_N, R]. Not WEIGHTED: weights are 1. A tile has two blocks of columns.
    """
    expert, row_M, is_row_M, col = find_tile(ends_e, WIDTH, NUM_EXPERTS, BLOCK_M, 2 * BLOCK_N)
    if expert >= NUM_EXPERTS:
        return
    col_N = col + tl.arange(0, BLOCK_N)
    next_N = col_N + BLOCK_N
    is_col_N, is_next_N = col_N < WIDTH, next_N < WIDTH
    assignment_M, token_M, is_token_M = find_tokens(assignment_R, row_M, is_row_M, num_assignments, TOP_K)
    weight_M = tl.full((BLOCK_M,), 1.0, tl.float32)
    if WEIGHTED:
        weight_M = tl.load(weight_CK + assignment_M, mask=is_token_M, other=0.0)
    grad_M = grad_CD + token_M * DIM
    down_N = down_eDF + expert * DIM * WIDTH + col_N
    dact, next_dact = two_products(
        grad_M, is_token_M, down_N, is_col_N, down_N + BLOCK_N, is_next_N, DIM, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    dot_R = dot_BR + col // BLOCK_N * num_rows
    through_swiglu(dact, weight_M, row_M, is_row_M, col_N, is_col_N, h_RF, dh_RF, act_RF, dot_R, WIDTH)
    dot_R += num_rows
    through_swiglu(next_dact, weight_M, row_M, is_row_M, next_N, is_next_N, h_RF, dh_RF, act_RF, dot_R, WIDTH)


@tuned(
    (128, 256, 64, 8, 5),
    (256, 128, 64, 8, 5),
    (128, 128, 64, 8, 5),
    (128, 128, 32, 4, 5),
    (64, 128, 64, 4, 5),
    (64, 64, 32, 4, 5),
)
@triton.jit(do_not_specialize=UNSPECIALIZED)
def weights_product(
    left_RW: tl.tensor,
    x_CD: tl.tensor,
    assignment_R: tl.tensor,
    ends_e: tl.tensor,
    out_eWD: tl.tensor,
    num_assignments: tl.tensor,
    size_class: tl.tensor,
    STRIDE_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """``left^T x[token]`` over each expert's rows, [W, D], however that lies in memory; zero where it has none.

    Tokens are looked up ahead of what is read of them, which takes two of the stages: five keep three blocks in flight.
    """
    num_cols: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    num_tiles: tl.constexpr = (WIDTH + BLOCK_M - 1) // BLOCK_M * num_cols
    expert = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    w_M = tile // num_cols * BLOCK_M + tl.arange(0, BLOCK_M)
    d_N = tile % num_cols * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(ends_e + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_e + expert)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row_K = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        _, token_K, is_token_K = find_tokens(assignment_R, row_K, row_K < end, num_assignments, TOP_K)
        is_left = (w_M < WIDTH)[:, None] & (row_K < end)[None, :]
        left = tl.load(left_RW + row_K[None, :] * WIDTH + w_M[:, None], mask=is_left, other=0.0)
        is_x = is_token_K[:, None] & (d_N < DIM)[None, :]
        x = tl.load(x_CD + (token_K * DIM)[:, None] + d_N[None, :], mask=is_x, other=0.0)
        total = add_product(left, x, total)
    out = out_eWD + expert * DIM * WIDTH + w_M[:, None] * STRIDE_W + d_N[None, :] * STRIDE_D
    tl.store(out, total, mask=(w_M < WIDTH)[:, None] & (d_N < DIM)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def gather_sum(
    y_RD: tl.tensor,
    weight_CK: tl.tensor,
    row_CK: tl.tensor,
    out_CD: tl.tensor,
    num_rows: tl.tensor,
    WEIGHTED: tl.constexpr,
    TOP_K: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Each token copy the sum of its rows in the order of its choices, times their weights if WEIGHTED."""
    copy = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, TOP_K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row_K = tl.load(row_CK + copy * TOP_K + k, mask=k < TOP_K, other=num_rows)
        is_row_K = row_K < num_rows
        is_y = is_row_K[:, None] & (d < DIM)[None, :]
        y = tl.load(y_RD + row_K[:, None] * DIM + d[None, :], mask=is_y, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_CK + copy * TOP_K + k, mask=is_row_K, other=0.0)[:, None]
        total += tl.sum(y, 0)
    tl.store(out_CD + copy * DIM + d, total, mask=d < DIM)
