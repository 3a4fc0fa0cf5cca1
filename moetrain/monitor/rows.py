"""One window as one row of numbers, by the names under which metrics.jsonl and wandb know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moetrain.config import Config
from moetrain.models.block import is_moe_layer
from moetrain.models.counts import size_report
from moetrain.monitor.balance import Balance, flatten, summarise
from moetrain.monitor.domains import domain_numbers
from moetrain.monitor.running import Running
from moetrain.monitor.vitals import router_state, vitals
from moetrain.monitor.window import WindowMeans
from moetrain.parallel.mesh import Mesh, weight_dtype


@dataclass(frozen=True)
class Timing:
    """The window's steps, skipped ones too, and seconds, and the seconds of each phase."""

    steps: int
    seconds: float
    phases: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """numbers: everything that is logged. balance: None of a dense model."""

    numbers: dict[str, float]
    balance: Balance | None
    tokens_per_second: float


class Rows:
    """Keeps what must be known from window to window: the load of the last ones."""

    def __init__(self, config: Config, mesh: Mesh, vocab_size: int) -> None:
        self._config, self._mesh = config, mesh
        self.layers = tuple(i for i in range(config.model.num_layers) if is_moe_layer(config.model, i))
        self.tokens_per_step = config.train.global_batch * config.model.context
        self._flops_per_token = size_report(config, vocab_size).flops_per_token
        self._row_bytes = config.model.dim * weight_dtype(config.engine, mesh.device).itemsize
        self._running = Running(self.layers)

    def of(
        self,
        means: WindowMeans,
        numbers: Mapping[str, float],
        states: Sequence[Mapping[str, float]],
        timing: Timing,
    ) -> Row:
        """``numbers``: what the trainer says itself. ``states``: what each MoE layer's router keeps."""
        tokens_per_second = timing.steps * self.tokens_per_step / timing.seconds
        row = {"train/loss": means.loss, "train/lm_loss": means.lm, **losses("train", means), **numbers}
        row |= {"perf/tokens_per_second": tokens_per_second, "perf/step_seconds": timing.seconds / timing.steps}
        row |= {f"time/{name}_seconds": seconds / timing.steps for name, seconds in timing.phases.items()}
        if (mfu := self.mfu(tokens_per_second)) is not None:
            row["perf/mfu"] = mfu
        balance = None
        if means.load is not None and means.gauges is not None:
            balance = summarise(means.load, self._mesh.ep_size, self.layers)
            assigned_LE = means.load.assigned_LE.numpy()
            row |= flatten(balance) | self._running.add(assigned_LE) | router_state(states, self.layers)
            row |= vitals(means.gauges, self.layers, self._row_bytes)
            if means.load.domain_LDE is not None:
                row |= domain_numbers(means.load.domain_LDE.numpy(), self.layers)
            tokens = means.num_steps * self.tokens_per_step
            row["balance/experts_per_token"] = float(assigned_LE.sum()) / (tokens * len(self.layers))
        return Row(row, balance, tokens_per_second)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs over the machine's peak; None where the peak is not told."""
        peak = self._config.machine.peak_tflops
        if peak is None:
            return None
        return self._flops_per_token * tokens_per_second / (peak * 1e12 * self._mesh.world_size)


def losses(phase: str, means: WindowMeans) -> dict[str, float]:
    """Router losses. Those beside balance and z are zero, and not told, in a run that does not use them."""
    return {f"{phase}/{name}_loss": v for name, v in means.terms.items() if v != 0.0 or name in ("balance", "z")}
