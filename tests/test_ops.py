"""Ops against their plain references, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.moe.experts import one_row_each
from moetrain.ops.grouped_swiglu import experts_plain, grouped_swiglu
from moetrain.ops.init import Draw
from moetrain.ops.kernels import LEAST_WORK, fastest_gemm, has_onednn, make_kernels, onednn_gemm, torch_gemm
from moetrain.ops.loop_swiglu import loop_swiglu
from moetrain.ops.permute import (
    rows_of_tokens,
    rows_of_tokens_plain,
    tokens_of_rows,
    tokens_of_rows_plain,
)
from moetrain.ops.slots import count_by_choice, count_experts, queue_positions, queue_positions_by_cumsum
from moetrain.types import Dispatched, RowMap
from tests.arrived import arrived

CPU = torch.device("cpu")


def random_choices(num_tokens: int, num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=1).indices


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_queue_positions_equal_the_cumulative_sum(num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
    expert_TK = random_choices(num_tokens, num_experts, min(top_k, num_experts), seed)
    assert torch.equal(queue_positions(expert_TK, num_experts), queue_positions_by_cumsum(expert_TK, num_experts))
    counts_E = count_experts(expert_TK, num_experts)
    assert counts_E.dtype == torch.int64
    assert torch.equal(counts_E, torch.bincount(expert_TK.flatten(), minlength=num_experts))
    assert torch.equal(count_by_choice(expert_TK, num_experts).sum(0), counts_E)


def test_all_first_choices_stand_before_all_second_choices() -> None:
    expert_TK = torch.tensor([[0, 1], [1, 0], [0, 1]])
    assert queue_positions(expert_TK, 2).tolist() == [[0, 1], [0, 2], [1, 2]]


def test_trap_t11_positions_are_earliest_first_also_on_ties() -> None:
    """topk on a 0/1 mask keeps arbitrary tokens: of 512 kept, fewer than 300 were the first ones in one framework."""
    expert_TK = torch.zeros(4096, 1, dtype=torch.int64)
    kept = queue_positions(expert_TK, 8)[:, 0] < 512
    assert kept.nonzero().flatten().tolist() == list(range(512))


def row_map(seed: int, num_tokens: int, num_rows: int, top_k: int) -> RowMap:
    """A random injective map of assignments to rows, with drops and with empty rows."""
    generator = torch.Generator().manual_seed(seed)
    num = num_tokens * top_k
    used = min(num, num_rows) // 2
    assignment = torch.randperm(num, generator=generator)[:used]
    place = torch.randperm(num_rows, generator=generator)[:used]
    assignment_R = torch.full((num_rows,), num)
    assignment_R[place] = assignment
    row_N = torch.full((num,), num_rows)
    row_N[assignment] = place
    return RowMap(assignment_R, row_N.view(num_tokens, top_k), has_empty=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 5, 40])
def test_permutation_and_combination_equal_their_references(dtype: torch.dtype, num_rows: int) -> None:
    rows = row_map(3, 11, num_rows, 2)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    results = []
    for out_op, home_op in [
        (rows_of_tokens, tokens_of_rows),
        (rows_of_tokens_plain, tokens_of_rows_plain),
    ]:
        torch.manual_seed(0)
        x_TD = torch.randn(11, 8).to(dtype).requires_grad_()
        weight_TK = torch.rand(11, 2, requires_grad=True)
        out_RD = out_op(x_TD, rows)
        home_TD = home_op(out_RD * 1.5, weight_TK, rows)
        home_TD.float().square().sum().backward()
        results.append([out_RD, home_TD, x_TD.grad, weight_TK.grad])
        assert home_TD.dtype == dtype
        assert weight_TK.grad.dtype == torch.float32
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), plain.float(), **tolerance)


def test_a_sparse_map_is_told_by_its_shape() -> None:
    assert row_map(0, 20, 12, 16).is_sparse
    assert not row_map(0, 11, 40, 2).is_sparse
    assert not row_map(0, 0, 12, 16).is_sparse


@pytest.mark.parametrize("has_empty", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(20, 40), (20, 1), (1, 7), (20, 0), (0, 5)])
def test_ragged_permutation_equals_its_reference(
    num_tokens: int, num_rows: int, dtype: torch.dtype, has_empty: bool
) -> None:
    """16 places a token, few of them taken, tokens without any; rows in any order, some empty with rubbish in them."""
    rows = row_map(5, num_tokens, num_rows, 16)
    if not has_empty:
        taken_R = rows.assignment_R < num_tokens * 16
        place_R = torch.where(taken_R, taken_R.cumsum(0) - 1, int(taken_R.sum()))
        row_TK = torch.cat([place_R, taken_R.sum().view(1)])[rows.row_TK]
        rows = RowMap(rows.assignment_R[taken_R], row_TK, has_empty=False)
    results = []
    for out_op, home_op in [(rows_of_tokens, tokens_of_rows), (rows_of_tokens_plain, tokens_of_rows_plain)]:
        torch.manual_seed(0)
        x_TD = torch.randn(num_tokens, 8).to(dtype).requires_grad_()
        weight_TK = torch.rand(num_tokens, 16, requires_grad=True)
        out_RD = out_op(x_TD, rows)
        home_TD = home_op(out_RD * 1.5 + 1.0, weight_TK, rows)
        home_TD = home_TD.add_(0.5)
        home_TD.float().square().sum().backward()
        results.append([out_RD, home_TD, x_TD.grad, weight_TK.grad])
        assert home_TD.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), plain.float(), **tolerance)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.num = max(self.num, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ragged_layer_makes_nothing_as_large_as_all_tokens_times_all_experts(dtype: torch.dtype) -> None:
    rows = row_map(1, 64, 256, 64)
    x_TD, weight_TK = torch.randn(64, 32).to(dtype).requires_grad_(), torch.rand(64, 64, requires_grad=True)
    with Largest() as largest:
        home_TD = tokens_of_rows(rows_of_tokens(x_TD, rows), weight_TK, rows)
        home_TD.float().sum().backward()
    assert largest.num <= 256 * 32
    with Largest() as largest:
        tokens_of_rows_plain(rows_of_tokens_plain(x_TD, rows), weight_TK, rows)
    assert largest.num >= 64 * 64 * 32


def test_trap22_combine_weighs_and_sums_in_fp32() -> None:
    """bf16 rows, weights of thirds: rounded to bf16 once, at the end, and not at every product."""
    torch.manual_seed(0)
    rows = RowMap(torch.arange(4096), torch.arange(4096).view(512, 8), has_empty=False)
    y_RD = torch.randn(4096, 4).bfloat16()
    weight_TK = torch.rand(512, 8) / 3
    exact = torch.einsum("tkd,tk->td", y_RD.view(512, 8, 4).double(), weight_TK.double())
    assert torch.equal(tokens_of_rows(y_RD, weight_TK, rows), exact.to(torch.bfloat16))
    in_bf16 = (y_RD.view(512, 8, 4) * weight_TK.bfloat16().unsqueeze(-1)).sum(1)
    assert not torch.equal(in_bf16, exact.to(torch.bfloat16))


def rows_of_copies(sizes: list[int]) -> RowMap:
    """Seven copies of up to three rows each, of which some have none."""
    generator = torch.Generator().manual_seed(2)
    num_rows, num = sum(sizes), 7 * 3
    assignment_R = torch.randperm(num, generator=generator)[:num_rows]
    row_N = torch.full((num,), num_rows).scatter_(0, assignment_R, torch.arange(num_rows))
    return RowMap(assignment_R, row_N.view(7, 3), has_empty=False)


EXPERTS: dict[str, Callable[[Dispatched, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "grouped": grouped_swiglu,
    "torch": partial(loop_swiglu, torch_gemm),
    "onednn": partial(loop_swiglu, onednn_gemm),
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 2], [0, 0, 0, 0], [10, 0, 0, 0], [4, 4, 4, 4]])
def test_experts_equal_the_loop_and_trap14_empty_experts_have_zero_gradients(
    sizes: list[int], dtype: torch.dtype, kind: str, weighted: bool
) -> None:
    results = []
    for reference in (False, True):
        torch.manual_seed(1)
        rows = rows_of_copies(sizes) if weighted else one_row_each(torch.zeros(sum(sizes), 1))
        weight_CK = torch.rand(rows.row_TK.shape, requires_grad=True) if weighted else None
        x_CD = torch.randn(rows.row_TK.shape[0], 8).to(dtype).requires_grad_()
        gate_up_eFD, down_eDF = (torch.randn(4, *s).to(dtype).requires_grad_() for s in ((32, 8), (8, 16)))
        experts = experts_plain if reference else EXPERTS[kind]
        out = experts(arrived(x_CD, sizes, rows, weight_CK), gate_up_eFD, down_eDF)
        (out.float() * torch.linspace(0, 1, 8)).sum().backward()
        results.append([out, x_CD.grad, gate_up_eFD.grad, down_eDF.grad])
        results[-1] += [] if weight_CK is None else [weight_CK.grad]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).float().norm() <= tolerance * plain.float().norm()
    for grad_OI, size in zip(results[0][2], sizes, strict=True):
        assert bool((grad_OI != 0).any()) == (size > 0)


def test_no_slots_at_all_give_zero_gradients() -> None:
    """A chunk of a padded exchange may have none."""
    sent = replace(arrived(torch.zeros(0, 16, requires_grad=True), [0, 0]), rows_per_expert=0)
    stacks = torch.randn(2, 64, 16, requires_grad=True), torch.randn(2, 16, 32, requires_grad=True)
    grouped_swiglu(sent, *stacks).sum().backward()
    assert all(stack.grad is not None and not stack.grad.any() for stack in stacks)


@pytest.mark.parametrize(("num_rows", "looped"), [(LEAST_WORK // (6 * 16 * 32) * 2 + 2, True), (100, False)])
def test_experts_with_little_to_do_are_taken_together(num_rows: int, looped: bool) -> None:
    """Two experts of D = 16, F = 32: six operations a row and number of theirs."""
    sent = arrived(torch.randn(num_rows, 16, requires_grad=True), [num_rows // 2] * 2)
    stacks = torch.randn(2, 64, 16, requires_grad=True), torch.randn(2, 16, 32, requires_grad=True)
    out_RD = make_kernels(CPU, "torch").experts(sent, *stacks)
    assert out_RD.grad_fn is not None
    assert (out_RD.grad_fn.name() == "_LoopSwigluBackward") == looped


def test_linear_kernels_agree_and_the_probe_names_one_of_them() -> None:
    results = []
    for name in ("torch", "onednn"):
        torch.manual_seed(0)
        x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        out = make_kernels(CPU, name).linear(x, weight)
        out.transpose(1, 2).square().sum().backward()
        results.append([out, x.grad, weight.grad])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert fastest_gemm(CPU) in ("torch", "onednn")
    assert has_onednn(), "this build of torch has lost the operator: the fallback is at work, see ops/kernels.py"


@pytest.mark.parametrize("shape", [(0, 8), (1, 0, 8)])
def test_a_linear_map_of_no_tokens(shape: tuple[int, ...]) -> None:
    """A rank may send none of its tokens through a block."""
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    out = make_kernels(CPU, "onednn").linear(x, weight)
    assert out.shape == (*shape[:-1], 4)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(weight.grad, torch.zeros(4, 8))


def test_a_product_of_a_factor_that_lies_straight_is_straight() -> None:
    assert onednn_gemm(torch.randn(64, 48), torch.randn(16, 48)).is_contiguous()


@pytest.mark.parametrize(("rows", "depth", "columns"), [(64, 8, 16), (64, 48, 16), (16, 48, 64)])
def test_a_weight_gradient_turns_the_tall_factor_or_the_product_whichever_is_less(
    rows: int, depth: int, columns: int
) -> None:
    """A stack of experts with few rows each spends a tenth of its time on turning products otherwise."""
    grad_KM, x_KN = torch.randn(depth, rows), torch.randn(depth, columns)
    out_MN = torch.zeros(rows, columns)
    product_MN = onednn_gemm(grad_KM.t(), x_KN.t(), out_MN)
    torch.testing.assert_close(product_MN, grad_KM.t() @ x_KN, rtol=1e-5, atol=1e-5)
    assert product_MN.data_ptr() == out_MN.data_ptr()
    turns_product = onednn_gemm(grad_KM.t(), x_KN.t()).stride(0) == 1
    assert turns_product == (depth * columns + rows * columns < depth * rows)


def test_initial_weights_depend_on_seed_name_and_global_expert_only() -> None:
    """TRAPS T17: with seeds per rank, EP=1 and EP=2 start from different experts."""
    whole, half = torch.empty(4, 3, 2), torch.empty(2, 3, 2)
    Draw(5).of("a").experts_(whole, "up", 0.1, first_expert=0)
    Draw(5).of("a").experts_(half, "up", 0.1, first_expert=2)
    assert torch.equal(whole[2:], half)
    assert not torch.equal(whole[0], whole[1])
    other = torch.empty(4, 3, 2)
    Draw(6).of("a").experts_(other, "up", 0.1, first_expert=0)
    assert not torch.equal(whole, other)
