"""The split of a step's time: which phase is charged, in forward, backward, recompute and without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetrain.ops import timeline as timeline_module
from moetrain.ops.timeline import Timeline

CPU = torch.device("cpu")


class Busy(torch.autograd.Function):
    """Takes a known time in forward and another in backward; saves its input, so that a checkpoint must recompute."""

    @staticmethod
    def forward(ctx: Any, x, now: list[float], forward_s: float, backward_s: float):
        ctx.save_for_backward(x)
        ctx.now, ctx.backward_s = now, backward_s
        now[0] += forward_s
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad):
        assert ctx.saved_tensors
        ctx.now[0] += ctx.backward_s
        return grad, None, None, None


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time that the host clock reads: only Busy and the tests move it on."""
    time_s = [100.0]
    monkeypatch.setattr(timeline_module, "perf_counter", lambda: time_s[0])
    return time_s


def layer(timeline: Timeline, now: list[float], x):
    """route 1 s / 2 s, experts 4 s / 8 s; ``gate`` is a side branch: ready early in backward, run last."""
    x = timeline.through(x, "rest", "route")
    gate = Busy.apply(x, now, 1.0, 2.0)
    rows = timeline.through(x, "route", "experts")
    rows = Busy.apply(rows, now, 4.0, 8.0)
    return timeline.through(rows * gate, "experts", "rest")


def busy(seconds: dict[str, float]) -> dict[str, float]:
    return {phase: value for phase, value in seconds.items() if value}


def test_forward_and_backward_are_charged_to_the_same_phases(now):
    timeline = Timeline(CPU)
    x = torch.ones(4, requires_grad=True)
    y = layer(timeline, now, x)
    assert busy(timeline.drain()) == {"route": 1.0, "experts": 4.0}
    y.sum().backward()
    now[0] += 16.0
    assert busy(timeline.drain()) == {"route": 2.0, "experts": 8.0, "rest": 16.0}
    torch.testing.assert_close(x.grad, torch.full((4,), 2.0))


@pytest.mark.parametrize("layers", [1, 3])
def test_recompute_is_charged_to_its_phases_and_leaves_the_right_one_current(now, layers):
    timeline = Timeline(CPU)
    y = torch.ones(4, requires_grad=True)
    for _ in range(layers):
        y = Busy.apply(y, now, 16.0, 32.0)
        y = checkpoint(layer, timeline, now, y, use_reentrant=False)
    timeline.drain()
    y.sum().backward()
    assert busy(timeline.drain()) == {
        "route": layers * (1.0 + 2.0),
        "experts": layers * (4.0 + 8.0),
        "rest": layers * 32.0,
    }


def test_without_gradients_forward_is_timed_and_no_node_is_made(now):
    timeline = Timeline(CPU)
    with torch.no_grad():
        y = layer(timeline, now, torch.ones(4, requires_grad=True))
    assert y.grad_fn is None
    assert busy(timeline.drain()) == {"route": 1.0, "experts": 4.0}
    tokens = torch.arange(3)
    assert timeline.through(tokens, "rest", "vocabulary") is tokens


def test_a_disabled_timeline_adds_nothing():
    timeline = Timeline(CPU, enabled=False)
    x = torch.ones(4, requires_grad=True)
    timeline.mark("route")
    assert timeline.through(x, "rest", "route") is x
    assert timeline.drain() == {}


def test_a_drain_begins_anew_in_the_same_phase(now):
    timeline = Timeline(CPU)
    timeline.mark("attention")
    now[0] += 1.0
    assert busy(timeline.drain()) == {"attention": 1.0}
    now[0] += 2.0
    assert busy(timeline.drain()) == {"attention": 2.0}


def test_a_mark_is_one_look_at_the_clock_each_way_and_copies_nothing(monkeypatch):
    timeline, looks = Timeline(CPU), []
    monkeypatch.setattr(timeline_module, "perf_counter", lambda: looks.append(None) or 0.0)
    x = torch.ones(4, requires_grad=True)
    y = timeline.through(x, "rest", "route")
    assert (len(looks), y.data_ptr()) == (1, x.data_ptr())
    y.backward(torch.ones(4))
    assert len(looks) == 2


def test_the_device_clock_reads_events_only_when_drained(monkeypatch):
    now_ms, synchronised = [0.0], []

    class FakeEvent:
        def __init__(self, device, enable_timing):
            assert device.type == "cuda"
            assert enable_timing
            self.ms = -1.0

        def record(self):
            self.ms = now_ms[0]

        def synchronize(self):
            synchronised.append(self.ms)

        def elapsed_time(self, end):
            return end.ms - self.ms

    monkeypatch.setattr(timeline_module.torch, "Event", FakeEvent)
    timeline = Timeline(torch.device("cuda", 0))
    for phase, at_ms in [("route", 5.0), ("experts", 7.0), ("route", 17.0)]:
        now_ms[0] = at_ms
        timeline.mark(phase)
    assert synchronised == []
    now_ms[0] = 18.0
    assert timeline.drain() == pytest.approx({"rest": 0.005, "route": 0.003, "experts": 0.010})
    assert synchronised == [18.0]
    now_ms[0] = 20.0
    assert timeline.drain() == pytest.approx({"route": 0.002})


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_the_device_clock_on_a_device():
    device = torch.accelerator.current_accelerator()
    timeline = Timeline(device)
    timeline.drain()
    x = torch.randn(2048, 2048, device=device, requires_grad=True)
    y = timeline.through(x, "rest", "experts")
    for _ in range(20):
        y = y @ x
    timeline.through(y, "experts", "rest").sum().backward()
    seconds = timeline.drain()
    assert seconds["experts"] > seconds["rest"] > 0
