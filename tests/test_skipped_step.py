"""A step whose gradient is not finite, in a run as a user starts it: nothing moves, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.cli import main
from moetrain.engine.local import LocalEngine
from moetrain.models.decoder import Decoder
from moetrain.monitor.jsonl import read_metrics
from moetrain.types import Batch, ModelOutput

SMALL = [
    *("recipe=quickstart", "model=nano", "model.context=32", "model.num_layers=2", "run.id=it", "machine.device=cpu"),
    *("engine=local", "dispatch=local", "router=deepseek_v3", "train.steps=3", "train.global_batch=4"),
    *("train.micro_batch=2", "train.eval_every=0", "train.eval_batches=1", "train.sample_tokens=0"),
    *("train.checkpoint_every=0", "monitor.progress=false", "monitor.log_every=1", "optim.warmup_steps=1"),
]


def test_a_gradient_that_is_not_a_number_moves_neither_weights_nor_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a step; the second of step 2 is the one that breaks."""
    monkeypatch.chdir(tmp_path)
    calls: list[int] = []
    states: list[dict[str, Tensor]] = []
    forward_backward, adapt_routers = LocalEngine.forward_backward, Decoder.adapt_routers

    def broken(self: LocalEngine, batch: Batch) -> ModelOutput:
        output = forward_backward(self, batch)
        calls.append(len(calls))
        if len(calls) == 4:
            gate = self.model.get_parameter("blocks.0.moe.router.gate")
            assert gate.grad is not None
            gate.grad[0, 0] = torch.nan
        return output

    def watched(self: Decoder, moved: bool) -> None:
        adapt_routers(self, moved)
        states.append({key: value.detach().clone() for key, value in self.state_dict().items()})

    monkeypatch.setattr(LocalEngine, "forward_backward", broken)
    monkeypatch.setattr(Decoder, "adapt_routers", watched)
    assert main(["train", *SMALL]) == 0
    first, second, third = states
    assert any(key.endswith("bias_E") and value.any() for key, value in first.items())
    for key, value in first.items():
        assert torch.equal(second[key], value), key
    for word in ("bias_E", "experts.down", "router.gate"):
        assert any(not torch.equal(third[key], second[key]) for key in third if key.endswith(word)), word
    rows = read_metrics(tmp_path / "outputs" / "it" / "metrics.jsonl")
    assert [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row] == [0, 1, 1]
