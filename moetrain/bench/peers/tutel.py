"""Tutel's layer, with a capacity and padded to the fullest expert, which drops nothing. It is not on PyPI."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.bench.peers.case import LayerCase
from moetrain.bench.race import Contestant


def contestants(case: LayerCase) -> list[Contestant]:
    return [_layer(case, drop=True), _layer(case, drop=False)]


class _Experts(nn.Module):
    """SwiGLUs, as Tutel wants experts of one's own: one module for all of this rank."""

    def __init__(self, model_dim: int, local_experts: int, sharded_count: int, width: int) -> None:
        super().__init__()
        assert sharded_count == 1, sharded_count
        self.gate_up_eFD = nn.Parameter(torch.empty(local_experts, width, model_dim))
        self.down_eDF = nn.Parameter(torch.empty(local_experts, model_dim, width // 2))

    def forward(self, x_eCD: Tensor, _layer: object) -> Tensor:
        gate_eCF, up_eCF = torch.bmm(x_eCD, self.gate_up_eFD.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(torch.nn.functional.silu(gate_eCF) * up_eCF, self.down_eDF.transpose(1, 2))


def _layer(case: LayerCase, drop: bool) -> Contestant:
    from tutel import moe

    num_local, width, dim = case.gate_up_eFD.shape
    assert case.mesh.ep_size == case.mesh.world_size, "Tutel shards experts over the whole world"
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": case.top_k, "capacity_factor": 1.25 if drop else 0.0},
        experts={"type": "custom", "module": _Experts, "count_per_node": num_local, "width": width},
        model_dim=dim,
        normalize_gate=True,
        is_gshard_loss=True,
    )
    layer = layer.to(case.x_TD.device, case.x_TD.dtype)
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(case.gate_ED)
        layer.experts.gate_up_eFD.copy_(case.gate_up_eFD)
        layer.experts.down_eDF.copy_(case.down_eDF)

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        out_TD = layer(x_TD)
        return out_TD, out_TD.l_aux

    name = "Tutel, capacity 1.25" if drop else "Tutel, dropless"
    return case.contestant(name, layer, run, "drops tokens" if drop else "")
