"""Who is evicted by whom: which orders of service are causal, which routers never drop; what ``check`` says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moetrain.compose import compose
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.plan import describe, make_plan
from moetrain.types import ConfigError
from tests.catalog import tiny_with
from tests.tiny import ids, moe_layer, tiny

TOKENS, EARLY = 24, 14
PEEKS = "can peek"
RAGGED = "the router takes as many as it likes"


def noticed(layer: MoELayer, seeds: int = 12) -> bool:
    """Whether the output of an early token changes when later tokens do, under any seed."""
    found = False
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x_TD, other_TD = torch.randn(2, TOKENS, 16, generator=generator)
        other_TD[:EARLY] = x_TD[:EARLY]
        with torch.no_grad():
            first, second = (layer(x, ids(x), Replay()).hidden_TD[:EARLY] for x in (x_TD, other_TD))
        found |= not torch.allclose(first, second, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("factor", "priority", "causal"),
    [
        (None, "choice_major", True),
        (0.75, "token_major", True),
        (0.75, "choice_major", False),
        (0.75, "probs", False),
        (0.75, "batch_prioritised", False),
    ],
)
def test_only_token_order_and_no_limit_at_all_are_causal(
    factor: float | None, priority: str, causal: bool, training: bool
) -> None:
    settings: dict[str, Any] = {"factor_train": factor, "factor_eval": factor, "priority": priority, "minimum": 1}
    config = tiny(dispatch="local", **{f"capacity__{key}": value for key, value in settings.items()})
    assert noticed(moe_layer(config).train(training)) != causal


def test_with_one_choice_all_first_choices_are_token_order() -> None:
    layer = moe_layer(tiny_with("switch", dispatch="local", capacity__factor_eval=0.75, capacity__minimum=1)).eval()
    assert not noticed(layer)


@pytest.mark.parametrize(
    ("words", "peeks"),
    [
        ([], True),
        (["capacity=probs"], True),
        (["capacity=random"], True),
        (["capacity=token_major"], False),
        (["capacity=dropless", "dispatch=alltoall"], False),
        (["capacity.factor_eval=null", "dispatch=alltoall"], False),
        (["router=switch"], False),
        (["router=switch", "capacity=random"], False),
        (["router=switch", "capacity=batch_prioritised"], True),
        (["router=longcat"], True),
    ],
)
def test_check_says_when_validation_losses_can_peek(words: list[str], peeks: bool) -> None:
    config = compose(["recipe=router_comparison", *words])
    assert (PEEKS in describe(make_plan(config, 1))) == peeks


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["router=remoe"], True),
        (["router=top_p"], True),
        (["router=remoe", "capacity.slots_train=8"], True),
        (["router=remoe", "capacity=dropless"], False),
        (["router=mixtral"], False),
        (["router=expert_choice", "experts.allow_noncausal=true"], False),
    ],
)
def test_check_says_when_a_router_without_a_fixed_k_is_limited(words: list[str], warned: bool) -> None:
    config = compose(["recipe=router_comparison", *words])
    assert (RAGGED in describe(make_plan(config, 1))) == warned


def test_what_it_warns_of_at_the_start_of_remoe() -> None:
    """About half of all experts a token, of which the limit for two keeps a part; dropless keeps all."""
    kept = {}
    for factor in (1.25, None):
        layer = moe_layer(tiny_with("remoe", dispatch="local", capacity__factor_train=factor))
        x_TD = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        layer(x_TD, ids(x_TD), Replay())
        layer.commit()
        assigned, left = layer.load.take().sum(1).tolist()
        kept[factor] = left / assigned
    assert kept[None] == 1.0
    assert kept[1.25] < 0.75


@pytest.mark.parametrize(
    ("tokens", "scope", "drops"), [(64, "rank", False), (64, "sequence", True), (68, "rank", True)]
)
def test_an_even_router_drops_none_of_whole_micro_batches(tokens: int, scope: str, drops: bool) -> None:
    """As RouterTraits.even says: not where E does not divide the tokens, nor under slots for each sequence."""
    settings: dict[str, Any] = {"factor_train": 1.0, "minimum": 1, "scope": scope}
    changes = {f"capacity__{key}": value for key, value in settings.items()}
    layer = moe_layer(tiny_with("base_layers", dispatch="local", **changes))
    x_TD = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))
    x_TD[: tokens // 2] += 2.0
    layer(x_TD, ids(x_TD, 4), Replay())
    layer.commit()
    assigned, kept = layer.load.take().sum(1).tolist()
    assert (kept < assigned) == drops


def test_experts_that_choose_within_sequences_and_depths_do_not_go_together() -> None:
    words = ["recipe=router_comparison", "router=expert_choice", "experts.allow_noncausal=true", "model.depth_every=2"]
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert [problem.field for problem in caught.value.problems] == ["router.over"]
    compose([*words, "router.over=micro_batch"])
