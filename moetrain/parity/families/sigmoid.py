"""DeepSeek-V3 and the many that route like it: sigmoid scores, a bias for the choice only, groups of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moetrain.parity.case import DIM, WIDTH, Case
from moetrain.parity.layouts import Layout, shared, shared_ungated, stacked, ungated

BIAS = "gate.e_score_correction_bias"
V3 = Layout(stacked, shared("shared_experts"), bias=BIAS)
SHARING = {"num_experts": 16, "num_shared": 1}
ROUTED = {"n_routed_experts": 16, "n_shared_experts": 1}
LOCAL = {"num_local_experts": 16, "n_shared_experts": 1}
GROUPS = {"num_groups": 4, "top_groups": 2, "group_score": "top2_sum"}
LIMIT = 0.5  # low enough that a good part of the gates and ups is cut off


def _arguments(grouped: bool, scale: float, named: Mapping[str, Any]) -> dict[str, Any]:
    """Two modes: no groups, renormalised and scaled; or four groups of which two, weights as they are."""
    return {
        "hidden_size": DIM,
        "moe_intermediate_size": WIDTH,
        "num_experts_per_tok": 4,
        "n_group": 4 if grouped else 1,
        "topk_group": 2 if grouped else 1,
        "norm_topk_prob": not grouped,
        "routed_scaling_factor": 1.0 if grouped else scale,
    } | dict(named)


def _settings(grouped: bool, router: str) -> dict[str, Any]:
    if grouped:
        return {"top_k": 4, "renormalise": "none", "renorm_eps": 0.0, "scale": 1.0} | GROUPS
    ungrouped = {"num_groups": 1, "top_groups": 1, "group_score": "max"}
    return {"top_k": 4} | (ungrouped if router == "deepseek_v3" else {})


def _modes(
    block: tuple[str, str, str],
    named: Mapping[str, Any],
    router: str = "deepseek_v3",
    scale: float = 2.5,
    layout: Layout = V3,
    experts: Mapping[str, Any] = SHARING,
    **more: Any,
) -> tuple[Case, Case]:
    """Both modes of a block (model, class, class of its config)."""

    def case(grouped: bool) -> Case:
        return Case(
            f"{block[0]}-{'groups' if grouped else 'normalised'}",
            *block,
            _arguments(grouped, scale, named),
            router,
            layout,
            _settings(grouped, router),
            experts=experts,
            **{"std": 0.16} | more,
        )

    return case(False), case(True)


LIKE_V3 = (
    *_modes(("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"), ROUTED),
    *_modes(("deepseek_v32", "DeepseekV32MoE", "DeepseekV32Config"), ROUTED),
    *_modes(("glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig"), ROUTED, "glm4_5"),
    *_modes(("glm4_moe_lite", "Glm4MoeLiteMoE", "Glm4MoeLiteConfig"), ROUTED, "glm4_5"),
    *_modes(("glm4v_moe", "Glm4vMoeTextMoE", "Glm4vMoeTextConfig"), ROUTED, "glm4_5"),
    *_modes(("glm_moe_dsa", "GlmMoeDsaMoE", "GlmMoeDsaConfig"), ROUTED, "glm4_5"),
    *_modes(("dots1", "Dots1MoE", "Dots1Config"), ROUTED, "dots1"),
    *_modes(("solar_open", "SolarOpenMoE", "SolarOpenConfig"), ROUTED),
    *_modes(("hy_v4", "HYV4MoE", "HYV4Config"), ROUTED),
    *_modes(("kimi_linear", "KimiLinearMoE", "KimiLinearConfig"), LOCAL, "kimi_k2", 2.827),
    *_modes(("bailing_hybrid", "BailingHybridMoE", "BailingHybridConfig"), LOCAL),
    *_modes(("exaone_moe", "ExaoneMoeSparseMoEBlock", "ExaoneMoeConfig"), {"num_experts": 16, "num_shared_experts": 1}),
    *_modes(
        ("dots3_note", "Dots3NoteTextMoE", "Dots3NoteTextConfig"),
        ROUTED | {"shared_experts_intermediate_size": WIDTH},
        "dots1",
    ),
)

AS_PUBLISHED = tuple(
    Case(
        name,
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        _arguments(groups, scale, ROUTED) | {"norm_topk_prob": True, "routed_scaling_factor": scale},
        router,
        V3,
        {"top_k": 4},
        experts=SHARING,
        std=0.16,
    )
    for name, router, scale, groups in (
        ("deepseek_v3", "deepseek_v3", 2.5, True),
        ("moonlight", "moonlight", 2.446, False),
        ("kimi_k2", "kimi_k2", 2.827, False),
    )
)

ALONE, SIXTEEN = Layout(stacked, bias=BIAS), {"num_experts": 16}
WITHOUT_SHARED = (
    *_modes(("beam", "BeamMoE", "BeamConfig"), {"num_experts": 16}, layout=ALONE, experts=SIXTEEN),
    *_modes(
        ("mimo_v2_flash", "MiMoV2FlashMoE", "MiMoV2FlashConfig"),
        {"n_routed_experts": 16},
        layout=ALONE,
        experts=SIXTEEN,
    ),
)

OWN_EXPERTS = (
    *_modes(
        ("nemotron_h", "NemotronHMoE", "NemotronHConfig"),
        ROUTED | {"moe_shared_expert_intermediate_size": WIDTH},
        "nemotron_h",
        layout=Layout(ungated, shared_ungated("shared_experts"), bias=BIAS),
        experts=SHARING | {"activation": "relu2"},
        std=0.12,
    ),
    *_modes(
        ("glm5_next", "Glm5NextTextMoE", "Glm5NextTextConfig"),
        ROUTED | {"swiglu_limit": LIMIT},
        "glm4_5",
        experts=SHARING | {"activation_limit": LIMIT},
    ),
)


def _normalised(out_TD: Tensor, theirs: Mapping[str, Tensor]) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019), eps 1e-6."""
    return out_TD * (out_TD.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * theirs["post_mlp_layernorm.weight"]


AXK = (
    *_modes(
        ("axk1", "AXK1MoE", "AXK1Config"),
        ROUTED,
        finish=_normalised,
        around="normalises the block's output (RMSNorm)",
    ),
    _modes(("axk2", "AXK2MoE", "AXK2Config"), ROUTED | {"n_group": None, "topk_group": None})[0],
)

SIGMOID = LIKE_V3 + AS_PUBLISHED + WITHOUT_SHARED + OWN_EXPERTS + AXK
