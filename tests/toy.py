"""A small model that keeps the engines' contract: stacked experts over EP, dataclasses, tied embeddings."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moetrain.config import (
    BalanceConfig,
    CapacityConfig,
    Config,
    ControlConfig,
    DataConfig,
    DebugConfig,
    EngineConfig,
    ExpertsConfig,
    HealthConfig,
    MachineConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RecipeConfig,
    RunConfig,
    TrainConfig,
)
from moetrain.parallel.exchange import Route, all_to_all_rows
from moetrain.parallel.mesh import Mesh
from moetrain.types import Batch, LossTerms, ModelOutput, MoEOutput, Routing

DIM, WIDTH, VOCAB, NUM_EXPERTS, CONTEXT = 8, 12, 32, 8, 6


def toy_config(
    engine: str, zero_stage: int = 0, *, dtype: str = "fp32", optim: str = "sgd", clip_norm: float | None = 0.5
) -> Config:
    return Config(
        run=RunConfig(),
        model=ModelConfig(
            dim=DIM,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=4,
            ffn_dim=16,
            expert_dim=WIDTH,
            context=CONTEXT,
        ),
        experts=ExpertsConfig(num_experts=NUM_EXPERTS),
        router={},
        capacity=CapacityConfig(factor_train=None, factor_eval=None),
        dispatch={},
        balance=BalanceConfig(),
        control=ControlConfig(),
        engine=EngineConfig(name=engine, zero_stage=zero_stage, dtype=dtype),
        optim=OptimConfig(name=optim, lr=0.1, eps=1e-3, weight_decay=0.1, clip_norm=clip_norm),
        data=DataConfig(),
        train=TrainConfig(steps=3, global_batch=8, micro_batch=1),
        monitor=MonitorConfig(),
        health=HealthConfig(),
        machine=MachineConfig(device="cpu"),
        debug=DebugConfig(),
        recipe=RecipeConfig(),
    )


def draw(name: str, *shape: int, scale: float) -> nn.Parameter:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return nn.Parameter(torch.randn(shape, generator=generator) * scale)


class Router(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = draw(f"{name}.router", NUM_EXPERTS, DIM, scale=0.7)
        self.register_buffer("bias_E", torch.zeros(NUM_EXPERTS))

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = x_TD.float() @ self.weight.float().t() + self.bias_E
        expert_TK = logits_TE.topk(2, dim=-1).indices
        weight_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
        return Routing(logits_TE, logits_TE.softmax(-1), expert_TK, weight_TK)


class Experts(nn.Module):
    def __init__(self, name: str, mesh: Mesh) -> None:
        super().__init__()
        mine = slice(mesh.ep_rank * NUM_EXPERTS // mesh.ep_size, (mesh.ep_rank + 1) * NUM_EXPERTS // mesh.ep_size)
        self.up = nn.Parameter(draw(f"{name}.up", NUM_EXPERTS, DIM, WIDTH, scale=0.5)[mine].detach().clone())
        self.down = nn.Parameter(draw(f"{name}.down", NUM_EXPERTS, WIDTH, DIM, scale=0.5)[mine].detach().clone())

    def forward(self, rows: RowsForExperts) -> Tensor:
        hidden_eRF = torch.einsum("rd,edf->erf", rows.rows_RD, self.up).tanh()
        return torch.einsum("erf,efd,re->rd", hidden_eRF, self.down, rows.weight_Re)


@dataclass(frozen=True)
class RowsForExperts:
    rows_RD: Tensor
    weight_Re: Tensor


class ToyMoE(nn.Module):
    """Every token goes to every EP rank with its weight for each expert there: slow, exact, no capacity."""

    def __init__(self, name: str, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.router, self.experts = mesh, Router(name), Experts(name, mesh)

    def forward(self, x_TD: Tensor) -> MoEOutput:
        routing, groups = self.router(x_TD), self.mesh.ep_size
        weight_TE = torch.zeros_like(routing.logits_TE).scatter(-1, routing.expert_TK, routing.weight_TK).to(x_TD.dtype)
        weight_Re = torch.cat(weight_TE.chunk(groups, dim=-1))
        sent_RX = torch.cat([x_TD.repeat(groups, 1), weight_Re], dim=-1)
        got_RX = all_to_all_rows(sent_RX, Route(None, None, self.mesh.ep_group))
        y_RD = self.experts(RowsForExperts(got_RX[:, :DIM], got_RX[:, DIM:]))
        back_RD = all_to_all_rows(y_RD, Route(None, None, self.mesh.ep_group))
        out_TD = back_RD.view(groups, *x_TD.shape).sum(0)
        balance = NUM_EXPERTS * routing.probs_TE.square().sum(-1).mean()
        z = routing.logits_TE.logsumexp(-1).square().mean()
        return MoEOutput(out_TD, replace(LossTerms.zeros(x_TD.device), balance=balance, z=z))


class Toy(nn.Module):
    """``lm_coef`` 0 leaves the router losses alone; ``fault`` multiplies the loss (nan breaks every gradient)."""

    def __init__(self, mesh: Mesh, lm_coef: float = 1.0) -> None:
        super().__init__()
        self.lm_coef, self.fault = lm_coef, 1.0
        self.embedding = nn.Embedding(VOCAB, DIM, _weight=draw("embedding", VOCAB, DIM, scale=1.0).detach())
        self.moe = nn.ModuleList(ToyMoE(f"moe{i}", mesh) for i in range(2))
        self.norm = nn.LayerNorm(DIM, bias=False)

    def forward(self, batch: Batch) -> ModelOutput:
        logits_TV, losses = self._through(batch.tokens_BS)
        lm = nn.functional.cross_entropy(logits_TV, batch.targets_BS.flatten())
        loss = self.lm_coef * lm + 0.5 * losses.balance + 0.1 * losses.z
        return ModelOutput(self.fault * loss, lm, losses)

    def logits(self, tokens_BS: Tensor) -> Tensor:
        return self._through(tokens_BS)[0].view(*tokens_BS.shape, VOCAB)

    def _through(self, tokens_BS: Tensor) -> tuple[Tensor, LossTerms]:
        x_TD, terms = self.embedding(tokens_BS).flatten(0, 1), []
        for layer in self.moe:
            out = layer(x_TD)
            x_TD, terms = x_TD + out.hidden_TD, [*terms, out.losses]
        return nn.functional.linear(self.norm(x_TD), self.embedding.weight).float(), LossTerms.mean(terms)

    def moe_layers(self) -> list[ToyMoE]:
        return [layer for layer in self.modules() if isinstance(layer, ToyMoE)]

    def expert_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.named_parameters() if ".experts." in name)


def sequences(step: int, num: int) -> Tensor:
    """int64 [num, CONTEXT + 1]: the global batch of a step, the same whoever asks."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCAB, (num, CONTEXT + 1), generator=generator)


def batch_of(rows: Tensor) -> Batch:
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
