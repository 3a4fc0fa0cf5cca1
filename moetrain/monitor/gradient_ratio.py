"""How hard the router losses pull at a router compared with the language loss: measured, on demand.

For each MoE layer ``||grad(router losses)|| / ||grad(lm)||`` over the router's trained parameters, where the router
losses are those that even the load, times their coefficients (all but the z-loss, which evens nothing). LongCat-Flash
(arXiv 2509.01322) keeps it below 0.1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.models.decoder import Decoder
from moetrain.moe.balance import weighted
from moetrain.parallel.collectives import sum_over
from moetrain.types import Batch


def gradient_ratios(model: Decoder, batch: Batch) -> dict[str, float]:
    """One forward and two backwards of one micro-batch a rank; gradients, counts and generators stay as they were.

    moe/layer_07/aux_gradient_ratio, and their largest as balance/aux_gradient_ratio; of norms over all ranks' own
    micro-batches, root of the mean of squares. Layers whose router has nothing to train are left out. Collective.
    """
    mesh, layers = model.mesh, model.moe_layers()
    on_host = mesh.device.type == "cpu"
    with torch.random.fork_rng([]) if on_host else torch.random.fork_rng([mesh.device], device_type=mesh.device.type):
        output = model(batch.to(mesh.device))
    params = [[p for p in layer.router.parameters() if p.requires_grad] for layer in layers]
    routers = weighted(output.losses, replace(model.balance, z_coef=0.0))
    squares_2L = torch.stack([_squares(routers, params), _squares(output.lm, params)])
    norms_2L = sum_over(squares_2L, mesh.world_group).sqrt().cpu()
    numbers = [layer.router.site.layer for layer in layers]
    ratios = {
        f"moe/layer_{number:02d}/aux_gradient_ratio": float(aux / lm)
        for number, own, (aux, lm) in zip(numbers, params, norms_2L.T.tolist(), strict=True)
        if own and lm > 0
    }
    return ratios | ({"balance/aux_gradient_ratio": max(ratios.values())} if ratios else {})


def _squares(loss: Tensor, params: list[list[torch.nn.Parameter]]) -> Tensor:
    """Squared norm of the gradient of each layer's parameters, fp64 [L]; 0 where the loss does not depend on them."""
    flat = [param for own in params for param in own]
    zeros_L = torch.zeros(len(params), dtype=torch.float64, device=loss.device)
    if not flat or not loss.requires_grad:
        return zeros_L
    grads = iter(torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True))
    for index, own in enumerate(params):
        for grad in [next(grads) for _ in own]:
            if grad is not None:
                zeros_L[index] += grad.double().square().sum()
    return zeros_L
