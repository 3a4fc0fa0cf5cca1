"""Our side of a training step's benchmarks: what a run trains, without what watches over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from moetrain.checks import ep_size_of, fitted
from moetrain.config import Config
from moetrain.data import Corpus, make_loader, prepare
from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.monitor.window import Window
from moetrain.ops.timeline import Timeline
from moetrain.optim import lr_at
from moetrain.parallel.mesh import Mesh, close_mesh, init_mesh
from moetrain.resume import choose_kernels
from moetrain.types import Batch


@contextmanager
def on_world(config: Config) -> Iterator[tuple[Config, Mesh, Corpus]]:
    """``config`` as it fits the world of the environment, that world, and the corpus."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    corpus = prepare(config.data, context=config.model.context, vocab_size=config.model.vocab_size)
    config = fitted(config, world_size)
    mesh = init_mesh(ep_size_of(config, world_size), config.machine)
    try:
        yield config, mesh, corpus
    finally:
        close_mesh()


class OurStep:
    """A model, its engine, its batches and its numbers, and what ``Trainer`` does with them in a step."""

    def __init__(self, config: Config, mesh: Mesh, corpus: Corpus, timeline: Timeline) -> None:
        self._config, self._timeline = config, timeline
        kernels = choose_kernels(config, mesh, None)
        self.vocab_size = config.model.vocab_size or corpus.vocab_size
        self.model = Decoder(config, mesh, self.vocab_size, timeline, kernels)
        self.model.count_domains(len(corpus.domains))
        self.loader, self.window = make_loader(config, corpus, mesh), Window(mesh)
        self._engine = make_engine(config, self.model, mesh, self.loader.accumulation)

    def step(self, number: int) -> None:
        """Optimiser step ``number`` of a run, from 0; its numbers are in ``window``."""
        outputs = []
        for micro in range(self.loader.accumulation):
            outputs.append(self._engine.forward_backward(self.load(number, micro)))
            self.model.commit_load()
        self._timeline.mark("update")
        self._engine.step(lr_at(number, self._config.train.steps, self._config.optim))
        self._timeline.mark("metrics")
        load, gauges = self.model.take_load(), self.model.take_gauges()
        for output in outputs:
            self.window.add(output)
        self.window.add_load(load, gauges)
        self._timeline.mark("rest")

    def load(self, number: int, micro: int) -> Batch:
        """Micro-batch ``micro`` of that step, of this rank."""
        self._timeline.mark("data")
        batch = self.loader.train(number, micro)
        self._timeline.mark("rest")
        return batch
