"""How the blocks of transformers lay out their weights, and the same numbers as moetrain lays them out.

A layout only renames, cuts, stacks and transposes, so it turns the gradients of a block into ours as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Relay = Callable[[Tensors], dict[str, Tensor]]
BIASES = {"experts.gate_up_bias": "gate_up", "experts.down_bias": "down"}


@dataclass(frozen=True)
class Layout:
    """The names under which a block keeps what an MoE layer has.

    experts, shared: functions from the block's tensors to ours. gate: the router's weight [E, D]; gate_bias: its
    trained bias. bias: the selection bias, no gradient; unbiased: its last so many entries, of experts that compute
    nothing, stay 0. table: the experts of each token id, no gradient. shared_gate: the weight [1, D] of the sigmoid
    gate on the shared experts.
    """

    experts: Relay
    shared: Relay | None = None
    gate: str = "gate.weight"
    gate_bias: str | None = None
    bias: str | None = None
    unbiased: int = 0
    table: str | None = None
    shared_gate: str | None = None

    def parameters(self, theirs: Tensors) -> dict[str, Tensor]:
        """Our parameters, from the block's; or their gradients, from the block's gradients."""
        ours = self.experts(theirs) | ({} if self.shared is None else self.shared(theirs))
        named = {"router.gate": self.gate, "router.gate_bias": self.gate_bias, "shared.shared_gate": self.shared_gate}
        return ours | {name: theirs[key] for name, key in named.items() if key is not None}

    def buffers(self, theirs: Tensors) -> dict[str, Tensor]:
        """What is not trained by the gradient."""
        bias: dict[str, Tensor] = {}
        if self.bias is not None:
            bias_A = theirs[self.bias].flatten()
            bias = {"router.bias_E": bias_A[: bias_A.shape[0] - self.unbiased]}
        return bias | ({} if self.table is None else {"router.expert_VK": theirs[self.table]})


def stacked(theirs: Tensors) -> dict[str, Tensor]:
    """gate_up_proj [E, 2F, D], down_proj [E, D, F]: moetrain's own layout, Mixtral and nearly everybody since."""
    return {"experts.gate_up": theirs["experts.gate_up_proj"], "experts.down": theirs["experts.down_proj"]}


def transposed(theirs: Tensors) -> dict[str, Tensor]:
    """gate_up_proj [E, D, 2F], down_proj [E, F, D]: Llama 4, Aria."""
    return {name: weight.transpose(1, 2) for name, weight in stacked(theirs).items()}


def interleaved(theirs: Tensors) -> dict[str, Tensor]:
    """As ``transposed``, but gate and up take turns, and there are biases: gpt-oss."""
    ours = transposed_biased(theirs)
    gate_up, bias = _halves(theirs["experts.gate_up_proj"]), _halves(theirs["experts.gate_up_proj_bias"])
    return ours | {"experts.gate_up": gate_up.transpose(1, 2), "experts.gate_up_bias": bias}


def transposed_biased(theirs: Tensors) -> dict[str, Tensor]:
    """As ``transposed``, with biases."""
    biases = {name: theirs[f"experts.{key}_proj_bias"] for name, key in BIASES.items()}
    return transposed(theirs) | biases


def flat(theirs: Tensors) -> dict[str, Tensor]:
    """w1 (gate), v1 (up), w2 (down, transposed), each [E * F, D] under ``experts.mlp``: DBRX. E = 8."""
    w1, v1, w2 = (theirs[f"experts.mlp.{name}"].unflatten(0, (8, -1)) for name in ("w1", "v1", "w2"))
    return {"experts.gate_up": torch.cat([w1, v1], dim=1), "experts.down": w2.transpose(1, 2)}


def linears(theirs: Tensors) -> dict[str, Tensor]:
    """input_linear [E, 2F, D] and output_linear [E, D, F]: JetMoE."""
    return {"experts.gate_up": theirs["input_linear.weight"], "experts.down": theirs["output_linear.weight"]}


def ungated(theirs: Tensors) -> dict[str, Tensor]:
    """up_proj [E, F, D] without a gate, down_proj [E, D, F]: Nemotron-H."""
    return {"experts.up": theirs["experts.up_proj"], "experts.down": theirs["experts.down_proj"]}


def listed(first: str, second: str, biased: bool = False) -> Relay:
    """A module per expert, without a gate: ``experts.expert_0.FIRST``, ``.SECOND``; Switch, NLLB. E = 8."""
    names = {"experts.up": f"{first}.weight", "experts.down": f"{second}.weight"}
    names |= {"experts.up_bias": f"{first}.bias", "experts.down_bias": f"{second}.bias"} if biased else {}

    def relay(theirs: Tensors) -> dict[str, Tensor]:
        return {
            ours: torch.stack([theirs[f"experts.expert_{e}.{name}"] for e in range(8)]) for ours, name in names.items()
        }

    return relay


def head(relay: Relay, num_experts: int) -> Relay:
    """The first experts only: LongCat keeps weights for experts that compute nothing."""
    return lambda theirs: {name: weight[:num_experts] for name, weight in relay(theirs).items()}


def shared(prefix: str) -> Relay:
    """A dense SwiGLU of three linear maps under ``prefix``."""

    def relay(theirs: Tensors) -> dict[str, Tensor]:
        gate, up, down = (theirs[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return {"shared.gate_up": torch.cat([gate, up]), "shared.down": down}

    return relay


def shared_stacked(prefix: str) -> Relay:
    """A dense SwiGLU of two linear maps under ``prefix``, gate and up in one."""
    return lambda theirs: {
        "shared.gate_up": theirs[f"{prefix}.gate_up_proj.weight"],
        "shared.down": theirs[f"{prefix}.down_proj.weight"],
    }


def shared_ungated(prefix: str) -> Relay:
    """A dense network of two linear maps under ``prefix``."""
    return lambda theirs: {
        "shared.up": theirs[f"{prefix}.up_proj.weight"],
        "shared.down": theirs[f"{prefix}.down_proj.weight"],
    }


def _halves(turns: Tensor) -> Tensor:
    """The last dim, g0 u0 g1 u1 ... -> g0 g1 ... u0 u1 ..."""
    return torch.cat([turns[..., ::2], turns[..., 1::2]], dim=-1)
