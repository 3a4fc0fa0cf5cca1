"""What of a window goes into expert_load.jsonl, and whether it is time for it."""

from __future__ import annotations

from moetrain.config import Config
from moetrain.monitor.domains import DomainCounts, is_domain_step
from moetrain.monitor.expert_load import LoadWindow, SplitCounts, is_load_step
from moetrain.monitor.window import WindowMeans
from moetrain.types import LoadCounts


class LoadWindows:
    """Of one run. layers: the decoder layer of each row of counts. domains: names of those told apart."""

    def __init__(self, config: Config, ep_size: int, layers: tuple[int, ...], domains: tuple[str, ...]) -> None:
        self._steps, self._log_every = config.train.steps, config.monitor.log_every
        self._tokens_per_step = config.train.global_batch * config.model.context
        self._ep_size, self._layers, self._names = ep_size, layers, domains

    def of(self, done: int, num_steps: int, means: WindowMeans) -> LoadWindow | None:
        """The window of the ``num_steps`` steps that end with ``done``; None if it is not to be recorded."""
        load, gauges = means.load, means.gauges
        if load is None or not is_load_step(done, self._steps, self._log_every):
            return None
        return LoadWindow(
            step=done,
            tokens=done * self._tokens_per_step,
            num_steps=num_steps,
            layers=self._layers,
            ep_size=self._ep_size,
            assigned_LE=load.assigned_LE.numpy(),
            kept_LE=load.kept_LE.numpy(),
            received_LW=None if gauges is None else gauges.received_LW,
            choice=None if gauges is None else SplitCounts(*gauges.choice_2LK),
            position=None if gauges is None else SplitCounts(*gauges.position_2LP),
            domains=self._domains(done, load),
        )

    def _domains(self, done: int, load: LoadCounts) -> DomainCounts | None:
        counts = load.domain_LDE
        if counts is None or not is_domain_step(done, self._steps, self._log_every, counts.numel()):
            return None
        return DomainCounts(self._names, counts.numpy())
