"""Blocks whose choice has a bias, or whose scores are neither softmax nor DeepSeek-V3's; and those that cut logits."""

from __future__ import annotations

from typing import Any

from moetrain.parity.case import DIM, WIDTH, Case
from moetrain.parity.layouts import Layout, shared, stacked

UNBIASED = {"bias": "none", "bias_centred": True}
GATE_BIAS, BLOCK_BIAS = "gate.e_score_correction_bias", "e_score_correction_bias"


def _narrow(k: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": DIM, "moe_intermediate_size": WIDTH, "num_experts": 8, "num_experts_per_tok": k} | more


ERNIE = tuple(
    Case(
        f"ernie4_5_moe-shared{num_shared}",
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        "Ernie4_5_MoeConfig",
        {
            "hidden_size": DIM,
            "moe_intermediate_size": WIDTH,
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_num_shared_experts": num_shared,
        },
        "ernie4_5",
        Layout(
            stacked,
            shared("shared_experts") if num_shared else None,
            bias="gate.moe_statics.e_score_correction_bias",
        ),
        {"top_k": 3},
        experts={"num_shared": num_shared},
        std=0.18,
    )
    for num_shared in (0, 2)
)

ERNIE_VL = (
    Case(
        "ernie4_5_vl_moe",
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeSparseMoeBlock",
        "Ernie4_5_VLMoeTextConfig",
        {"hidden_size": DIM, "moe_num_experts": 8, "moe_k": 3},
        "ernie4_5",
        Layout(stacked, bias="gate.moe_statics.e_score_correction_bias"),
        {"top_k": 3},
        block_arguments={"intermediate_size": WIDTH},
    ),
)

MINIMAX = (
    Case(
        "minimax_m2",
        "minimax_m2",
        "MiniMaxM2SparseMoeBlock",
        "MiniMaxM2Config",
        {"hidden_size": DIM, "intermediate_size": WIDTH, "num_local_experts": 8, "num_experts_per_tok": 3},
        "minimax_m2",
        Layout(stacked, bias=BLOCK_BIAS),
        {"top_k": 3},
    ),
)

HUNYUAN = (
    Case(
        "hy_v3",
        "hy_v3",
        "HYV3MoE",
        "HYV3Config",
        _narrow(3, num_shared_experts=1, router_scaling_factor=1.5),
        "minimax_m2",
        Layout(stacked, shared("shared_experts"), bias=BLOCK_BIAS),
        {"top_k": 3, "renorm_eps": 1e-20, "scale": 1.5},
        experts={"num_shared": 1},
        std=0.18,
    ),
    Case(
        "afmoe",
        "afmoe",
        "AfmoeSparseMoeBlock",
        "AfmoeConfig",
        _narrow(3, num_shared_experts=2, route_scale=1.5),
        "minimax_m2",
        Layout(stacked, shared("shared_experts"), gate="router.gate.weight", bias="expert_bias"),
        {"top_k": 3, "renorm_eps": 1e-20, "scale": 1.5},
        experts={"num_shared": 2},
        std=0.18,
    ),
)

LFM2 = tuple(
    Case(
        f"lfm2_moe-{'biased' if biased else 'raw'}",
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        "Lfm2MoeConfig",
        _narrow(3, use_expert_bias=biased, norm_topk_prob=biased, routed_scaling_factor=1.5 if biased else 1.0),
        "lfm2",
        Layout(stacked, bias="expert_bias" if biased else None),
        {"top_k": 3} | ({"scale": 1.5} if biased else UNBIASED | {"renormalise": "none", "renorm_eps": 0.0}),
    )
    for biased in (True, False)
)

LAGUNA = tuple(
    Case(
        f"laguna-{name}",
        "laguna",
        "LagunaSparseMoeBlock",
        "LagunaConfig",
        _narrow(
            3,
            shared_expert_intermediate_size=WIDTH,
            moe_routed_scaling_factor=1.5,
            moe_router_logit_softcapping=softcap or 0.0,
        ),
        "laguna",
        Layout(stacked, shared("shared_experts"), bias=GATE_BIAS),
        {"top_k": 3, "scale": 1.5} | changes,
        experts={"num_shared": 1},
        std=0.18,
    )
    for name, softcap, changes in (
        ("softcap30", 30.0, {}),
        ("softcap", 0.5, {"logit_softcap": 0.5}),
        ("linear", None, {"logit_softcap": None}),
    )
)

KOLIBRI = tuple(
    Case(
        f"kolibri1-{'normalised' if norm else 'raw'}",
        "kolibri1",
        "Kolibri1SparseMoeBlock",
        "Kolibri1Config",
        {
            "hidden_size": DIM,
            "moe_intermediate_size": WIDTH,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": WIDTH,
            "norm_topk_prob": norm,
        },
        "cohere2",
        Layout(stacked, shared("shared_experts"), bias=GATE_BIAS),
        {"top_k": 3, "weights": "chosen_sigmoid", "bias": "frozen", "renormalise": "sum" if norm else "none"},
        experts={"num_shared": 1},
        std=0.18,
    )
    for norm in (False, True)
)

FLINT = tuple(
    Case(
        f"flint-{'normalised' if norm else 'raw'}",
        "flint",
        "FlintSparseMoeBlock",
        "FlintConfig",
        _narrow(3, shared_expert_intermediate_size=WIDTH, norm_topk_prob=norm),
        "minimax_m2",
        Layout(stacked, shared("shared_expert")),
        {"top_k": 3, **UNBIASED, "renormalise": "sum" if norm else "none"},
        experts={"num_shared": 1},
        std=0.18,
    )
    for norm in (False, True)
)

STEP = (
    Case(
        "step3p7",
        "step3p7",
        "Step3p7SparseMoeBlock",
        "Step3p7TextConfig",
        {
            "hidden_size": DIM,
            "moe_intermediate_size": WIDTH,
            "share_expert_dim": WIDTH,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_router_scaling_factor": 1.5,
        },
        "minimax_m2",
        Layout(stacked, shared("shared_experts"), bias=GATE_BIAS),
        {"top_k": 3, "scale": 1.5},
        experts={"num_shared": 1},
        block_arguments={"layer_idx": 0},
        std=0.18,
    ),
)

BIASED = ERNIE + ERNIE_VL + MINIMAX + HUNYUAN + LFM2 + LAGUNA + KOLIBRI + FLINT + STEP
