"""Softmax scores with groups of experts: DeepSeek-V2 (a group is as good as its best), Mistral 4 (as its best two)."""

from __future__ import annotations

from typing import Any

from moetrain.parity.case import DIM, WIDTH, Case
from moetrain.parity.layouts import Layout, shared, stacked

LAYOUT = Layout(stacked, shared("shared_experts"))


def _arguments(grouped: bool, scale: float, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": DIM,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4 if grouped else 1,
        "topk_group": 2 if grouped else 1,
        "routed_scaling_factor": scale,
        "num_attention_heads": 4,
    } | more


def _settings(grouped: bool, scale: float) -> dict[str, Any]:
    """Over an option with groups and scale 1."""
    groups = {"num_groups": 4, "top_groups": 2} if grouped else {"num_groups": 1, "top_groups": 1}
    return {"top_k": 4} | groups | ({} if scale == 1.0 else {"scale": scale})


DEEPSEEK_V2 = tuple(
    Case(
        f"{model}-{'groups' if grouped else 'greedy'}{f'-scale{scale:g}' if scale > 1 else ''}",
        model,
        block,
        config,
        _arguments(grouped, scale, topk_method="group_limited_greedy" if grouped else "greedy"),
        "deepseek_v2",
        LAYOUT,
        _settings(grouped, scale),
        experts={"num_experts": 16, "num_shared": 1},
        std=0.12 if scale > 1 else 0.19,
    )
    for model, block, config, modes in (
        ("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", ((False, 1.0), (True, 1.0), (False, 16.0), (True, 16.0))),
        ("deepseek_ocr2", "DeepseekOcr2TextMoe", "DeepseekOcr2TextConfig", ((False, 1.0), (True, 1.0))),
        ("unlimited_ocr", "UnlimitedOcrTextMoe", "UnlimitedOcrTextConfig", ((True, 1.0),)),
    )
    for grouped, scale in modes
)

MISTRAL4 = tuple(
    Case(
        f"{model}-{'groups' if grouped else 'plain'}",
        model,
        block,
        config,
        _arguments(grouped, 1.25, **({"norm_topk_prob": norm} if model == "mistral4" else {})),
        "deepseek_v2",
        LAYOUT,
        _settings(grouped, 1.25)
        | ({"group_score": "top2_sum"} if grouped else {})
        | ({"renormalise": "sum", "renorm_eps": 1e-20} if norm else {}),
        experts={"num_experts": 16, "num_shared": 1},
        std=0.18,
    )
    for model, block, config, grouped, norm in (
        ("mistral4", "Mistral4MoE", "Mistral4Config", False, True),
        ("mistral4", "Mistral4MoE", "Mistral4Config", True, False),
        ("mistral_large4", "MistralLarge4TextMoE", "MistralLarge4TextConfig", False, True),
        ("mistral_large4", "MistralLarge4TextMoE", "MistralLarge4TextConfig", True, True),
    )
)

GROUPED = DEEPSEEK_V2 + MISTRAL4
