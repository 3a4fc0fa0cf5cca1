"""Blocks that score by softmax over all experts, or over the chosen ones, without a bias and without groups."""

from __future__ import annotations

from typing import Any

from moetrain.parity.case import DIM, WIDTH, Case
from moetrain.parity.layouts import Layout, flat, linears, shared, stacked, transposed

ROUTER_LAYOUT = Layout(stacked, gate="router.weight")


def _local(k: int, **more: Any) -> dict[str, Any]:
    """Arguments of the families that call their experts local."""
    return {"hidden_size": DIM, "intermediate_size": WIDTH, "num_local_experts": 8, "num_experts_per_tok": k} | more


def _plain(k: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": DIM, "intermediate_size": WIDTH, "num_experts": 8, "num_experts_per_tok": k} | more


def _narrow(k: int, **more: Any) -> dict[str, Any]:
    """Arguments of the families that name the width of an expert apart from that of a dense layer."""
    return {"hidden_size": DIM, "moe_intermediate_size": WIDTH, "num_experts": 8, "num_experts_per_tok": k} | more


MIXTRAL = (
    Case("mixtral", "mixtral", "MixtralSparseMoeBlock", "MixtralConfig", _local(2), "mixtral", Layout(stacked)),
    Case(
        "mixtral-k4",
        "mixtral",
        "MixtralSparseMoeBlock",
        "MixtralConfig",
        _local(4),
        "mixtral",
        Layout(stacked),
        {"top_k": 4},
    ),
    Case("minimax", "minimax", "MiniMaxSparseMoeBlock", "MiniMaxConfig", _local(2), "mixtral", Layout(stacked)),
    Case("jamba", "jamba", "JambaSparseMoeBlock", "JambaConfig", _plain(2), "jamba", ROUTER_LAYOUT),
    Case(
        "hunyuan_v1_moe",
        "hunyuan_v1_moe",
        "HunYuanMoEV1Moe",
        "HunYuanMoEV1Config",
        {"hidden_size": DIM, "intermediate_size": WIDTH, "num_experts": 8, "moe_topk": 3},
        "hunyuan",
        Layout(stacked, shared("shared_mlp"), gate="gate.wg.weight"),
        {"top_k": 3},
        experts={"num_shared": 1},
    ),
)

NORMALISED_OR_NOT = tuple(
    Case(
        f"{model}-{'normalised' if norm else 'raw'}",
        model,
        block,
        config,
        arguments(3, norm_topk_prob=norm),
        "qwen3_moe" if norm else "olmoe",
        Layout(stacked),
        {"top_k": 3},
    )
    for model, block, config, arguments in (
        ("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", _plain),
        ("flex_olmo", "FlexOlmoSparseMoeBlock", "FlexOlmoConfig", _plain),
        ("mellum", "MellumSparseMoeBlock", "MellumConfig", _narrow),
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", _narrow),
    )
    for norm in (False, True)
)

ALWAYS_OR_ONE = (
    Case(
        "qwen3_vl_moe",
        "qwen3_vl_moe",
        "Qwen3VLMoeTextSparseMoeBlock",
        "Qwen3VLMoeTextConfig",
        _narrow(3),
        "qwen3_moe",
        Layout(stacked),
        {"top_k": 3},
    ),
    Case(
        "olmoe-k1",
        "olmoe",
        "OlmoeSparseMoeBlock",
        "OlmoeConfig",
        _plain(1, norm_topk_prob=False),
        "olmoe",
        Layout(stacked),
        {"top_k": 1},
    ),
)

GATED_SHARED = tuple(
    Case(
        f"{model}-{'normalised' if norm else 'raw'}",
        model,
        block,
        config,
        _narrow(3, shared_expert_intermediate_size=2 * WIDTH, **({} if always else {"norm_topk_prob": norm})),
        "qwen3_moe" if norm else "qwen2_moe",
        Layout(stacked, shared("shared_expert"), shared_gate="shared_expert_gate.weight"),
        {"top_k": 3},
        experts={"num_shared": 2, "shared_mode": "gated"},
        std=0.18,
    )
    for model, block, config, norm, always in (
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", False, False),
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", True, False),
        ("qwen3_next", "Qwen3NextSparseMoeBlock", "Qwen3NextConfig", True, False),
        ("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", "Qwen3_5MoeTextConfig", True, True),
        ("qwen4_exp", "Qwen4ExpTextSparseMoeBlock", "Qwen4ExpTextConfig", True, False),
    )
)

GRANITE = tuple(
    Case(model, model, block, config, _local(3, **more), "granite", ROUTER_LAYOUT, {"top_k": 3})
    for model, block, config, more in (
        ("granitemoe", "GraniteMoeMoE", "GraniteMoeConfig", {}),
        ("granitemoeshared", "GraniteMoeSharedMoE", "GraniteMoeSharedConfig", {}),
        ("granitemoehybrid", "GraniteMoeHybridMoE", "GraniteMoeHybridConfig", {"mamba_n_heads": 8}),
        ("granitemoe_swa", "GraniteMoeSWAMoE", "GraniteMoeSWAConfig", {}),
    )
)

LIKE_GRANITE = (
    Case(
        "jetmoe",
        "jetmoe",
        "JetMoeMoE",
        "JetMoeConfig",
        _local(2),
        "granite",
        Layout(linears, gate="router.layer.weight"),
        {"top_k": 2},
        finish=lambda out_TD, theirs: out_TD + theirs["bias"],
        around="adds a trained bias to the block's output",
    ),
    Case(
        "aria",
        "aria",
        "AriaTextMoELayer",
        "AriaTextConfig",
        {
            "hidden_size": DIM,
            "intermediate_size": WIDTH,
            "moe_num_experts": 8,
            "moe_topk": 2,
            "moe_num_shared_experts": 2,
        },
        "granite",
        Layout(transposed, shared("shared_experts"), gate="router.weight"),
        {"top_k": 2},
        experts={"num_shared": 2},
        std=0.18,
    ),
)

DBRX = tuple(
    Case(
        f"dbrx-{'raw' if norm is None else f'norm{norm:g}'}",
        "dbrx",
        "DbrxFFN",
        "DbrxConfig",
        {
            "d_model": DIM,
            "attn_config": {"rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": DIM,
                "ffn_hidden_size": WIDTH,
                "moe_num_experts": 8,
                "moe_top_k": 4,
                "moe_jitter_eps": 0.0,
                "moe_normalize_expert_weights": norm,
            },
        },
        "dbrx",
        Layout(flat, gate="router.layer.weight"),
        {"top_k": 4} | changes,
    )
    for norm, changes in ((1.0, {}), (2.0, {"renorm_p": 2.0}), (None, {"renormalise": "none"}))
)

SOFTMAX = MIXTRAL + NORMALISED_OR_NOT + ALWAYS_OR_ONE + GATED_SHARED + GRANITE + LIKE_GRANITE + DBRX
