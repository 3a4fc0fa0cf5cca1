"""The loop, on one screen. What it is made of is built in ``__init__``; what it says is said by its recorder."""

from __future__ import annotations

import logging
import math
import sys
from time import perf_counter

import torch

from moetrain import checkpoint
from moetrain.checkpoint import VALIDATION, Source
from moetrain.config import Config
from moetrain.control import Control
from moetrain.data import Corpus, make_loader
from moetrain.engine import make_engine
from moetrain.health import BadStep, Guard, Leave, Left, Replicas, Rollbacks, Unstable, Watchdog
from moetrain.models.decoder import Decoder
from moetrain.monitor.gradient_ratio import gradient_ratios
from moetrain.monitor.memory import measure_memory
from moetrain.monitor.recorder import CorpusFacts, Recorder
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.window import Window, WindowMeans
from moetrain.ops.timeline import Timeline
from moetrain.optim import lr_at
from moetrain.parallel.collectives import barrier
from moetrain.parallel.mesh import Mesh
from moetrain.resume import AS_SAVED, cannot_resume, choose_kernels, find_source, make_saver, restore_generators
from moetrain.sample import sample_text
from moetrain.types import Batch

log = logging.getLogger(__name__)
CONTROL, GUARD = "control", "guard"


class Trainer:
    """Trains one model on one corpus; every rank of the mesh has one, and all make the same calls."""

    def __init__(
        self, config: Config, mesh: Mesh, corpus: Corpus, folder: RunFolder, leave: Leave, watchdog: Watchdog
    ) -> None:
        self.config, self.mesh, self.corpus, self.folder = config, mesh, corpus, folder
        self.loader = make_loader(config, corpus, mesh)
        self.accumulation = self.loader.accumulation
        torch.manual_seed(config.run.seed + mesh.rank)
        self.timeline = Timeline(mesh.device, enabled=config.monitor.timing)
        found = find_source(config, folder, mesh, corpus.fingerprint)
        kernels = choose_kernels(config, mesh, found)
        self.vocab_size = config.model.vocab_size or corpus.vocab_size
        self.model = Decoder(config, mesh, self.vocab_size, self.timeline, kernels)
        self.model.count_domains(len(corpus.domains))
        self.engine = make_engine(config, self.model, mesh, self.accumulation)
        self.watchdog, self.replicas = watchdog, Replicas(config, self.engine, mesh)
        self.control = Control(config, self.model, self.engine, mesh)
        self.window, self.guard = Window(mesh), Guard(config.health, mesh, leave)
        self.rollbacks = Rollbacks(folder, mesh, config.health.max_rollbacks)
        self.saver = make_saver(config, mesh, folder, self.engine)
        self.skipped = self.told = 0
        self.left: Left | None = None
        self.validated: tuple[int, float] | None = None
        self.start = 0 if found is None else self._restore(found)
        facts = _facts(corpus, self.vocab_size)
        self.recorder = Recorder(config, mesh, facts, folder, self.start) if mesh.is_main else None
        if found is not None and self.recorder is not None:
            for damaged in found.passed_over:
                self.recorder.alarm(self.start, f"a newer checkpoint can not be used, {damaged}")

    def fit(self) -> bool:
        """Train from the step that was resumed to the last, then evaluate, save and report; or until a rank is asked to
        leave, then save and report (``left``). Returns whether the last validation loss is finite, on every rank.
        """
        self.timeline.drain()
        step = self.start
        while step < self.config.train.steps:
            began = perf_counter()
            norm = self._step(step)
            done = step + 1
            if self.recorder is not None:
                self.recorder.tick(done, perf_counter() - began)
            self._look(done, norm)
            self._keep(done)
            if self._leaves(done):
                self._leave(done, norm)
                break
            step = self._roll_back(done) if self.guard.goes_back else done
        self._close()
        return self.validated is None or math.isfinite(self.validated[1])

    def _is_last(self, done: int) -> bool:
        return done == self.config.train.steps

    def _step(self, step: int) -> float:
        """One optimiser step, or none if it is bad; returns the gradient norm before clipping."""
        outputs = []
        for micro in range(self.accumulation):
            self.watchdog.beat("step", step + 1)
            outputs.append(self.engine.forward_backward(self._batch(step, micro)))
            self.model.commit_load()
        self.guard.cast(torch.stack([output.loss for output in outputs]).mean())
        self.timeline.mark("update")
        norm = self.engine.step(lr_at(step, self.config.train.steps, self.config.optim), self.guard.accepts)
        bad = self.guard.ended(step + 1)
        self.model.adapt_routers(moved=bad is None)
        self.timeline.mark("metrics")
        load, gauges = self.model.take_load(), self.model.take_gauges()
        if bad is None:
            for output in outputs:
                self.window.add(output)
            self.window.add_load(load, gauges)
        else:
            self._skip(bad)
        return norm

    def _batch(self, step: int, micro: int) -> Batch:
        self.timeline.mark("data")
        batch = self.loader.train(0 if self.config.debug.overfit else self.rollbacks.batch_of(step), micro)
        self.timeline.mark("rest")
        return batch

    def _skip(self, bad: BadStep) -> None:
        self.skipped += 1
        message = f"step {bad.step} was skipped, {self._samples_of(bad.step)}: {bad.reason}"
        log.warning(message)
        if self.recorder is not None:
            self.recorder.skipped(bad.step, message)

    def _look(self, done: int, norm: float) -> None:
        """Log, steer and evaluate, where that is due."""
        if self._is_last(done) or _due(done, self.config.monitor.log_every):
            self._steer(done, self._record(done, norm))
        if (self._is_last(done) or _due(done, self.config.train.eval_every)) and not self.guard.leaves:
            self._evaluate(done)

    def _record(self, done: int, norm: float) -> WindowMeans:
        means = self.window.reduce()
        phases = self.timeline.drain()
        ratios = self._gradient_ratios(done)
        if self.recorder is not None:
            lr = lr_at(done - 1, self.config.train.steps, self.config.optim)
            numbers = {"train/grad_norm": norm, "train/lr": lr, "train/skipped_steps": float(self.skipped)}
            numbers |= self.control.numbers() | ratios
            self.recorder.window(done, means, numbers, self.model.router_numbers(), phases)
        return means

    def _steer(self, done: int, means: WindowMeans) -> None:
        for action in self.control.act(done, means):
            log.info("after step %d: %s", done, action.message)
            if self.recorder is not None:
                self.recorder.event(done, "control", action.message, action.data)
        self.timeline.drain()

    def _gradient_ratios(self, done: int) -> dict[str, float]:
        """Where they are due, of a micro-batch of the step just done."""
        if not _due(done, self.config.monitor.gradient_ratio_every):
            return {}
        ratios = gradient_ratios(self.model, self._batch(done - 1, 0))
        self.timeline.mark("rest")
        self.timeline.drain()
        return ratios

    def _evaluate(self, done: int) -> None:
        """Mean over ``eval_batches`` global batches of validation windows, the same at every world size; nothing if a
        rank is asked to leave meanwhile.
        """
        means = self._validation()
        self.timeline.drain()
        if means is None:
            return
        self.validated = (done, means.lm)
        if self.recorder is not None:
            self.recorder.validation(done, means)

    def _validation(self) -> WindowMeans | None:
        """Ranks vote once a global batch, since a vote makes the host wait for the device."""
        window = Window(self.mesh)
        for index in range(self.config.train.eval_batches * self.accumulation):
            self.watchdog.beat("evaluation")
            if index % self.accumulation == 0 and self.guard.hear():
                return None
            window.add(self.engine.evaluate(self.loader.validation(index)))
        return window.reduce()

    def _leaves(self, done: int) -> bool:
        """Whether all ranks leave after step ``done``: the last is left anyway, and what was bad is undone before."""
        return self.guard.leaves and not self._is_last(done) and not self.guard.goes_back

    def _leave(self, done: int, norm: float) -> None:
        """Step ``done`` is saved, if the disk was willing. A window that is cut short steers nothing."""
        if not _due(done, self.config.monitor.log_every):
            self._record(done, norm)
        self.left = self.guard.left(done)
        if self.recorder is not None:
            self.recorder.event(done, "leave", self.left.reason, {})

    def _keep(self, done: int) -> None:
        """Save where that is due, what replicas agree on. Raises Unstable if they do not."""
        every = self.config.train.checkpoint_every
        self.saver.poll()
        due = self.guard.saves or _due(done, every) or (self._is_last(done) and every > 0)
        if report := self.replicas.report(done, saves=due or self._leaves(done)):
            raise self._unstable(done, report)
        if due or self._leaves(done):
            self._save(done)
        if due:
            self.guard.hear()
        if self._is_last(done) or self._leaves(done):
            self.saver.finish()
        self._tell_failures(done)

    def _save(self, done: int) -> None:
        self.watchdog.beat("save")
        extra = {"gemm": self.model.kernels.gemm_name, "corpus": self.corpus.fingerprint, "vocab_size": self.vocab_size}
        extra |= {CONTROL: self.control.state(), GUARD: self.guard.state()}
        if self.validated is not None and self.validated[0] == done and math.isfinite(self.validated[1]):
            extra[VALIDATION] = self.validated[1]
        generators = checkpoint.generators(self.mesh.rank, self.mesh.device)
        self.saver.save(done, self.engine.state(), generators, extra)
        self.timeline.drain()

    def _tell_failures(self, done: int) -> None:
        """Training goes on without a checkpoint that could not be written, but nobody shall overlook it."""
        if self.saver.failed > self.told and self.recorder is not None:
            self.recorder.alarm(done, f"{self.saver.failure}; training goes on, the checkpoints before are untouched")
        self.told = self.saver.failed

    def _restore(self, found: Source) -> int:
        """Put weights, optimiser, controllers and generators back; returns the number of steps that are done."""
        try:
            self.engine.load_state(found.fill)
        except ValueError as error:
            raise cannot_resume(self.config, str(error), AS_SAVED) from error
        self.control.load(found.extra.get(CONTROL, {}))
        self.guard.load(found.extra.get(GUARD, {}))
        said = restore_generators(found, self.mesh, self.config.run.seed)
        log.info("resumed after step %d; %s", found.step, said)
        return found.step

    def _roll_back(self, done: int) -> int:
        """From a checkpoint before the bad steps, past all batches up to those of step ``done``. Returns its step."""
        self.saver.finish()
        told = "\n".join(f"  step {one.step}: {one.reason}; {self._samples_of(one.step)}" for one in self.guard.bad)
        report = f"{len(self.guard.bad)} bad steps in a row:\n{told}"
        try:
            found = self.rollbacks.source(self.guard.bad[0].step)
        except Unstable as error:
            raise self._unstable(done, f"{report}\n{error}") from error
        step = self._restore(found)
        self.rollbacks.jump(step, done)
        self.window, self.validated = Window(self.mesh), None
        self.timeline.drain()
        if self.recorder is not None:
            self.recorder.go_back(step, f"{report}\nback to step {step}, past the batches up to those of step {done}")
        return step

    def _unstable(self, done: int, report: str) -> Unstable:
        if self.recorder is not None:
            self.recorder.stop(done, f"THE RUN HAS STOPPED: {report}")
        barrier(self.mesh.world_group)  # whoever is gone first takes the others with it
        return Unstable(report)

    def _samples_of(self, step: int) -> str:
        """The samples of step number ``step``, from 1."""
        size = self.config.train.global_batch
        first = self.rollbacks.batch_of(step - 1) * size
        return f"samples {first} to {first + size - 1}"

    def _close(self) -> None:
        """Raises Unstable if the last checkpoint, which holds what the run was for, could not be written."""
        sample = None if self.left is not None else sample_text(self.config, self.engine, self.corpus, self.mesh.device)
        memory = measure_memory(self.engine, self.mesh)
        if self.recorder is not None:
            if self.validated is not None and not math.isfinite(loss := self.validated[1]):
                self.recorder.alarm(self.validated[0], f"THE RUN HAS FAILED: its last validation loss is {loss}")
            self.recorder.close(sample, memory, checkpoint.latest(self.folder.checkpoints))
        if self.saver.failure:
            what = "run is done" if self.left is None else "run was left"
            report = f"the {what}, but its last {self.saver.failure}"
            if self.mesh.is_main:
                print(f"moetrain: {report}", file=sys.stderr, flush=True)
            raise Unstable(report)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _facts(corpus: Corpus, vocab_size: int) -> CorpusFacts:
    entropies = corpus.unigram_entropy, corpus.bigram_entropy
    return CorpusFacts(vocab_size, *entropies, corpus.bytes_per_token, corpus.domains)
