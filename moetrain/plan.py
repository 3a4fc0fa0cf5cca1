"""What a run will need, before it needs it: sizes, memory, traffic, and a dry run of the whole world in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.checks import ep_size_of, fitted, refit, traits_of
from moetrain.config import BalanceConfig, CapacityConfig, Config
from moetrain.data import load_tokenizer, prepare
from moetrain.models.block import is_moe_layer
from moetrain.models.counts import SizeReport, share_through, size_report
from moetrain.models.decoder import Decoder
from moetrain.moe.units import in_our_units
from moetrain.ops.high_water import HighWater
from moetrain.ops.kernels import make_kernels
from moetrain.parallel.mesh import close_mesh, mesh_of_world
from moetrain.plan_memory import PlannedMemory, device_of, planned_memory, value_bytes
from moetrain.plan_traffic import exchange_bytes
from moetrain.rules.layout import HIERARCHICAL, ranks_of_node
from moetrain.types import Batch, ConfigError, Problem

GIB = 2**30
PADDED = {"_target_": "moetrain.moe.dispatch.padded.PaddedDispatcher"}


@dataclass(frozen=True)
class Plan:
    """Per rank of a world: parameters held, bytes of training state, bytes sent per step by the experts' all-to-all.

    ``memory`` is without activations; those ``dry_run`` counts.
    ``ours`` is the balance section in our units. ``notes`` say what in the configuration may surprise.
    """

    world_size: int
    ep_size: int
    accumulation: int
    size: SizeReport
    local_dense: int
    local_experts: int
    memory: PlannedMemory
    tokens_per_step: int
    exchange_bytes: int
    ours: BalanceConfig
    active_note: str
    exchange_note: str
    notes: tuple[str, ...]

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimiser state of a rank between steps."""
        return self.memory.state

    @property
    def start_bytes(self) -> int:
        """The model is built whole, in fp32, before ZeRO takes its share of it: that can be the higher peak."""
        return 4 * (self.local_dense + self.local_experts)


def vocab_size_of(config: Config) -> int:
    """``model.vocab_size``, or that of the tokenizer which the data section names (prepared bins bring their own).

    Raises ConfigError where the tokenizer has ids that the model has not.
    """
    if config.data.source == "bins":
        num_ids = prepare(config.data, context=config.model.context).vocab_size
    else:
        num_ids = load_tokenizer(config.data.tokenizer).vocab_size
    asked = config.model.vocab_size
    if asked is not None and asked < num_ids:
        fix = f"leave it null, or set model.vocab_size={num_ids} or more"
        raise ConfigError([Problem("model.vocab_size", asked, f"the tokenizer has {num_ids:,} ids", fix)])
    return num_ids if asked is None else asked


def make_plan(config: Config, world_size: int) -> Plan:
    """Work it out from the configuration; nothing is built."""
    refitted, config = refit(config, world_size), fitted(config, world_size)
    ep_size = ep_size_of(config, world_size)
    size = size_report(config, vocab_size_of(config))
    dense, experts = size.total - size.routed, size.routed // ep_size
    train, model = config.train, config.model
    accumulation = train.global_batch // (world_size * train.micro_batch)
    num_moe = sum(share_through(model, i) for i in range(model.num_layers) if is_moe_layer(model, i))
    tokens = train.micro_batch * accumulation * model.context
    exchange = exchange_bytes(config, ep_size, num_moe * tokens)
    memory = planned_memory(dense, experts, world_size, ep_size, accumulation, config)
    return Plan(
        world_size,
        ep_size,
        accumulation,
        size,
        dense,
        experts,
        memory,
        train.global_batch * model.context,
        exchange,
        balance_of(config),
        _active_note(config),
        _exchange_note(config),
        (*_refit_note(refitted), *_units_note(config), *_ragged_note(config), *_peeking_note(config)),
    )


def balance_of(config: Config) -> BalanceConfig:
    """The balance section in our units, whatever it was copied from."""
    num_moe_layers = sum(is_moe_layer(config.model, i) for i in range(config.model.num_layers))
    top_k, num_experts = traits_of(config).experts_per_token, config.experts.num_experts
    return in_our_units(config.balance, top_k=top_k, num_experts=num_experts, num_moe_layers=num_moe_layers)


@dataclass(frozen=True)
class DryRun:
    """Parameters that a rank holds, and the most bytes that one micro-batch has alive besides them and what the engine
    keeps: activations, and what backward works with. It is counted without recompute.
    """

    parameters: int
    activations: int


def dry_run(config: Config, world_size: int, rank: int = 0) -> DryRun:
    """Build rank ``rank`` of the world on the meta device with a fake process group; one forward and backward.

    Nothing is computed and nothing is sent, so a router's choice is unknown: an even load through the padded dispatcher
    stands in for it, which moves the same bytes (with the empty slots, where the run is padded itself).
    """
    config = fitted(config, world_size)
    padded = config.dispatch["_target_"] == PADDED["_target_"]
    factor = config.capacity.factor_train if padded else None
    even = CapacityConfig(factor_train=factor or 1.0, factor_eval=1.0)
    config = replace(config, dispatch=PADDED, capacity=even, engine=replace(config.engine, recompute=False))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = mesh_of_world(ep_size_of(config, world_size), torch.device("meta"))
        kernels = make_kernels(device_of(config), "torch")
        model = Decoder(config, mesh, vocab_size_of(config), kernels=kernels)
        parameters = sum(p.numel() for p in model.parameters())
        dtype = {2: torch.bfloat16, 4: torch.float32}[value_bytes(config)]
        return DryRun(parameters, _activations(model.to(dtype), config))
    finally:
        close_mesh()


class _Fused(TorchFunctionMode):
    """Attention as every real device does it: torch's plain one, which meta gets, would keep all scores."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        mask, causal = kwargs["attn_mask"], kwargs["is_causal"]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(*args, 0.0, causal, attn_mask=mask)[0]


def _activations(model: Decoder, config: Config) -> int:
    """Gradients are let go of as soon as they are there: an engine adds them to what it holds."""
    missing = {name for name, _ in model.named_parameters()}

    def let_go(name: str, parameter: Tensor) -> None:
        missing.discard(name)
        parameter.grad = None

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(let_go, name))
    tokens_BS = torch.zeros((config.train.micro_batch, config.model.context), dtype=torch.int64, device="meta")
    with HighWater("meta") as water, _Fused():
        model(Batch(tokens_BS, tokens_BS)).loss.backward()
    assert not missing, f"no gradient for {sorted(missing)}"
    return water.most


def describe(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    size = plan.size
    return "\n".join(
        [
            f"parameters      {_short(size.total)} total, {_short(size.active)} active per token"
            f" ({_short(size.active_without_embedding)} without the input embedding){plan.active_note}",
            f"FLOPs           {_short(size.flops_per_token)} per token, forward and backward",
            f"layout          {plan.world_size} ranks: EP {plan.ep_size} x expert-DP {plan.world_size // plan.ep_size},"
            f" accumulation {plan.accumulation}",
            f"on each rank    {_short(plan.local_dense)} dense + {_short(plan.local_experts)} expert parameters,"
            f" {plan.state_bytes / GIB:.2f} GiB of weights, gradients and optimiser state{_start_note(plan)}"
            " (activations come on top)",
            f"per step        {_short(plan.tokens_per_step)} tokens; each rank sends about"
            f" {plan.exchange_bytes / GIB:.3f} GiB in the experts' all-to-all ({plan.exchange_note})",
            *plan.notes,
        ]
    )


def main_report(config: Config, world_size: int) -> str:
    """Plan, then dry-run it: the text that ``moetrain plan`` prints."""
    plan = make_plan(config, world_size)
    dry = dry_run(config, world_size)
    less = ", less with engine.recompute" if config.engine.recompute else ""
    assert dry.parameters == plan.local_dense + plan.local_experts, (dry, plan)
    return (
        f"{describe(plan)}\ndry run         rank 0 of {world_size} built on the meta device, forward and backward done"
        f"\nmemory          {plan.memory.peak(dry.activations) / GIB:.2f} GiB of tensors at the peak of a step,"
        f" {dry.activations / GIB:.2f} GiB of them activations at an even load{less}; on a CPU the libraries"
        " and what the allocator holds back come on top"
    )


def _active_note(config: Config) -> str:
    traits = traits_of(config)
    return f", expected: at {traits.experts_per_token:g} experts a token" if traits.ragged else ""


def _exchange_note(config: Config) -> str:
    """What the traffic is counted for."""
    traits, factor = traits_of(config), config.capacity.factor_train
    said = [f"expected: at {traits.experts_per_token:g} experts a token"] if traits.ragged else []
    said += ["at an even load"]
    if config.dispatch["_target_"] == PADDED["_target_"] and config.capacity.slots_train is None:
        said += [f"{factor:g} times that with the empty slots"]
    elif factor is not None:
        said += ["if nothing is dropped"]
    if config.dispatch["_target_"] == HIERARCHICAL and ranks_of_node(config.dispatch.get("ranks_per_node")) == 1:
        said += ["with nodes of one rank, as dispatch=dedup sends: see dispatch.ranks_per_node"]
    return ", ".join(said)


def _refit_note(refitted: str) -> list[str]:
    """What run.elastic has changed."""
    return [refitted.replace("elastic: ", "elastic         ")] if refitted else []


def _units_note(config: Config) -> list[str]:
    """What coefficients that were copied from elsewhere become."""
    given, ours = config.balance, balance_of(config)
    if given.units == "moetrain":
        return []
    names = ("balance_coef", "device_coef", "communication_coef", "z_coef")
    said = [f"{name} {getattr(given, name):g} = {getattr(ours, name):g}" for name in names if getattr(given, name)]
    what = f"{', '.join(said) or 'nothing'} in moetrain's (1.0 is even, mean over layers)"
    return [f"router losses   from units of {given.units}: {what}"]


def _ragged_note(config: Config) -> list[str]:
    """A limit that is counted from an expected number of experts per token."""
    traits, capacity = traits_of(config), config.capacity
    if not traits.ragged or traits.even or capacity.factor_train is None:
        return []
    slots = f"for the {traits.experts_per_token:g} experts a token that are expected"
    if capacity.slots_train is not None:
        slots = f"{capacity.slots_train} an expert"
    return [
        f"capacity        slots are {slots}, but the router takes as many as it likes, at the start maybe far more:"
        " what is beyond is dropped (capacity=dropless dispatch=alltoall drops nothing)"
    ]


def _peeking_note(config: Config) -> list[str]:
    """A limit in evaluation under which a token's loss can depend on later tokens."""
    traits, capacity = traits_of(config), config.capacity
    in_order = capacity.priority == "token_major"
    one_choice = traits.experts_per_token == 1 and not traits.ragged and capacity.priority in ("choice_major", "random")
    if capacity.factor_eval is None or in_order or one_choice:
        return []
    return [
        f"validation      can peek: under capacity.priority={capacity.priority} a later token can take the slot of an"
        " earlier one in evaluation too (causal: capacity.priority=token_major, or capacity=dropless dispatch=alltoall)"
    ]


def _start_note(plan: Plan) -> str:
    """Where starting takes more than training."""
    more = plan.start_bytes > plan.state_bytes
    return f"; {plan.start_bytes / GIB:.2f} GiB while it starts" if more else ""


def _short(number: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)
