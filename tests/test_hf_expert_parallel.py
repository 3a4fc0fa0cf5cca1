"""A live oracle: one training step of transformers under its own expert parallelism, against one of ours.

Two ranks with different batches and half of the experts each. On their side ``from_pretrained`` with a
``DistributedConfig``: experts dispatched by all-to-all over the two ranks, everything else under FSDP2. On ours the
same model, loaded plainly, its MoE blocks replaced by moetrain's layer and trained by moetrain's engine: attention,
norms and loss are theirs in both, so a difference lies in routing, dispatch, experts, or the averaging of gradients.
On the CPU losses were at most 5e-7 apart and entries of gradients 4e-7 (the largest are 0.3 to 0.6); reading ours off a
step's change of weights rounds them by up to 6e-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config import Config
from moetrain.engine import make_engine
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.ops.kernels import make_kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.types import Batch, LossTerms, ModelOutput
from tests.catalog import tiny_with
from tests.ranks import run_ranks
from tests.tiny import VOCAB

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
V3 = {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}

RENAMED = {
    "router.gate": "gate.weight",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
    "shared.down": "shared_experts.down_proj.weight",
}


class Family(NamedTuple):
    """name: both the model of transformers and the router of conf/router. wrong: a router that must not pass for it."""

    name: str
    config: str
    own: dict[str, Any]
    num_shared: int
    wrong: dict[str, Any]


FAMILIES = [
    Family("mixtral", "MixtralConfig", {"num_local_experts": 8, "intermediate_size": 24}, 0, {"renormalise": "none"}),
    Family(
        "qwen3_moe",
        "Qwen3MoeConfig",
        {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
        0,
        {"score": "sigmoid"},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3Config",
        {**V3, **LATENT, **GROUPS, "intermediate_size": 32},
        1,
        {"num_groups": 1, "top_groups": 1, "group_score": "max"},
    ),
]


class Adapter(nn.Module):
    """moetrain's layer where an MoE block of transformers stood, with this rank's half of its experts."""

    def __init__(self, layer: MoELayer, block: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        self.layer = layer
        theirs = {name: tensor.detach() for name, tensor in (*block.named_parameters(), *block.named_buffers())}
        mine = slice(mesh.ep_rank * 8 // mesh.ep_size, (mesh.ep_rank + 1) * 8 // mesh.ep_size)
        layer.router.gate.data.copy_(theirs["gate.weight"])
        layer.experts.gate_up.data.copy_(theirs["experts.gate_up_proj"][mine])
        layer.experts.down.data.copy_(theirs["experts.down_proj"][mine])
        if "gate.e_score_correction_bias" in theirs:
            layer.router.bias_E.copy_(theirs["gate.e_score_correction_bias"])
        if layer.shared is not None:
            halves = [theirs[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up")]
            layer.shared.gate_up.data.copy_(torch.cat(halves))
            layer.shared.down.data.copy_(theirs["shared_experts.down_proj.weight"])

    def forward(self, x_BSD: Tensor) -> Tensor:
        no_ids_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int64)
        return self.layer(x_BSD.flatten(0, 1), no_ids_BS, Replay()).hidden_TD.view_as(x_BSD)


class Wrapped(nn.Module):
    """A causal language model of transformers as our engines take one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> ModelOutput:
        loss = self.model(input_ids=batch.tokens_BS, labels=batch.targets_BS).loss
        return ModelOutput(loss, loss, LossTerms.zeros(CPU))

    def expert_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.named_parameters() if ".layer.experts." in name)


def save_random(family: Family, folder: Path) -> None:
    """A checkpoint of random weights, selection biases too; expert parallelism takes no other start."""
    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, family.config)(**{**SHAPE, **family.own}), dtype=torch.float32
    )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)
    model.save_pretrained(folder)


def batch_of(rank: int) -> Batch:
    """Another batch on each rank; transformers shifts the targets itself."""
    tokens_BS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(5 + rank))
    return Batch(tokens_BS, tokens_BS)


def their_step(folder: Path, rank: int) -> dict[str, Any]:
    """Loss of this rank, and the gradients that their optimiser would see, whole."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    plan = DistributedConfig(tp_size=1, fsdp_size=2, ep_size=2, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=torch.float32).train()
    experts = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    assert experts, "no experts"
    assert all(p.to_local().shape[0] == 4 for p in experts), "half of the experts on each rank"
    batch = batch_of(rank)
    loss = model(input_ids=batch.tokens_BS, labels=batch.targets_BS).loss
    loss.backward()
    gradients = {name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients}


def layers_for(config: Config, num_layers: int, mesh: Mesh) -> Iterator[MoELayer]:
    timeline, kernels = Timeline(CPU, enabled=False), make_kernels(CPU, "torch")
    return (MoELayer(config, mesh, timeline, kernels, VOCAB, index) for index in range(num_layers))


def our_step(family: Family, changes: dict[str, Any], folder: Path, mesh: Mesh) -> dict[str, Any]:
    """The same by one step of SGD at learning rate 1, which moves each weight by its gradient."""
    from transformers import AutoModelForCausalLM

    config = tiny_with(
        family.name,
        dispatch="alltoall",
        experts__num_shared=family.num_shared,
        optim__clip_norm=None,
        **{f"router__{key}": value for key, value in changes.items()},
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for block, layer in zip(model.model.layers, layers_for(config, 2, mesh), strict=True):
        if hasattr(block.mlp, "experts"):
            block.mlp = Adapter(layer, block.mlp, mesh)
    wrapped = Wrapped(model)
    before = {name: p.detach().double().clone() for name, p in wrapped.named_parameters()}
    engine = make_engine(config, wrapped, mesh, 1)
    loss = engine.forward_backward(batch_of(mesh.rank)).loss.item()
    norm = engine.step(1.0)
    moved = {name: (before[name] - p.detach().double()).numpy() for name, p in wrapped.named_parameters()}
    return {"loss": loss, "norm": norm, "gradients": moved}


def steps_of(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    """All families, each by transformers, by us, and by us with a wrong router."""
    mesh, found = mesh_of_world(2, CPU), []
    for family in FAMILIES:
        path = Path(folder) / family.name
        if rank == 0:
            save_random(family, path)
        dist.barrier()
        ours, wrong = (our_step(family, changes, path, mesh) for changes in ({}, family.wrong))
        found.append({"theirs": their_step(path, rank), "ours": ours, "wrong": wrong})
    return found


def their_names(by_rank: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Our gradients under their names: experts of both ranks side by side, gate and up of the shared one apart."""
    named: dict[str, np.ndarray] = {}
    for name, gradient in by_rank[0].items():
        stem, inside, own = name.removeprefix("model.").partition(".mlp.layer.")
        if not inside:
            named[stem] = gradient
        elif own == "shared.gate_up":
            halves = zip(("gate", "up"), np.split(gradient, 2), strict=True)
            named |= {f"{stem}.mlp.shared_experts.{part}_proj.weight": half for part, half in halves}
        else:
            both = own.startswith("experts.")
            named[f"{stem}.mlp.{RENAMED[own]}"] = np.concatenate([f[name] for f in by_rank]) if both else gradient
    return named


def farthest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference of any entry of any gradient."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - gradient).max()) for name, gradient in theirs.items())


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(2, steps_of, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=[family.name for family in FAMILIES])
def test_a_step_equals_that_of_transformers(steps: list[list[dict[str, Any]]], number: int) -> None:
    found = [by_rank[number] for by_rank in steps]
    theirs = found[0]["theirs"]["gradients"]
    for one in found:
        assert one["ours"]["loss"] == pytest.approx(one["theirs"]["loss"], abs=1e-6)
    assert abs(found[0]["ours"]["loss"] - found[1]["ours"]["loss"]) > 1e-2, "the ranks saw different batches"
    assert farthest(their_names([one["ours"]["gradients"] for one in found]), theirs) < 1e-6
    norm = np.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in theirs.values()))
    assert found[0]["ours"]["norm"] == pytest.approx(norm, rel=1e-6)
    assert all(np.abs(gradient).max() > 1e-4 for gradient in theirs.values()), "every parameter took part"


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=[family.name for family in FAMILIES])
def test_another_router_would_be_noticed(steps: list[list[dict[str, Any]]], number: int) -> None:
    found = [by_rank[number] for by_rank in steps]
    assert abs(found[0]["wrong"]["loss"] - found[0]["theirs"]["loss"]) > 1e-3
    wrong = their_names([one["wrong"]["gradients"] for one in found])
    assert farthest(wrong, found[0]["theirs"]["gradients"]) > 1e-2
