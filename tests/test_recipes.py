"""Every shipped recipe: composed, counted against what was published, and dry-run at its real world size."""

from __future__ import annotations

import pytest

from moetrain.checks import ep_size_of
from moetrain.compose import RECIPE, compose, options
from moetrain.models.counts import size_report
from moetrain.plan import describe, dry_run, main_report, make_plan, vocab_size_of

RECIPES = options(RECIPE)


def test_the_recipes_that_are_promised_are_there() -> None:
    promised = {"quickstart", "nano_moe", "olmoe_1b_7b", "mixtral_8x7b", "mixtral_8x22b", "qwen3_30b_a3b"}
    assert promised | {"granite_1b_a400m"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_counts_lie_within_one_percent_of_the_published(name: str) -> None:
    config = compose([f"recipe={name}"])
    report = size_report(config, vocab_size_of(config))
    for counted, published in (
        (report.total, config.recipe.published_total),
        (report.active, config.recipe.published_active),
    ):
        if published is not None:
            assert counted == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_at_the_real_world_size(name: str) -> None:
    """The last rank, so that a rank-dependent mistake shows; what it holds is what the plan says."""
    config = compose([f"recipe={name}"])
    plan = make_plan(config, config.recipe.world)
    dry = dry_run(config, config.recipe.world, config.recipe.world - 1)
    assert dry.parameters == plan.local_dense + plan.local_experts


def test_the_report_names_what_a_user_asks_for() -> None:
    config = compose(["recipe=olmoe_1b_7b"])
    text = main_report(config, config.recipe.world)
    for word in ("6.92 B total", "1.28 B active", "256 ranks: EP 8 x expert-DP 32", "dry run"):
        assert word in text


def test_plan_by_hand() -> None:
    """quickstart's shape at EP 2: the all-to-all moves each chosen token there and back, in forward and in backward."""
    config = compose(["recipe=quickstart", "engine.dtype=fp32", "engine.zero_stage=0"])
    plan = make_plan(config, 2)
    model = config.model
    tokens = config.train.global_batch // 2 * model.context
    assert ep_size_of(config, 2) == 2
    assert plan.exchange_bytes == 4 * model.num_layers * tokens * 2 * model.dim * 4 // 2
    assert plan.state_bytes == 16 * (plan.local_dense + plan.local_experts)
    assert plan.local_experts * 2 == plan.size.routed
    assert "EP 2" in describe(plan)


def test_plan_knows_what_travels() -> None:
    """Copies by expert, by rank, and by node and then by rank; rounded on the way or not. By hand, k = 8, EP 4."""
    by_expert, by_rank = 8 * 3 / 4, 3 * (1 - 0.75**8)
    by_node = 1 - 0.5**8 + 2 * (1 - 0.75**8)
    for words, rows, num_bytes in (
        (["dispatch=alltoall"], by_expert, 16),
        (["dispatch=dedup"], by_rank, 16),
        (["dispatch=dedup", "dispatch.payload=bf16"], by_rank, 8),
        (["dispatch=alltoall", "dispatch.payload=fp8"], by_expert, 7 + 4 / 128),
        (["dispatch=hierarchical", "dispatch.ranks_per_node=2"], by_node, 16),
        (["dispatch=hierarchical", "dispatch.ranks_per_node=4"], by_rank, 16),
    ):
        config = compose(
            [
                "recipe=quickstart",
                "engine.dtype=fp32",
                "router.top_k=8",
                "capacity=dropless",
                "train.micro_batch=8",
                *words,
            ],
            4,
        )
        tokens = config.train.global_batch // 4 * config.model.context * config.model.num_layers
        assert make_plan(config, 4).exchange_bytes == pytest.approx(tokens * config.model.dim * rows * num_bytes), words


def test_plan_says_that_it_knows_of_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of torchrun null means one rank a node, whose bytes are those of dedup."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    words = ["recipe=quickstart", "capacity=dropless", "train.micro_batch=8", "dispatch=hierarchical"]
    said = "with nodes of one rank, as dispatch=dedup sends: see dispatch.ranks_per_node"
    assert said in describe(make_plan(compose(words, 4), 4))
    assert said not in describe(make_plan(compose([*words, "dispatch.ranks_per_node=2"], 4), 4))


def test_plan_says_when_starting_needs_more_than_training() -> None:
    """Under ZeRO 3 a rank's share is small, but the model is built whole before it is shared out."""
    config = compose(["recipe=mixtral_8x22b"])
    plan = make_plan(config, config.recipe.world)
    whole = 4 * (plan.local_dense + plan.local_experts) / 2**30
    assert f"{whole:.2f} GiB while it starts" in describe(plan)
    assert "while it starts" not in describe(make_plan(compose(["recipe=quickstart"]), 2))
