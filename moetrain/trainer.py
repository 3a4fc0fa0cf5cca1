"""The loop, on one screen. What it is made of is built in ``__init__``; what it says is said by its recorder."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from time import perf_counter

import torch

from moetrain import checkpoint
from moetrain.checkpoint import Checkpoint
from moetrain.config import Config
from moetrain.data import Corpus, Loader
from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.models.generate import generate
from moetrain.monitor.memory import measure_memory
from moetrain.monitor.recorder import CorpusFacts, Recorder
from moetrain.monitor.runfolder import RunFolder
from moetrain.monitor.window import Window, WindowMeans
from moetrain.ops.kernels import GemmName, fastest_gemm, make_kernels
from moetrain.ops.timeline import Timeline
from moetrain.optim import lr_at
from moetrain.parallel.collectives import broadcast_text
from moetrain.parallel.mesh import Mesh
from moetrain.types import ConfigError, Problem

log = logging.getLogger(__name__)
SAMPLE_TEMPERATURE = 0.8
AS_SAVED = "start it with the ranks, engine and model it was saved with, or name another run.id"


class Trainer:
    """Trains one model on one corpus; every rank of the mesh has one, and all make the same calls."""

    def __init__(self, config: Config, mesh: Mesh, corpus: Corpus, folder: RunFolder) -> None:
        train = config.train
        self.config, self.mesh, self.corpus, self.folder = config, mesh, corpus, folder
        self.accumulation = train.global_batch // (mesh.world_size * train.micro_batch)
        torch.manual_seed(config.run.seed + mesh.rank)
        self.timeline = Timeline(mesh.device, enabled=config.monitor.timing)
        found = self._find()
        self.gemm = _gemm(mesh, found)
        vocab_size = config.model.vocab_size or corpus.vocab_size
        self.model = Decoder(config, mesh, vocab_size, self.timeline, make_kernels(mesh.device, self.gemm))
        self.engine = make_engine(config, self.model, mesh, self.accumulation)
        self.loader = Loader(
            corpus=corpus,
            context=config.model.context,
            micro_batch=train.micro_batch,
            accumulation=self.accumulation,
            rank=mesh.rank,
            world_size=mesh.world_size,
            seed=config.run.seed,
            mask_documents=config.data.mask_documents,
        )
        self.window = Window(mesh)
        self.skipped = 0
        self.start = 0 if found is None else self._restore(found)
        self.recorder = Recorder(config, mesh, _facts(corpus, vocab_size), folder, self.start) if mesh.is_main else None

    def fit(self) -> None:
        """Train from the step that was resumed to the last, then evaluate, save and report."""
        train, saved = self.config.train, None
        self.timeline.drain()
        for step in range(self.start, train.steps):
            began = perf_counter()
            norm = self._step(step)
            done = step + 1
            last = done == train.steps
            if self.recorder is not None:
                self.recorder.tick(done, perf_counter() - began)
            if last or _due(done, self.config.monitor.log_every):
                self._record(done, norm)
            if last or _due(done, train.eval_every):
                self._evaluate(done)
            if (last and train.checkpoint_every) or _due(done, train.checkpoint_every):
                saved = self._save(done)
        self._close(saved)

    def _step(self, step: int) -> float:
        """One optimiser step; returns the gradient norm before clipping."""
        for micro in range(self.accumulation):
            batch = self.loader.train(0 if self.config.debug.overfit else step, micro)
            self.window.add(self.engine.forward_backward(batch))
            self.model.commit_load()
        self.timeline.mark("update")
        norm = self.engine.step(lr_at(step, self.config.train.steps, self.config.optim))
        self.timeline.mark("rest")
        if not math.isfinite(norm):
            self.skipped += 1
            log.warning("step %d was skipped: the gradient norm is %s", step + 1, norm)
        self.model.adapt_routers(moved=math.isfinite(norm))
        self.window.add_load(self.model.take_load())
        return norm

    def _record(self, done: int, norm: float) -> None:
        means = self.window.reduce()
        phases = self.timeline.drain()
        if self.recorder is not None:
            lr = lr_at(done - 1, self.config.train.steps, self.config.optim)
            numbers = {"train/grad_norm": norm, "train/lr": lr, "train/skipped_steps": float(self.skipped)}
            self.recorder.window(done, means, numbers, phases)

    def _evaluate(self, done: int) -> None:
        """Mean over ``eval_batches`` global batches of validation windows, the same at every world size."""
        means = self._validation()
        self.timeline.drain()
        if self.recorder is not None:
            self.recorder.validation(done, means)

    def _validation(self) -> WindowMeans:
        window = Window(self.mesh)
        for index in range(self.config.train.eval_batches * self.accumulation):
            window.add(self.engine.evaluate(self.loader.validation(index)))
        return window.reduce()

    def _save(self, done: int) -> Path:
        tensors = self.engine.state() | checkpoint.rng_state(self.mesh.device)
        extra = {"gemm": self.gemm, "corpus": self.corpus.fingerprint}
        keep = self.config.train.keep_checkpoints
        path = checkpoint.save(self.folder.checkpoints, done, tensors, extra, self.mesh, keep)
        self.timeline.drain()
        return path

    def _find(self) -> Checkpoint | None:
        """The newest checkpoint of the run folder, if the run is to go on from it."""
        resume = self.config.run.resume
        newest = None if resume == "never" else checkpoint.agree(self.folder.checkpoints, self.mesh)
        if newest is None:
            if resume == "must":
                reason = f"{self.folder.checkpoints} holds no whole checkpoint"
                fix = "name another run.id, or set run.resume=auto"
                raise ConfigError([Problem("run.resume", "must", reason, fix)])
            return None
        try:
            found = checkpoint.load(newest, self.mesh)
        except ValueError as error:
            fix = f"if it is damaged, delete {newest}: the run then goes on from the one before; else {AS_SAVED}"
            raise self._cannot_resume(str(error), fix) from error
        if found.extra["corpus"] != self.corpus.fingerprint:
            reason = f"{newest} was trained on another corpus ({found.extra['corpus'][:12]})"
            fix = "give the same data section, tokenizer and files"
            raise ConfigError([Problem("data", self.corpus.fingerprint[:12], reason, fix)])
        return found

    def _restore(self, found: Checkpoint) -> int:
        """Put weights, optimiser and generators back; returns the number of steps that are done."""
        state = {name: t for name, t in found.tensors.items() if not name.startswith("rng.")}
        try:
            self.engine.load_state(state)
        except ValueError as error:
            raise self._cannot_resume(str(error), AS_SAVED) from error
        checkpoint.set_rng_state(found.tensors, self.mesh.device)
        log.info("resumed after step %d", found.step)
        return found.step

    def _cannot_resume(self, reason: str, fix: str) -> ConfigError:
        return ConfigError([Problem("run.resume", self.config.run.resume, reason, fix)])

    def _close(self, saved: Path | None) -> None:
        sample = self._sample()
        memory = measure_memory(self.engine, self.mesh)
        if self.recorder is not None:
            self.recorder.close(sample, memory, saved or checkpoint.latest(self.folder.checkpoints))

    def _sample(self) -> str | None:
        num_tokens = self.config.train.sample_tokens
        if num_tokens == 0:
            return None
        prompt = torch.tensor([self.corpus.tokenizer.end_of_document], device=self.mesh.device)
        seed, context = self.config.run.seed, self.config.model.context
        tokens = generate(self.engine.logits, context, prompt, num_tokens, SAMPLE_TEMPERATURE, seed)[1:].tolist()
        end = tokens.index(int(prompt)) if int(prompt) in tokens else num_tokens
        return self.corpus.tokenizer.decode(tokens[:end]).strip()


def _gemm(mesh: Mesh, found: Checkpoint | None) -> GemmName:
    """What the run has used so far, else the fastest of rank 0, on every rank: a resumed run and replicas round
    alike.
    """
    name = fastest_gemm(mesh.device) if found is None else found.extra["gemm"]
    name = broadcast_text(name, mesh.world_group)
    log.info("matrix products by %s", name)
    return "onednn" if name == "onednn" else "torch"


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _facts(corpus: Corpus, vocab_size: int) -> CorpusFacts:
    return CorpusFacts(vocab_size, corpus.unigram_entropy, corpus.bigram_entropy, corpus.bytes_per_token)
