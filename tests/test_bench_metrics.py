"""The benchmark of data loading and metrics runs what training runs, and its parts add up."""

from __future__ import annotations

import re

from moetrain.cli import main


def test_every_call_is_measured_and_the_parts_add_up(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("moetrain.bench.metrics.STEPS", 9)
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "a.txt").write_text(" ".join(f"{i} green bottles" for i in range(200)))
    settings = (
        "model=nano model.context=16 model.num_layers=2 model.dim=32 model.num_heads=2 model.num_kv_heads=1"
        " model.head_dim=16 model.expert_dim=16 experts=e8 engine=local train.global_batch=4 train.micro_batch=2"
        " machine.device=cpu monitor.progress=false data.tokenizer=byte data.domain_field=folder"
    )
    folders = [f"data.path={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    assert main(["bench", "metrics", "data=text", *settings.split(), *folders]) == 0
    found = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+) ms", capfd.readouterr().out, re.MULTILINE))
    numbers = {name: float(value) for name, value in found.items()}
    step, total = numbers.pop("a step"), numbers.pop("all of it")
    assert list(numbers) == ["load", "record", "commit", "take", "add", "reduce", "write"]
    assert min(numbers.values()) > 0
    assert abs(sum(numbers.values()) - total) < 0.01
    assert total < step
