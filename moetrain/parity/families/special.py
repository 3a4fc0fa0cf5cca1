"""Blocks that need something of their own: another activation, weights on the input, hash tables, identity experts."""

from __future__ import annotations

from typing import Any

from moetrain.parity.case import DIM, WIDTH, Case
from moetrain.parity.layouts import (
    Layout,
    head,
    interleaved,
    listed,
    shared,
    shared_stacked,
    stacked,
    transposed,
    transposed_biased,
)

LIMIT = 0.5  # low enough that a good part of the gates and ups is cut off


def _local(k: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": DIM, "intermediate_size": WIDTH, "num_local_experts": 8, "num_experts_per_tok": k} | more


GPT_OSS = (
    Case(
        "gpt_oss",
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        _local(4, swiglu_limit=LIMIT),
        "gpt_oss",
        Layout(interleaved, gate="router.weight", gate_bias="router.bias"),
        {"top_k": 4},
        experts={"activation": "gpt_oss", "activation_limit": LIMIT, "bias": True},
    ),
    Case(
        "openai_privacy_filter",
        "openai_privacy_filter",
        "OpenAIPrivacyFilterMLP",
        "OpenAIPrivacyFilterConfig",
        _local(4, swiglu_limit=LIMIT),
        "gpt_oss",
        Layout(transposed_biased, gate="router.weight", gate_bias="router.bias"),
        {"top_k": 4},
        experts={"activation": "gpt_oss", "activation_limit": LIMIT, "bias": True},
    ),
    Case(
        "minimax_m3_vl",
        "minimax_m3_vl",
        "MiniMaxM3VLSparseMoeBlock",
        "MiniMaxM3VLTextConfig",
        _local(3, swiglu_limit=LIMIT, shared_intermediate_size=WIDTH, routed_scaling_factor=1.5),
        "minimax_m2",
        Layout(stacked, shared_stacked("shared_experts"), bias="gate.e_score_correction_bias"),
        {"top_k": 3, "scale": 1.5},
        experts={"activation": "gpt_oss", "activation_limit": LIMIT, "num_shared": 1},
        std=0.18,
    ),
)

LLAMA4 = tuple(
    Case(
        f"llama4-k{k}",
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        _local(k),
        "llama4",
        Layout(transposed, shared("shared_expert"), gate="router.weight"),
        {"top_k": k},
        experts={"num_shared": 1},
    )
    for k in (1, 2)
)

COHERE2 = tuple(
    Case(
        f"cohere2_moe-{name}",
        "cohere2_moe",
        "Cohere2MoeSparseMoeBlock",
        "Cohere2MoeConfig",
        {
            "hidden_size": DIM,
            "intermediate_size": WIDTH,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1 if mode else 0,
        }
        | ({"shared_expert_combination_strategy": "average" if mode == "average" else "sum"} if mode else {})
        | {"expert_selection_fn": "sigmoid" if weights else "softmax", "norm_topk_prob": "renormalise" in weights},
        "cohere2",
        Layout(stacked, shared("shared_experts") if mode else None),
        {"top_k": 3} | weights,
        experts={"num_shared": 1, "shared_mode": mode} if mode else {},
    )
    for name, weights, mode in (
        ("softmax", {}, None),
        ("softmax-average", {}, "average"),
        ("sigmoid-add", {"weights": "chosen_sigmoid"}, "add"),
        ("sigmoid-average", {"weights": "chosen_sigmoid", "renormalise": "sum"}, "average"),
    )
)

V4_LAYOUT = Layout(stacked, shared("shared_experts"), bias="gate.e_score_correction_bias")
DEEPSEEK_V4 = (
    Case(
        "deepseek_v4",
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        "DeepseekV4Config",
        {
            "hidden_size": DIM,
            "moe_intermediate_size": WIDTH,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["moe"],
            "swiglu_limit": LIMIT,
        },
        "deepseek_v4",
        V4_LAYOUT,
        {"top_k": 3},
        experts={"num_shared": 1, "activation_limit": LIMIT},
        block_arguments={"layer_idx": 0},
    ),
    Case(
        "deepseek_v4-hash",
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        "DeepseekV4Config",
        {
            "hidden_size": DIM,
            "moe_intermediate_size": WIDTH,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["hash_moe"],
            "vocab_size": 64,
            "swiglu_limit": LIMIT,
        },
        "hash",
        Layout(stacked, shared("shared_experts"), table="gate.tid2eid"),
        {"top_k": 3, "weights": "sqrtsoftplus", "renormalise": "sum", "scale": 1.5},
        experts={"num_shared": 1, "activation_limit": LIMIT},
        block_arguments={"layer_idx": 0},
        takes_tokens=True,
    ),
)

LONGCAT = (
    Case(
        "longcat_flash",
        "longcat_flash",
        "LongcatFlashMoE",
        "LongcatFlashConfig",
        {
            "hidden_size": DIM,
            "expert_ffn_hidden_size": WIDTH,
            "n_routed_experts": 8,
            "zero_expert_num": 4,
            "moe_topk": 3,
            "routed_scaling_factor": 2.0,  # published 6.0, which would bring outputs, and their rounding, to 10
        },
        "longcat",
        Layout(head(stacked, 8), gate="router.classifier.weight", bias="router.e_score_correction_bias", unbiased=4),
        {"scale": 2.0},
    ),
)

PHIMOE = tuple(
    Case(
        f"phimoe-eps{eps:g}",
        "phimoe",
        "PhimoeSparseMoeBlock",
        "PhimoeConfig",
        _local(2, router_jitter_noise=eps),
        "sparsemixer",
        Layout(stacked, gate="router.weight"),
        {} if eps == 0.01 else {"epsilon": eps},
    )
    for eps in (0.01, 0.4)
)

SWITCH = tuple(
    Case(
        f"switch-{'dropping' if slots else 'dropless'}",
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        "SwitchTransformersConfig",
        {"d_model": DIM, "d_ff": WIDTH, "num_experts": 8, "expert_capacity": slots or 64},
        "switch",
        Layout(listed("wi", "wo"), gate="router.classifier.weight"),
        {"top_k": 1},
        experts={"activation": "relu"},
        capacity={
            "factor_train": 1.0,
            "factor_eval": 1.0,
            "slots_train": slots,
            "slots_eval": slots,
            "scope": "sequence",
        }
        if slots
        else {},
    )
    for slots in (None, 3)
)

SPECIAL = GPT_OSS + LLAMA4 + COHERE2 + DEEPSEEK_V4 + LONGCAT + PHIMOE + SWITCH
