"""What a coefficient of a router loss that was copied from somewhere else means here.

Libraries agree on ``sum_e f_e * P_e`` and on little else. Ours is 1.0 when the load is even, for every k, and a mean
over layers. What the others' balance loss of one layer is when the load is even, and what they do with layers:

==============  ============  ==============================================================================
huggingface     k             one value for the rows of all layers together, so not multiplied by the layers
megatron        1             summed over layers
megablocks      1             mean over layers (llm-foundry's DBRX, OLMoE)
gshard          1 / E^2       summed over layers; first choices only
deepspeed       1             left to the user, who sums over layers in DeepSpeed's own examples
switch          1             summed over layers
==============  ============  ==============================================================================

The factor is exact where the losses differ by a factor. It is the right one at an even load where they don't: gshard
and DeepSpeed's top-2 gate count first choices only, and Hugging Face's lets layers that collapse on different experts
cancel each other. ``device_coef``, ``communication_coef`` (1 when even for all) and ``z_coef`` are converted by the
layers alone. ``importance_coef`` is none of these libraries' and stays what it is.
"""

from __future__ import annotations

from dataclasses import replace

from moetrain.config import BalanceConfig, BalanceUnits

SUMMED_OVER_LAYERS = ("megatron", "gshard", "deepspeed", "switch")


def value_when_even(units: BalanceUnits, *, top_k: float, num_experts: int) -> float:
    """What the loss of one layer is under an even load."""
    return {"huggingface": float(top_k), "gshard": 1 / num_experts**2}.get(units, 1.0)


def to_ours(coef: float, units: BalanceUnits, *, top_k: float, num_experts: int, num_moe_layers: int) -> float:
    """The coefficient that gives the same loss here, at an even load, as ``coef`` gives there.

    top_k: experts per token, the expected number where it is ragged.
    """
    even = value_when_even(units, top_k=top_k, num_experts=num_experts)
    return coef * layers_counted(units, num_moe_layers) * even


def layers_counted(units: BalanceUnits, num_moe_layers: int) -> int:
    """How many times the mean over layers a loss over all layers is."""
    return num_moe_layers if units in SUMMED_OVER_LAYERS else 1


def in_our_units(config: BalanceConfig, *, top_k: float, num_experts: int, num_moe_layers: int) -> BalanceConfig:
    """The same losses, their coefficients converted."""
    units, layers = config.units, layers_counted(config.units, num_moe_layers)
    return replace(
        config,
        balance_coef=to_ours(
            config.balance_coef, units, top_k=top_k, num_experts=num_experts, num_moe_layers=num_moe_layers
        ),
        device_coef=config.device_coef * layers,
        communication_coef=config.communication_coef * layers,
        z_coef=config.z_coef * layers,
        units="moetrain",
    )
