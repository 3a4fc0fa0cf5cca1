"""What stands between the two linear maps of an expert, with a gate or without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.swiglu import swiglu

ActivationName = Literal["swiglu", "geglu", "gpt_oss", "relu", "relu2"]
GPT_OSS_SLOPE = 1.702


@dataclass(frozen=True)
class Activation:
    """One activation, and how far its input may go.

    With a gate, [..., 2F] -> [..., F], gate in the first half: ``swiglu`` silu(gate) * up and ``geglu`` gelu(gate) * up
    (Shazeer 2020; GELU by its tanh approximation, as T5 v1.1 and Gemma have it); ``gpt_oss`` (up + 1) * gate *
    sigmoid(1.702 gate). Without one, [..., F] -> [..., F]: ``relu``, and ``relu2``, its square (So et al. 2021).
    limit: gate is clamped to at most this, up to [-limit, limit] (DeepSeek-V4, gpt-oss); None: no clamp.
    """

    name: ActivationName = "swiglu"
    limit: float | None = None

    @property
    def gated(self) -> bool:
        return self.name not in ("relu", "relu2")

    @property
    def num_inputs(self) -> int:
        """Rows of the first linear map for each unit of width."""
        return 2 if self.gated else 1

    def __call__(self, hidden_XF: Tensor) -> Tensor:
        if not self.gated:
            relu_XF = torch.relu(hidden_XF)
            return relu_XF if self.name == "relu" else relu_XF.square()
        if self.limit is not None:
            gate_XF, up_XF = hidden_XF.chunk(2, dim=-1)
            hidden_XF = torch.cat([gate_XF.clamp(max=self.limit), up_XF.clamp(-self.limit, self.limit)], dim=-1)
        return _gate(self.name, hidden_XF)


def _gate(name: ActivationName, hidden_XF: Tensor) -> Tensor:
    if name == "swiglu":
        return swiglu(hidden_XF)
    gate_XF, up_XF = hidden_XF.chunk(2, dim=-1)
    if name == "geglu":
        return torch.nn.functional.gelu(gate_XF, approximate="tanh") * up_XF
    return (up_XF + 1) * gate_XF * torch.sigmoid(GPT_OSS_SLOPE * gate_XF)
