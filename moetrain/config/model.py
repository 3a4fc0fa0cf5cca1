"""What is trained: the decoder, its experts, and how routing is limited and balanced."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.base import STRICT

BalanceUnits = Literal["moetrain", "huggingface", "megatron", "megablocks", "gshard", "deepspeed", "switch"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """The decoder. ``expert_dim`` is the width of one expert, ``ffn_dim`` that of a dense layer's FFN.

    Layer i is an MoE layer iff i >= first_dense and (i - first_dense) % moe_every == 0.
    Mixture of Depths, if depth_every > 0: tokens may pass by block i iff (i + 1) % depth_every == 0, so that 2 is the
    paper's "every other block"; in training max(1, ceil(depth_fraction * S)) tokens of a sequence of S go through it.
    depth_coef: of the loss of the predictor that decides in evaluation.
    """

    dim: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    ffn_dim: int = Field(gt=0)
    expert_dim: int = Field(gt=0)
    context: int = Field(gt=0)
    vocab_size: int | None = Field(default=None, gt=0)
    first_dense: int = Field(default=0, ge=0)
    moe_every: int = Field(default=1, ge=1)
    tied_embeddings: bool = True
    qk_norm: Literal["none", "head", "full"] = "none"
    rope_theta: float = Field(default=10_000.0, gt=0)
    norm_eps: float = Field(default=1e-6, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    depth_every: int = Field(default=0, ge=0)
    depth_fraction: float = Field(default=0.125, gt=0, le=1)
    depth_coef: float = Field(default=0.01, ge=0)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AboutPart:
    """What a part says of itself under ``_about_``: where it was published, and the options of ``conf/balance``
    (default: our own) and ``conf/capacity`` (null: not known) that come nearest to what it was published with.
    """

    paper: str
    balance: str = "default"
    capacity: str | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExpertsConfig:
    """Routed experts of each MoE layer; shared ones, which every token passes: one FFN of num_shared * expert_dim.

    activation: with a gate swiglu, geglu or gpt_oss ((up + 1) * gate * sigmoid(1.702 gate)), without one relu or relu2
    (squared). activation_limit clamps gate from above and up on both sides. shared_mode: ``add``; ``gated`` by a
    sigmoid of the token (Qwen2-MoE); ``average`` of routed and shared (Cohere2-MoE). allow_noncausal: let a router see
    later tokens, which makes the loss of a causal language model too good to be true.
    """

    num_experts: int = Field(ge=1)
    num_shared: int = Field(default=0, ge=0)
    activation: Literal["swiglu", "geglu", "gpt_oss", "relu", "relu2"] = "swiglu"
    activation_limit: float | None = Field(default=None, gt=0)
    bias: bool = False
    shared_mode: Literal["add", "gated", "average"] = "add"
    allow_noncausal: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CapacityConfig:
    """Slots per expert: ``max(even(floor(k * factor * T / E)), minimum)``; a null factor is dropless.

    slots_train, slots_eval: a fixed number instead of the formula. scope: T is this rank's micro-batch (``rank``), that
    of all ranks (``global``, one small exchange more), or each sequence has its own slots (``sequence``).
    priority, who is served first: ``choice_major`` all first choices before all second ones; ``token_major``;
    ``probs`` the largest weights of each expert; ``batch_prioritised`` choice-major, tokens in order of their best
    probability; ``random`` (in training, choice-major in evaluation). renormalise: weights of a token sum to what they
    summed to, over what was kept.
    """

    factor_train: float | None = Field(default=1.25, gt=0)
    factor_eval: float | None = Field(default=2.0, gt=0)
    minimum: int = Field(default=4, ge=1)
    slots_train: int | None = Field(default=None, ge=1)
    slots_eval: int | None = Field(default=None, ge=1)
    scope: Literal["rank", "global", "sequence"] = "rank"
    priority: Literal["choice_major", "token_major", "probs", "batch_prioritised", "random"] = "choice_major"
    renormalise: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class BalanceConfig:
    """Router losses. All are means over layers; the balance loss is 1.0 when the load is even.

    device_coef, communication_coef: DeepSeek-V2's, over ``num_devices`` groups of experts (null: the EP ranks), of
    which a token reaches ``devices_per_token`` at most (null: as many as it has experts).
    importance_coef: CV^2 of the experts' summed weights (Shazeer et al. 2017). units: what the other coefficients
    were copied from; they are converted to ours (see moetrain.moe.units).
    """

    balance_coef: float = Field(default=0.01, ge=0)
    z_coef: float = Field(default=0.001, ge=0)
    scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    device_coef: float = Field(default=0.0, ge=0)
    communication_coef: float = Field(default=0.0, ge=0)
    importance_coef: float = Field(default=0.0, ge=0)
    num_devices: int | None = Field(default=None, ge=1)
    devices_per_token: int | None = Field(default=None, ge=1)
    units: BalanceUnits = "moetrain"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ControlConfig:
    """Corrections at log windows, each off where its first key is null.

    target_max_vio: mean over layers, to which balance_coef (in moetrain's units) is steered, by at most a factor of
    aux_step a window. target_drop: dropped share, to which capacity.factor_train is steered likewise. bias_decay_from:
    share of the run from which the selection bias's rate falls, linearly, to 0. revive_after_steps: so long without a
    token, and an expert is restarted from a busy one, revive_max times at most; noise over the weights' rms.
    shadow_gain: share of a layer's time that must be saved, by the cost model, for experts of it to be lent to all
    ranks of their EP group or taken back; at most shadow_max of a layer are.
    """

    target_max_vio: float | None = Field(default=None, gt=0)
    aux_min: float = Field(default=1e-4, gt=0)
    aux_max: float = Field(default=0.1, gt=0)
    aux_step: float = Field(default=1.5, gt=1)
    target_drop: float | None = Field(default=None, gt=0, lt=1)
    capacity_min: float = Field(default=1.0, gt=0)
    capacity_max: float = Field(default=2.0, gt=0)
    capacity_step: float = Field(default=1.1, gt=1)
    bias_decay_from: float | None = Field(default=None, ge=0, lt=1)
    revive_after_steps: int | None = Field(default=None, gt=0)
    revive_max: int = Field(default=3, ge=1)
    revive_noise: float = Field(default=0.4, gt=0)
    shadow_gain: float | None = Field(default=None, gt=0, lt=1)
    shadow_max: int = Field(default=8, ge=1)
