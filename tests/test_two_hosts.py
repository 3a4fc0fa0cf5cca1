"""Two hosts with addresses of their own, made of network namespaces: the quick-start runs across them."""

from __future__ import annotations

import json
import subprocess

from moetrain.monitor.jsonl import read_metrics
from tests.hosts import NETNS, checkout, environment, need_namespaces

OVERRIDES = (
    "recipe=quickstart",
    "train.steps=4",
    "train.eval_every=0",
    "train.eval_batches=1",
    "train.checkpoint_every=4",
    "train.sample_tokens=0",
    "optim.warmup_steps=2",
    "monitor.log_every=2",
    "machine.device=cpu",
    "run.id=two-hosts",
)


def test_the_quick_start_runs_across_two_hosts(tmp_path):
    need_namespaces()
    checkout(tmp_path)
    command = [NETNS, "2", str(tmp_path / "launch" / "two_hosts.sh"), *OVERRIDES]
    done = subprocess.run(
        command,
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "outputs" / "two-hosts"
    (start,) = json.loads((folder / "run.json").read_text())["starts"]
    assert start["world_size"] == 2
    assert [row["train/step"] for row in read_metrics(folder / "metrics.jsonl")] == [2, 4]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank0.log", "rank1.log"]
    assert "[host 0]" in done.stdout
