"""What a run will need, before it needs it: sizes, memory, traffic, and a dry run of the whole world in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.checks import ep_size_of, fitted, refit, traits_of
from moetrain.config import BalanceConfig, CapacityConfig, Config
from moetrain.data import load_tokenizer, prepare
from moetrain.models.block import is_moe_layer
from moetrain.models.counts import SizeReport, share_through, size_report
from moetrain.models.decoder import Decoder
from moetrain.moe.units import in_our_units
from moetrain.parallel.mesh import close_mesh, mesh_of_world
from moetrain.types import Batch, ConfigError, Problem

GIB = 2**30
PADDED = {"_target_": "moetrain.moe.dispatch.padded.PaddedDispatcher"}


@dataclass(frozen=True)
class Plan:
    """Per rank of a world: parameters held, bytes of training state, bytes sent per step by the experts' all-to-all.

    ``state_bytes`` are weights, gradients and optimiser state under the ZeRO stage; activations are not in it.
    ``ours`` is the balance section in our units. ``notes`` say what in the configuration may surprise.
    """

    world_size: int
    ep_size: int
    accumulation: int
    size: SizeReport
    local_dense: int
    local_experts: int
    state_bytes: int
    tokens_per_step: int
    exchange_bytes: int
    ours: BalanceConfig
    active_note: str
    exchange_note: str
    notes: tuple[str, ...]

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
    bytes_per_value = 4 if config.engine.dtype == "fp32" else 2
    copies = round(tokens * traits_of(config).experts_per_token) * model.dim * bytes_per_value
    exchange = round(4 * num_moe * copies * (ep_size - 1) / ep_size)
    state = _state_bytes(dense, world_size, config) + _state_bytes(experts, world_size // ep_size, config)
    return Plan(
        world_size,
        ep_size,
        accumulation,
        size,
        dense,
        experts,
        state,
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


def _state_bytes(parameters: int, replicas: int, config: Config) -> int:
    """Weights, gradients and optimiser state of ``parameters`` that ``replicas`` ranks hold alike, under ZeRO."""
    stage, mixed = config.engine.zero_stage, config.engine.dtype != "fp32"
    value = 2 if mixed else 4
    moments = {"adamw": 8, "sgd": 0}[config.optim.name] + (4 if mixed else 0)
    weights = value / (replicas if stage >= 3 else 1)
    gradients = 4 / (replicas if stage >= 2 else 1)
    optimiser = moments / (replicas if stage >= 1 else 1)
    return int(parameters * (weights + gradients + optimiser))


def dry_run(config: Config, world_size: int, rank: int = 0) -> int:
    """Build rank ``rank`` of the world on the meta device with a fake process group; one forward and backward.

    Nothing is computed and nothing is sent, so a router's choice is unknown: an even load through the padded dispatcher
    stands in for it, which moves the same bytes. Returns the number of parameters of this rank.
    """
    even = CapacityConfig(factor_train=1.0, factor_eval=1.0)
    config = fitted(config, world_size)
    config = replace(config, dispatch=PADDED, capacity=even, engine=replace(config.engine, recompute=False))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = mesh_of_world(ep_size_of(config, world_size), torch.device("meta"))
        model = Decoder(config, mesh, vocab_size_of(config))
        shape = (config.train.micro_batch, config.model.context)
        tokens_BS = torch.zeros(shape, dtype=torch.int64, device="meta")
        model(Batch(tokens_BS, tokens_BS)).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing, f"no gradient for {missing}"
        return sum(p.numel() for p in model.parameters())
    finally:
        close_mesh()


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
    held = dry_run(config, world_size)
    assert held == plan.local_dense + plan.local_experts, (held, plan)
    return (
        f"{describe(plan)}\ndry run         rank 0 of {world_size} built on the meta device, forward and backward done"
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
