"""The benchmarks of a step run what training runs, and the parts of what metrics cost add up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moetrain.bench.ours import OurStep
from moetrain.cli import main

SETTINGS = (
    "data=text model=nano model.context=16 model.num_layers=2 model.dim=32 model.num_heads=2 model.num_kv_heads=1"
    " model.head_dim=16 model.expert_dim=16 experts=e8 engine=local train.global_batch=4 train.micro_batch=2"
    " machine.device=cpu monitor.progress=false data.tokenizer=byte data.domain_field=folder data.mask_documents=true"
)


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "a.txt").write_text(" ".join(f"{i} green bottles" for i in range(200)))
    return [*SETTINGS.split(), f"data.path={tmp_path}", f"data.cache={tmp_path / 'cache'}"]


def test_a_timed_step_trains_on_what_the_peer_gets_too_and_counts_as_a_run_does(settings, capfd, monkeypatch):
    steps, step = [], OurStep.step

    def watched(us: OurStep, number: int) -> None:
        before = [weight.detach().clone() for weight in us.model.parameters()]
        taken, take = [], us.model.take_load
        with monkeypatch.context() as patch:
            patch.setattr(us.model, "take_load", lambda: taken.append(take()) or taken[0])
            step(us, number)
        moved = [not torch.equal(old, new) for old, new in zip(before, us.model.parameters(), strict=True)]
        steps.append((all(moved), taken[0].domain_LDE is not None, us.loader.train(0, 0).document_BS is None))

    monkeypatch.setattr(OurStep, "step", watched)
    assert main(["bench", "step", "--alone", "--rounds", "1", *settings]) == 0
    assert "1 interleaved rounds" in capfd.readouterr().out
    assert steps == [(True, True, True)] * len(steps)
    assert steps


def test_no_rounds_are_refused(settings, capfd):
    for command in ("step", "layer"):
        assert main(["bench", command, "--rounds", "0", *settings]) == 2
        assert "--rounds" in capfd.readouterr().err


def test_every_call_is_measured_and_the_parts_add_up(settings, capfd, monkeypatch):
    monkeypatch.setattr("moetrain.bench.metrics.STEPS", 9)
    assert main(["bench", "metrics", *settings]) == 0
    found = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+) ms", capfd.readouterr().out, re.MULTILINE))
    numbers = {name: float(value) for name, value in found.items()}
    step, total = numbers.pop("a step"), numbers.pop("all of it")
    assert list(numbers) == ["load", "record", "commit", "take", "add", "reduce", "write"]
    assert min(numbers.values()) > 0
    assert abs(sum(numbers.values()) - total) < 0.01
    assert step > 0
