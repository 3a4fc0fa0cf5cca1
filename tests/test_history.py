"""expert_load.jsonl, events.jsonl and a whole run folder: written, killed, resumed, torn, damaged, and read back."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetrain.monitor.events import EventsFile, read_events
from moetrain.monitor.expert_load import (
    NUM_RECORDS,
    ExpertLoadFile,
    ExpertLoadReader,
    LoadWindow,
    SplitCounts,
    is_load_step,
)
from moetrain.monitor.history import read_history
from moetrain.monitor.jsonl import MetricsFile, MetricsReader
from moetrain.monitor.recorder import CorpusFacts, Recorder
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.window import WindowMeans
from moetrain.types import ConfigError, LoadCounts
from tests.synthetic_runs import SCENARIOS, Shape, load_window, write_run
from tests.tiny import alone, tiny

BIG = 2**62


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, "collapsing", Shape(steps=100))


def windows(path) -> tuple[LoadWindow, ...]:
    reader = ExpertLoadReader(path)
    reader.poll()
    return reader.windows()


def some_window(step: int, **changes) -> LoadWindow:
    counts_LE = np.arange(8, dtype=np.int64).reshape(2, 4)
    window = LoadWindow(step, 10 * step, 5, (0, 2), 2, counts_LE + BIG, counts_LE)
    return replace(window, **changes)


def same(one: object, other: object) -> bool:
    if isinstance(one, SplitCounts) and isinstance(other, SplitCounts):
        return same(one.assigned_LX, other.assigned_LX) and same(one.kept_LX, other.kept_LX)
    return bool(np.array_equal(one, other))


@pytest.mark.parametrize("full", [True, False])
def test_a_window_comes_back_as_it_was_to_the_last_count(tmp_path, full):
    table = np.array([[1, 2, 3], [4, 5, BIG]])
    more = {"received_LW": table, "choice": SplitCounts(table, table - 1), "position": SplitCounts(table, table)}
    window = some_window(5, **(more if full else {}))
    file = ExpertLoadFile(tmp_path / "load", 0, 0)
    file.write(window)
    file.close()
    (back,) = windows(tmp_path / "load")
    for field in fields(LoadWindow):
        assert same(getattr(back, field.name), getattr(window, field.name)), field.name
    assert back.assigned_LE.dtype == np.int64


def test_a_resume_goes_back_over_later_windows_but_not_over_events(tmp_path):
    load, events = ExpertLoadFile(tmp_path / "load", 0, 0), EventsFile(tmp_path / "events", 0)
    for step in (10, 20, 30):
        load.write(some_window(step))
        events.write(step, "alert", f"at {step}", {"step": step})
    load.close()
    events.close()
    for path in (tmp_path / "load", tmp_path / "events"):
        with path.open("ab") as file:
            file.write(b'{"step": 40, "seg')
    load, events = ExpertLoadFile(tmp_path / "load", 20, 200), EventsFile(tmp_path / "events", 20)
    load.write(some_window(30, num_steps=7))
    events.write(20, "resume", "again", {})
    load.close()
    events.close()
    assert [(one.step, one.num_steps) for one in windows(tmp_path / "load")] == [(10, 5), (20, 5), (30, 7)]
    read = read_events(tmp_path / "events")
    assert [(one.step, one.kind, one.segment, one.undone) for one in read] == [
        (10, "alert", 1, False), (20, "alert", 1, False), (30, "alert", 1, True), (20, "resume", 2, False)
    ]  # fmt: skip
    assert read[0].data == {"step": 10}


def test_a_reader_follows_a_growing_file_whatever_pieces_it_comes_in(tmp_path):
    file = ExpertLoadFile(tmp_path / "whole", 0, 0)
    for step in (10, 20):
        file.write(some_window(step))
    file.close()
    ExpertLoadFile(tmp_path / "whole", 10, 100).close()
    content = (tmp_path / "whole").read_bytes()
    reader, seen = ExpertLoadReader(tmp_path / "growing"), []
    assert not reader.poll()
    for start in range(0, len(content), 97):
        with (tmp_path / "growing").open("ab") as growing:
            growing.write(content[start : start + 97])
        reader.poll()
        seen.append([one.step for one in reader.windows()])
    assert [10] in seen
    assert [10, 20] in seen
    assert seen[-1] == [10]


def test_metrics_are_followed_too(tmp_path):
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    assert not reader.poll()
    with MetricsFile(tmp_path / "metrics.jsonl", 0, 0) as metrics:
        metrics.write(10, 10, {"a": float("nan")})
        assert reader.poll()
        metrics.write(20, 20, {"a": 2.0})
        assert reader.poll()
        assert not reader.poll()
    assert [row["train/step"] for row in reader.rows()] == [10, 20]


@given(st.integers(1, 20_000), st.integers(1, 50))
def test_at_most_so_many_windows_evenly_spread_and_the_last(steps, log_every):
    chosen = [step for step in range(1, steps + 1) if is_load_step(step, steps, log_every)]
    assert chosen[-1] == steps
    assert len(chosen) <= NUM_RECORDS + 1
    rhythm = chosen if steps % log_every == 0 and steps // log_every <= NUM_RECORDS else chosen[:-1]
    assert all(step % log_every == 0 for step in rhythm)
    assert len(set(np.diff(rhythm))) <= 1
    assert len(chosen) >= min(steps // log_every, NUM_RECORDS // 2)


def test_a_run_folder_is_read_back(run):
    history = read_history(run)
    facts = history.facts
    assert (facts.id, facts.recipe, facts.world_size, facts.ep_size) == ("collapsing", "made-up", 4, 2)
    assert (facts.num_experts, facts.top_k, facts.steps, facts.starts) == (8, 2, 100, 1)
    assert facts.router.startswith("TokenChoiceRouter(")
    assert "top_k=2" in facts.router
    assert history.is_over
    assert [window.step for window in history.loads] == list(range(10, 101, 10))
    loss = history.series["train/lm_loss"]
    assert loss.steps_N.tolist() == list(range(10, 101, 10))
    assert history.series["validation/lm_loss"].steps_N.tolist() == [50, 100]
    assert np.isnan(history.series["train/grad_norm"].values_N[2])
    assert history.events[-1].kind == "alert"


def test_a_run_that_is_cut_off_anywhere_is_read_up_to_there(run):
    """A torn last line of every file, at any byte; no byte more or less than the whole lines counts."""
    names = ("metrics.jsonl", "expert_load.jsonl", "events.jsonl")
    whole = {name: (run / name).read_bytes() for name in names}
    for share in np.linspace(0.05, 0.999, 12):
        for name, content in whole.items():
            (run / name).write_bytes(content[: int(len(content) * share)])
        history = read_history(run)
        lines = whole["expert_load.jsonl"][: int(len(whole["expert_load.jsonl"]) * share)].count(b"\n")
        assert len(history.loads) == max(lines - 1, 0)
        assert not history.is_over or share > 0.9
    for name in names:
        (run / name).unlink()
    assert read_history(run).last_step == 0


def broken(**changes) -> str:
    row = {"step": 10, "segment": 1, "tokens": 1, "num_steps": 1, "layers": [0], "ep_size": 1}
    row |= {"assigned": [[1, 2]], "kept": [[1, 2]], **changes}
    return json.dumps({name: value for name, value in row.items() if value != "none"})


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("metrics.jsonl", "{oops}", "not a JSON object"),
        ("metrics.jsonl", '{"train/step": 10}', "no whole numbers train/step and run/segment"),
        ("metrics.jsonl", '{"train/step": 10, "run/segment": 1, "a": "b"}', "a is no number"),
        ("metrics.jsonl", '{"train/step": 10, "run/segment": 1, "a": null}', "a is no number"),
        ("expert_load.jsonl", broken(kept="none"), "kept is missing"),
        ("expert_load.jsonl", broken(kept=[[1]]), "kept has 1 columns, not 2"),
        ("expert_load.jsonl", broken(assigned=[[1, 2], [3]]), ""),
        ("expert_load.jsonl", broken(assigned=[[1.5, 2]]), "assigned is no table of 1 rows of counts"),
        ("expert_load.jsonl", broken(assigned=[[-1, 2]]), "assigned is no table"),
        ("expert_load.jsonl", broken(layers=[0, 1]), "assigned is no table of 2 rows"),
        ("expert_load.jsonl", broken(ep_size=4), "2 experts on 4 expert-parallel ranks"),
        ("expert_load.jsonl", broken(choice={"assigned": [[1]]}), "kept is missing"),
        ("expert_load.jsonl", broken(position=3), ""),
        ("events.jsonl", '{"step": 10, "segment": 1, "kind": "x"}', "an event has a kind"),
    ],
)
def test_any_other_damage_is_one_error_that_names_file_and_line(run, name, text, what):
    lines = (run / name).read_text().splitlines()
    (run / name).write_text("\n".join([*lines[:2], text, *lines[2:]]) + "\n")
    with pytest.raises(ConfigError) as caught:
        read_history(run)
    (problem,) = caught.value.problems
    assert f"{name}, line 3: " in problem.reason
    assert what in problem.reason


@pytest.mark.parametrize("text", [None, "{", "{}", '{"config": {}, "starts": []}', '{"config": {}, "starts": [{}]}'])
def test_a_folder_without_a_sound_run_json_is_refused(run, text):
    if text is None:
        shutil.rmtree(run)
    else:
        (run / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_history(run)


@pytest.mark.parametrize("name", SCENARIOS)
def test_made_up_counts_agree_with_each_other(name):
    shape = Shape(num_layers=3, num_experts=16, world_size=8, ep_size=4)
    for step in (10, 200, 400):
        window = load_window(SCENARIOS[name], shape, step, np.random.default_rng(0))
        assigned_L, kept_L = window.assigned_LE.sum(axis=1), window.kept_LE.sum(axis=1)
        assert (window.kept_LE <= window.assigned_LE).all()
        for split in (window.choice, window.position):
            assert split.assigned_LX.sum(axis=1).tolist() == assigned_L.tolist()
            assert split.kept_LX.sum(axis=1).tolist() == kept_L.tolist()
            assert (split.kept_LX >= 0).all()
        assert window.received_LW.sum(axis=1).tolist() == kept_L.tolist()


def test_the_recorder_writes_counts_skips_and_resumes(tmp_path):
    config = tiny(train__steps=6, monitor__progress=False, monitor__log_every=2)
    assigned_LE = torch.arange(16).reshape(2, 8)
    means = WindowMeans(1.0, 1.0, {"balance": 1.0, "z": 0.5}, LoadCounts(assigned_LE, assigned_LE // 2), num_steps=2)
    folder = RunFolder(tmp_path)
    for start in (0, 2):
        recorder = Recorder(config, alone(), CorpusFacts(64, 4.0, 3.0, 4.0), folder, start)
        for done in range(start + 1, start + 5):
            recorder.tick(done, 0.1)
            if done == 1:
                recorder.skipped(done, "step 1 was skipped")
            if done % 2 == 0:
                recorder.window(done, means, {}, [{}] * 2, {})
        recorder.close(None, (), None)
    read = windows(folder.expert_load)
    assert [(one.step, one.num_steps, one.layers, one.ep_size) for one in read] == [
        (2, 2, (0, 1), 1), (4, 2, (0, 1), 1), (6, 2, (0, 1), 1)
    ]  # fmt: skip
    assert read[0].tokens == 2 * config.train.global_batch * config.model.context
    assert read[0].assigned_LE.tolist() == assigned_LE.tolist()
    assert read[0].kept_LE.tolist() == (assigned_LE // 2).tolist()
    assert [(one.step, one.kind) for one in read_events(folder.events)] == [(1, "skipped"), (2, "resume")]
