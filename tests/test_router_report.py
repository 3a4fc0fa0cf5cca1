"""What is said of a router before a run starts, and of one that breaks its contract when it does."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from moetrain import cli
from moetrain.checks import parse
from moetrain.compose import compose, compose_with_about
from moetrain.models.decoder import Decoder
from moetrain.moe.contract import break_of_contract
from moetrain.moe.replay import Replay
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from moetrain.plan import describe, make_plan, vocab_size_of
from moetrain.router_report import published_notes, router_report
from moetrain.types import ConfigError, RouterInput, Routing
from tests.tiny import ROUTER, ids, moe_layer, tiny

SMALL = ("recipe=quickstart", "model.context=64", "train.micro_batch=4", "train.global_batch=8", "dispatch=alltoall")


def said(*overrides: str) -> str:
    return router_report(compose_with_about([*SMALL, *overrides], 2, None), 2, None)


def test_the_router_is_told_with_the_defaults_it_takes() -> None:
    text = said("router=deepseek_v3")
    assert "TokenChoiceRouter: 2 of 8 experts a token, causal, noise none" in text
    assert "select=scores" in text
    assert "score=sigmoid" not in text.split("by default")[1].splitlines()[0].split(), "the option sets it"
    assert "sign bias, balance_coef 0.01 (micro_batch); z_coef 0.001" in text


def test_coefficients_are_told_in_our_units() -> None:
    assert "balance_coef 0.04 (micro_batch)" in said("router=mixtral", "balance=mixtral")


def test_zero_experts_and_noise_are_told() -> None:
    text = said("router=longcat", "router.noise=gumbel")
    assert "2 of 8 experts a token expected, ragged, 4 zero experts beside them, causal, noise gumbel" in text


@pytest.mark.parametrize(
    ("overrides", "training", "evaluation"),
    [
        ((), "80 an expert for 256 tokens (rank), fair share 64", "128 an expert for 256 tokens"),
        (("capacity=global",), "160 an expert for 512 tokens (global), fair share 128", "256 an expert for 512"),
        (("capacity=switch_rows",), "20 an expert for 64 tokens (sequence), fair share 16", "32 an expert for 64"),
        (("capacity.slots_train=7",), "7 an expert for 256 tokens", "128 an expert"),
        (("capacity=dropless",), "no limit, nothing is dropped", "no limit"),
    ],
)
def test_slots_are_those_of_this_micro_batch(overrides: tuple[str, ...], training: str, evaluation: str) -> None:
    text = said("router=mixtral", *overrides)
    assert f"in training: {training}" in text
    assert f"in evaluation: {evaluation}" in text


def test_who_sees_later_tokens_is_reminded_of_it() -> None:
    text = said("router=sinkhorn", "experts.allow_noncausal=true")
    assert "looks at later tokens in training," in text
    assert "reminder" in text
    assert "reminder" not in said("router=mixtral", "experts.allow_noncausal=true")


def notes(*overrides: str) -> str:
    return "\n".join(published_notes(compose_with_about([*SMALL, *overrides], 2, None), None))


def test_a_balance_that_is_not_the_published_one_is_told() -> None:
    text = notes("router=deepseek_v3")
    assert "published with balance=sequence; this run has balance_coef=0.01 z_coef=0.001 scope=micro_batch" in text
    assert notes("router=deepseek_v3", "balance=sequence") == ""
    assert "balance_coef=0.5" in notes("router=deepseek_v3", "balance=sequence", "balance.balance_coef=0.5")


@pytest.mark.parametrize(("router", "own"), [("noisy_topk", "own losses"), ("remoe", "adaptive L1")])
def test_a_balance_loss_on_top_of_the_routers_own_is_told(router: str, own: str) -> None:
    assert f"evened by {own} already; balance.balance_coef comes on top" in notes(f"router={router}")
    assert notes(f"router={router}", "balance=none") == ""


def test_what_a_router_says_of_itself_is_no_part_of_the_config() -> None:
    composed = compose_with_about(["router=mixtral"], 1, None)
    assert composed.about is not None
    assert composed.about.balance == "mixtral"
    assert composed.config == compose(["router=mixtral"], 1)
    assert parse(dataclasses.asdict(composed.config), 1) == composed.config


def test_check_prints_it_and_refuses_too_small_a_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *SMALL, "router=deepseek_v3"]) == 0
    out = capsys.readouterr().out
    assert "# router          TokenChoiceRouter" in out
    assert "# published       this router" in out
    assert cli.main(["check", *SMALL, "model.vocab_size=300"]) == 2
    assert "the tokenizer has 512 ids" in capsys.readouterr().err
    assert vocab_size_of(compose([*SMALL, "model.vocab_size=600"], 2)) == 600
    with pytest.raises(ConfigError, match="512 or more"):
        vocab_size_of(compose([*SMALL, "model.vocab_size=511"], 2))


@pytest.mark.parametrize(
    ("overrides", "active", "exchange"),
    [
        (("router=mixtral", "capacity=dropless"), "input embedding)\n", "(at an even load)"),
        (("router=mixtral",), "input embedding)\n", "(at an even load, if nothing is dropped)"),
        (("router=mixtral", "dispatch=padded"), "\n", "(at an even load, 1.25 times that with the empty slots)"),
        (("router=remoe",), "expected: at 2 experts a token\n", "(expected: at 2 experts a token, at an even load, if"),
    ],
)
def test_the_plan_says_what_its_numbers_suppose(overrides: tuple[str, ...], active: str, exchange: str) -> None:
    text = describe(make_plan(compose([*SMALL, *overrides], 2), 2))
    assert active in text
    assert exchange in text


def routing(**changes: torch.Tensor) -> Routing:
    even = {
        "logits_TE": torch.zeros(2, 4),
        "probs_TE": torch.full((2, 4), 0.25),
        "expert_TK": torch.tensor([[0, 3], [2, 1]]),
        "weight_TK": torch.ones(2, 2),
    }
    return Routing(**(even | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_TK": torch.tensor([[0, 4], [2, 1]])}, "ids from 0 to 4, but experts are 0 to 3"),
        ({"expert_TK": torch.tensor([[0, -1], [2, 1]])}, "ids from -1 to 2"),
        ({"expert_TK": torch.tensor([[0, 3], [2, 2]])}, "twice"),
        ({"expert_TK": torch.tensor([[0, 3], [2, 1]]).int()}, "not int64"),
        ({"weight_TK": torch.ones(2, 1)}, "weight_TK is (2, 1)"),
        ({"probs_TE": torch.ones(2, 3)}, "probs_TE is (2, 3), not (2, 4)"),
        ({"probs_TE": torch.full((2, 4), 0.2)}, "don't sum to 1, but are off by up to 0.2"),
    ],
)
def test_a_broken_contract_is_named(changes: dict[str, torch.Tensor], words: str) -> None:
    assert break_of_contract(routing(), 4) is None
    assert words in str(break_of_contract(routing(**changes), 4))


class OneTooFar(TokenChoiceRouter):
    """Its ids begin at 1."""

    def forward(self, given: RouterInput, replay: Replay) -> Routing:
        right = super().forward(given, replay)
        return dataclasses.replace(right, expert_TK=right.expert_TK + 1)


def test_a_router_of_ones_own_with_ids_out_of_range_is_named_with_its_layer() -> None:
    part = {**ROUTER, "_target_": "tests.test_router_report.OneTooFar"}
    layer = moe_layer(tiny(router=part, machine__allow_modules=["tests"]))
    x_TD = torch.randn(32, 16)
    with pytest.raises(ValueError, match=r"tests.test_router_report.OneTooFar, router of layer 0: .* 0 to 7"):
        layer(x_TD, ids(x_TD, 2), Replay())


def test_a_run_whose_loss_is_no_number_fails_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Decoder._project
    monkeypatch.setattr(Decoder, "_project", lambda model, x_XD: project(model, x_XD) * math.nan)
    overrides = [*SMALL, "model=nano", "model.num_layers=1", "model.context=32", "optim.warmup_steps=0"]
    overrides += ["train.steps=2", "train.eval_every=0", "train.checkpoint_every=0", "train.sample_tokens=0"]
    overrides += ["engine=local", "machine.device=cpu", "monitor.progress=false", "run.id=it", f"run.root={tmp_path}"]
    assert cli.main(["train", *overrides]) == 1
    told = capsys.readouterr()
    assert "THE RUN HAS FAILED: its last validation loss is nan" in told.err
    assert "the run has failed" in told.out
    assert "THE RUN HAS FAILED" in (tmp_path / "it" / "events.jsonl").read_text()
