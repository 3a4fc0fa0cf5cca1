"""What `moetrain check` says of a run's router: how it chooses, what evens its load, what slots its experts have."""

from __future__ import annotations

from dataclasses import fields

from moetrain.checks import CONTEXT, fitted, traits_of
from moetrain.compose import Composed, option_values
from moetrain.config import BalanceConfig, Config
from moetrain.moe.capacity import slots_per_expert
from moetrain.parts import TARGET, parameters, resolve
from moetrain.plan import balance_of
from moetrain.problems import typed
from moetrain.types import RouterTraits

EVENING = ("balance_coef", "device_coef", "communication_coef", "importance_coef")


def router_report(composed: Composed, world_size: int, config_dir: str | None) -> str:
    """A short block of lines for the terminal."""
    config, traits = composed.config, traits_of(composed.config)
    name = config.router[TARGET].rpartition(".")[2]
    lines = [f"router          {name}: {', '.join(_choice(config, traits))}"]
    if taken := _defaults(config):
        lines.append(f"                by default {' '.join(taken)}")
    lines += [f"load            evened by {_evened(config, traits)}"]
    lines += [f"slots           {text}" for text in _slots(config, traits, world_size)]
    if config.experts.allow_noncausal and not (traits.causal_train and traits.causal_eval):
        lines.append(
            "reminder        experts.allow_noncausal is on: losses can't be compared with those of causal runs"
        )
    return "\n".join(lines + [f"published       {text}" for text in published_notes(composed, config_dir)])


def published_notes(composed: Composed, config_dir: str | None) -> list[str]:
    """Where the balance section is not what the router was published with, or comes on top of its own means."""
    about, balance, traits = composed.about, composed.config.balance, traits_of(composed.config)
    if about is None:
        return []
    notes = []
    published = BalanceConfig(**option_values("balance", [about.balance], config_dir)[about.balance])
    if published != balance:
        names = [f.name for f in fields(balance) if getattr(balance, f.name) != getattr(published, f.name)]
        here = " ".join(f"{name}={typed(getattr(balance, name))}" for name in names)
        notes.append(f"this router was published with balance={about.balance}; this run has {here}")
    losses = [name for name in EVENING if getattr(balance, name)]
    if losses and traits.balance != "none" and not any(getattr(published, name) for name in EVENING):
        notes.append(f"its load is evened by {traits.balance} already; balance.{losses[0]} comes on top (balance=none)")
    return notes


def _choice(config: Config, traits: RouterTraits) -> list[str]:
    mean = f"{traits.experts_per_token:g} of {config.experts.num_experts} experts a token"
    told = [f"{mean} expected, ragged" if traits.ragged else mean]
    if zero := config.router.get("zero_experts"):
        told.append(f"{zero} zero experts beside them")
    when = "in training" if traits.causal_eval else "in training and evaluation"
    told.append("causal" if traits.causal_train else f"looks at later tokens {when}")
    return [*told, f"noise {traits.noise}"]


def _defaults(config: Config) -> list[str]:
    """Keys that the configuration leaves to the router's class, and what that takes."""
    found = resolve(config.router[TARGET], config.machine.allow_modules)
    taken = parameters(found, config.router, CONTEXT["router"])
    return [f"{name}={typed(value)}" for name, value in taken.items() if name not in config.router]


def _evened(config: Config, traits: RouterTraits) -> str:
    """By the router itself and by losses, whose coefficients are those that multiply means over layers."""
    ours = balance_of(config)
    by = [traits.balance] if traits.balance != "none" else []
    by += [f"{name} {getattr(ours, name):g} ({ours.scope})" for name in EVENING if getattr(ours, name)]
    return f"{', '.join(by) or 'nothing'}; z_coef {ours.z_coef:g}"


def _slots(config: Config, traits: RouterTraits, world_size: int) -> list[str]:
    """Of an expert in training and in evaluation, for whole micro-batches."""
    capacity, train = config.capacity, fitted(config, world_size).train
    sequences = {"rank": train.micro_batch, "global": train.micro_batch * world_size, "sequence": 1}[capacity.scope]
    tokens, num_experts = sequences * config.model.context, config.experts.num_experts
    fair = traits.experts_per_token * tokens / num_experts
    told = []
    for when, factor, fixed in (
        ("training", capacity.factor_train, capacity.slots_train),
        ("evaluation", capacity.factor_eval, capacity.slots_eval),
    ):
        if factor is None:
            told.append(f"in {when}: no limit, nothing is dropped")
            continue
        slots = fixed or slots_per_expert(tokens, traits.experts_per_token, num_experts, factor, capacity.minimum)
        rest = "what is beyond is dropped"
        if traits.even and when == "training" and slots >= fair and capacity.scope != "sequence":
            rest = "an even load, so that none is dropped"
        told.append(f"in {when}: {slots} an expert for {tokens} tokens ({capacity.scope}), fair share {fair:g}; {rest}")
    return told
