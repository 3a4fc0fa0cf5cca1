"""Each rule at its edges, on made-up windows; what is said while a run trains, and of a run afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from moetrain.cli import main
from moetrain.monitor.balance import summarise
from moetrain.monitor.doctor import NAMES, RULES, diagnose
from moetrain.monitor.events import read_events
from moetrain.monitor.history import read_history
from moetrain.monitor.jsonl import STEP, read_metrics
from moetrain.monitor.recorder import CorpusFacts, Recorder
from moetrain.monitor.rounds import Rounds, examine, findings, spoken
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.signs import Facts, facts_of, signs_of
from moetrain.monitor.window import WindowMeans
from moetrain.types import LoadCounts
from tests.synthetic_runs import Shape, write_run
from tests.test_gauges import gauges_with
from tests.tiny import ROUTER, alone, tiny

FACTS = Facts(8, 2.0, 0.01, "raise it", has_bias=False, dropless=True, ep_size=2, warmup_steps=20)
HEALTHY = {
    "effective_experts": 7.5,
    "dead_running": 0.0,
    "load_max": 1.4,
    "max_vio_running": 0.4,
    "churn": 0.05,
    "churn_two": 0.06,
    "swing": 0.1,
    "drop_fraction": 0.02,
    "late_drop": 0.01,
    "router_entropy": 0.95,
    "logit_max": 3.0,
    "rank_load_max": 1.1,
}


def windows(
    changes: Mapping[str, float], layer: int | None = None, num: int = 30, every: int = 10, growth: float = 1.0
) -> list[dict[str, float]]:
    """Of three layers; changes are of one of them or of all, and grow by a factor from window to window."""
    rows = []
    for index in range(num):
        now = {name: value * growth**index for name, value in changes.items()}
        row = {f"balance/{name}": value for name, value in {**HEALTHY, **now}.items()}
        for number in range(3):
            mine = {**HEALTHY, **now} if layer in (None, number) else HEALTHY
            row |= {f"moe/layer_{number:02d}/{name}": value for name, value in mine.items()}
        rows.append({STEP: float(every * (index + 1)), **row})
    return rows


def names(rows: list[dict[str, float]], facts: Facts = FACTS) -> set[tuple[str, int | None]]:
    return {(one.name, one.layer) for one in diagnose(signs_of(rows, NAMES, facts))}


def test_nothing_is_wrong_with_a_healthy_run() -> None:
    assert names(windows({})) == set()
    assert signs_of([], NAMES, FACTS).layers == ()
    assert diagnose(signs_of([], NAMES, FACTS)) == []


@pytest.mark.parametrize(
    ("name", "layer", "sick", "well"),
    [
        ("collapse", 1, {"effective_experts": 3.4}, {"effective_experts": 3.6}),
        ("dead experts", 1, {"dead_running": 1.0}, {"dead_running": 0.0}),
        ("oscillating load", 1, {"swing": 0.8}, {"swing": 0.6}),
        ("oscillating load", 1, {"churn": 0.3, "churn_two": 0.1}, {"churn": 0.3, "churn_two": 0.3}),
        ("capacity overflow", None, {"drop_fraction": 0.11}, {"drop_fraction": 0.09}),
        ("late positions dropped", None, {"late_drop": 0.16}, {"late_drop": 0.14}),
        ("first-layer hot spot", 0, {"load_max": 3.3}, {"load_max": 3.1}),
        ("router logits exploding", 1, {"logit_max": 51.0}, {"logit_max": 1.0}),
        ("rank hot spot", 1, {"rank_load_max": 1.3, "load_max": 1.5}, {"rank_load_max": 1.3, "load_max": 1.7}),
    ],
)
def test_a_rule_at_its_edge(name: str, layer: int | None, sick: dict[str, float], well: dict[str, float]) -> None:
    growth = 1.1 if name == "router logits exploding" else 1.0
    assert names(windows(sick, layer, growth=growth)) == {(name, layer)}
    assert names(windows(well, layer)) == set()


def test_too_weak_is_uneven_in_another_layer_than_the_first_and_not_getting_better() -> None:
    uneven = {"load_max": 3.3, "effective_experts": 5.0}
    assert names(windows(uneven, 1)) == names(windows(uneven)) == {("balance too weak", None)}
    assert names(windows({"load_max": 6.0}, 1, num=25, growth=0.975)) == set()
    assert names(windows({"load_max": 3.1}, 1)) == set()


def test_too_strong_is_measured_by_gradients_where_there_are_any_else_told_by_the_logits() -> None:
    flat = {"router_entropy": 0.99, "logit_max": 0.3, "max_vio_running": 0.1}
    assert names(windows(flat)) == {("balance too strong", None)}
    assert names(windows(flat | {"max_vio_running": 0.3})) == set()
    assert names(windows(flat | {"logit_max": 0.7})) == set()
    assert names(windows(flat | {"aux_gradient_ratio": 0.05})) == set()
    assert names(windows({"aux_gradient_ratio": 3.1})) == {("balance too strong", None)}


def test_a_collapse_counts_from_the_experts_that_k_choices_must_use() -> None:
    for top_k, ill, well in ((2.0, 2.4, 2.6), (1.0, 1.7, 1.8)):
        facts = Facts(4, top_k, 0.0, "", has_bias=False, dropless=True, ep_size=1, warmup_steps=0)
        assert len(names(windows({"effective_experts": ill}), facts)) == 3
        assert names(windows({"effective_experts": well}), facts) == set()


def test_a_layer_all_of_whose_experts_are_chosen_can_not_collapse() -> None:
    """exp(entropy) of an even load is less than E by rounding for half of all E."""
    for num_experts in range(1, 33):
        counts_LE = torch.full((1, num_experts), 1000)
        even = summarise(LoadCounts(counts_LE, counts_LE), 1, [0]).effective_experts_min
        facts = Facts(num_experts, num_experts, 0.0, "", has_bias=False, dropless=True, ep_size=1, warmup_steps=0)
        assert names(windows({"effective_experts": even}), facts) == set()


def test_the_dead_are_those_of_all_windows_though_a_start_knows_of_one_only() -> None:
    rows = windows({"dead_running": 1.0}, 1)
    rows[-1]["moe/layer_01/dead_running"] = 5.0
    (found,) = diagnose(signs_of(rows, NAMES, FACTS))
    assert found.evidence == "1 of 8 experts got no token in the last windows"


def test_dead_experts_of_a_collapsed_layer_are_not_told_beside_it_but_shall_be_revived() -> None:
    (found,) = diagnose(signs_of(windows({"effective_experts": 2.0, "dead_running": 6.0}, 2), NAMES, FACTS))
    assert (found.name, found.layer) == ("collapse", 2)
    assert found.remedy == "raise it, and revive the experts that no token reaches (control=revive)"
    (found,) = diagnose(signs_of(windows({"effective_experts": 2.0}, 2), NAMES, FACTS))
    assert found.remedy == "raise it"


def test_rising_is_not_collapsed_and_drops_that_lessen_are_excused_if_there_are_not_too_many() -> None:
    assert names(windows({"effective_experts": 2.0}, 1, num=12, growth=1.04)) == set()
    assert names(windows({"drop_fraction": 0.28}, num=21, growth=0.97)) == set()
    assert names(windows({"drop_fraction": 0.9}, num=21, growth=0.97)) == {("capacity overflow", None)}


def test_one_odd_window_says_nothing_nor_do_the_first_steps() -> None:
    rows = windows({"effective_experts": 2.0})
    rows[-2] = {**windows({})[-2], STEP: rows[-2][STEP]}
    assert names(rows) == set()
    first = [stop for stop in range(1, 31) if names(windows({"effective_experts": 2.0})[:stop])]
    assert first[0] == 13  # 20 steps of warm-up, 60 of grace, then five windows: steps 90 to 130
    long_warmup = Facts(8, 2.0, 0.01, "", False, True, 2, warmup_steps=2000)
    assert names(windows({"effective_experts": 2.0}), long_warmup)


def test_many_short_windows_must_all_agree() -> None:
    rows = windows({"late_drop": 0.2}, num=200, every=1)
    assert names(rows) == {("late positions dropped", None)}
    rows[-39] = windows({}, num=200, every=1)[-39]
    assert names(rows) == set()


def test_a_diagnosis_is_said_once_and_once_more_when_it_is_over() -> None:
    rounds, said = Rounds(FACTS), []
    rows = windows({"effective_experts": 2.0})
    well = windows({}, num=60)
    for row in [*rows, *well[30:40], *[{**row, STEP: row[STEP] + 100.0} for row in rows[30:]], *well[50:]]:
        said += [(row[STEP], line) for line in spoken(rounds.visit(int(row[STEP]), row))]
    assert [step for step, _ in said] == [130.0, 350.0]
    assert said[0][1].startswith("collapse in layers 0, 1, 2: 2.0 effective experts of 8")
    assert said[1][1] == "collapse in layers 0, 1, 2 is over"
    assert rounds.visit(700, {"validation/lm_loss": 1.0}) == []


def test_rounds_agree_with_the_whole_run_read_back() -> None:
    rows = windows({"churn": 0.3, "churn_two": 0.1}, 1, num=40, every=7)
    rounds = Rounds(FACTS)
    live = [int(row[STEP]) for row in rows for one in rounds.visit(int(row[STEP]), row) if not one.gone]
    (found,) = findings(signs_of(rows, NAMES, FACTS))
    assert live == [found.first_step]
    assert (found.last_step, found.at_end) == (280, True)


def test_facts_come_from_the_config() -> None:
    config = tiny(balance__balance_coef=0.02, balance__units="huggingface", capacity__factor_train=1.0)
    facts = facts_of(config, 4)
    assert (facts.num_experts, facts.experts_per_token, facts.ep_size) == (8, 2.0, 4)
    assert facts.balance_coef == pytest.approx(0.04)
    assert facts.more_balance == "raise balance.balance_coef (now 0.02)"
    assert not facts.dropless
    assert not facts.has_bias
    steered = facts_of(tiny(router={**ROUTER, "bias": "sign", "bias_rate": 0.01}), 1)
    assert (steered.more_balance, steered.has_bias) == ("raise router.bias_rate (now 0.01)", True)
    noisy = tiny(router={"_target_": "moetrain.moe.routers.noisy_topk.NoisyTopKRouter"})
    assert "router.importance_coef (now 0.1)" in facts_of(noisy, 1).more_balance
    assert "balance=default" in facts_of(tiny(balance__balance_coef=0.0), 1).more_balance
    followed = facts_of(tiny(balance__balance_coef=0.02, control__target_max_vio=0.5, control__aux_max=0.3), 1)
    assert followed.more_balance == "lower control.target_max_vio (now 0.5) or raise control.aux_max (now 0.3)"


def test_the_recorder_tells_it_as_an_event_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(train__steps=300, monitor__progress=False, model__first_dense=1)
    recorder = Recorder(config, alone(), CorpusFacts(64, 4.0, 3.0, 4.0), RunFolder(tmp_path), 0)
    counts_LE = torch.tensor([[500, 500, *[0] * 6]])
    gauges = gauges_with()
    for done in range(10, 201, 10):
        recorder.tick(done, 0.1)
        means = WindowMeans(1.0, 1.0, {"balance": 1.0, "z": 0.5}, LoadCounts(counts_LE, counts_LE), gauges, 1)
        recorder.window(done, means, {"train/skipped_steps": 0.0}, [{}], {})
    recorder.close(None, (), None)
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event.step, event.kind) == (110, "diagnosis")
    assert (event.data["name"], event.data["layer"], event.data["state"]) == ("collapse", 1, "appeared")
    assert capsys.readouterr().err.count("collapse in layer 1") == 1


def test_windows_that_a_run_went_back_over_are_in_no_running_number(tmp_path: Path) -> None:
    config = tiny(train__steps=300, monitor__progress=False, model__first_dense=1)
    recorder = Recorder(config, alone(), CorpusFacts(64, 4.0, 3.0, 4.0), RunFolder(tmp_path), 0)
    for done, counts in ((10, [500, 500, *[0] * 6]), (20, [125] * 8)):
        counts_LE = torch.tensor([counts])
        recorder.tick(done, 0.1)
        means = WindowMeans(1.0, 1.0, {"balance": 1.0, "z": 0.5}, LoadCounts(counts_LE, counts_LE), gauges_with(), 1)
        recorder.window(done, means, {}, [{}], {})
        if done == 10:
            recorder.go_back(0, "back to step 0")
    recorder.close(None, (), None)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row[STEP], row["balance/max_vio_running"], row["balance/churn"]) == (20, 0.0, 0.0)


def test_tokens_of_skipped_steps_have_no_experts(tmp_path: Path) -> None:
    """Two steps, one of them skipped: the 1,000 assignments are those of one step."""
    config = tiny(train__steps=300, monitor__progress=False, model__first_dense=1)
    recorder = Recorder(config, alone(), CorpusFacts(64, 4.0, 3.0, 4.0), RunFolder(tmp_path), 0)
    counts_LE = torch.tensor([[125] * 8])
    recorder.tick(9, 0.1)
    recorder.tick(10, 0.1)
    means = WindowMeans(1.0, 1.0, {}, LoadCounts(counts_LE, counts_LE), gauges_with(), num_steps=1)
    recorder.window(10, means, {}, [{}], {})
    recorder.close(None, (), None)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    tokens = config.train.global_batch * config.model.context
    assert row["balance/experts_per_token"] == pytest.approx(1000 / tokens)
    assert row["perf/tokens_per_second"] == pytest.approx(2 * tokens / 0.2)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("healthy", "collapsing"):
        write_run(tmp_path, name, Shape(num_experts=8))
    return tmp_path


def test_the_command_on_a_healthy_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(runs / "healthy"), "--strict"]) == 0
    assert capsys.readouterr().out == "healthy: step 400 of 400\nhealthy: nothing is wrong\n"


@pytest.mark.parametrize(
    ("done", "heard", "verdict"),
    [
        (0, 0, "no verdict"),
        (90, 0, "no verdict"),
        (120, 4, "healthy so far: nothing is wrong by 4 of 10 rules, the others"),
        (400, 10, "healthy: nothing is wrong"),
    ],
)
def test_no_verdict_on_a_run_too_short_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], done: int, heard: int, verdict: str
) -> None:
    run = write_run(tmp_path, "healthy", Shape(done=done))
    assert main(["doctor", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(verdict)
    main(["doctor", str(run), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["healthy"], told["rules_heard"], told["rules"]) == (True if heard else None, heard, len(RULES))


def test_the_command_on_a_collapsing_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs / "collapsing")
    assert main(["doctor", run]) == 0
    assert "collapse in layer 1, steps " in capsys.readouterr().out
    assert main(["doctor", run, "--json", "--strict"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["last_step"], told["healthy"]) == ("collapsing", 400, False)
    first = next(one for one in told["diagnoses"] if one["name"] == "collapse")
    assert (first["layer"], first["at_end"], first["last_step"]) == (1, True, 400)
    assert 100 < first["first_step"] < 400
    assert "effective experts of 8" in first["evidence"]
    assert "balance.balance_coef" in first["remedy"]


def test_a_run_of_another_version_is_refused_by_name(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = runs / "healthy" / "run.json"
    found = json.loads(record.read_text())
    found["config"]["model.unheard_of"] = 1
    record.write_text(json.dumps(found))
    assert main(["doctor", str(runs / "healthy")]) == 2
    assert "unheard_of" in capsys.readouterr().err


def test_sections_that_an_old_run_has_not_are_as_by_default(runs: Path) -> None:
    record = runs / "healthy" / "run.json"
    found = json.loads(record.read_text())
    found["config"] = {key: value for key, value in found["config"].items() if not key.startswith("control.")}
    record.write_text(json.dumps(found))
    assert examine(read_history(runs / "healthy")) == []
