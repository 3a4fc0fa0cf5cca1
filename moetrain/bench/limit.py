"""What no layer on this process can beat: the products of its experts, forward and backward, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.bench.peers.case import LayerCase
from moetrain.bench.race import Contestant
from moetrain.ops.kernels import GemmName, onednn_gemm, torch_gemm
from moetrain.ops.slots import count_experts


def products_alone(case: LayerCase, gemm_name: GemmName) -> Contestant:
    """Six of each expert, one expert after the other, on as many rows as it gets in ``case``; the gradients of the
    weights in fresh memory, like anybody's.
    """
    gemm = onednn_gemm if gemm_name == "onednn" else torch_gemm
    sizes = rows_of_experts(case)
    num_rows, (dim, width) = sum(sizes), case.down_eDF.shape[1:]
    x_RD, dy_RD, act_RF, dh_RF = (case.x_TD.new_ones(num_rows, columns) for columns in (dim, dim, width, 2 * width))
    made: list[Tensor] = []

    def step() -> Tensor:
        made[:] = torch.empty_like(case.gate_up_eFD), torch.empty_like(case.down_eDF)
        y_RD, dx_RD = torch.empty_like(x_RD), torch.empty_like(x_RD)
        rows = zip(*(rows.split(sizes) for rows in (x_RD, dy_RD, act_RF, dh_RF, y_RD, dx_RD)), strict=True)
        weights = zip(case.gate_up_eFD, case.down_eDF, *made, strict=True)
        for (x, dy, act, dh, y, dx), (gate_up, down, grad_gate_up, grad_down) in zip(rows, weights, strict=True):
            made.append(gemm(x, gate_up))
            gemm(act, down, y)
            gemm(dy, down.t())
            gemm(dy.t(), act.t(), grad_down)
            gemm(dh.t(), x.t(), grad_gate_up)
            gemm(dh, gate_up.t(), dx)
        return torch.zeros_like(case.x_TD)

    return Contestant("products alone", step, made.clear, "no layer, the limit")


def rows_of_experts(case: LayerCase) -> list[int]:
    """How many rows each expert gets, of tokens that choose the k largest logits."""
    logits_TE = case.x_TD.float() @ case.gate_ED.float().t()
    expert_TK = logits_TE.topk(case.top_k, dim=1).indices
    return count_experts(expert_TK, case.num_experts).tolist()
