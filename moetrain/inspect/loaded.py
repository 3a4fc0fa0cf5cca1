"""A checkpoint as a model to look into: one process, all experts, whatever layout it was saved at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from moetrain.canonical import weight_pieces
from moetrain.checkpoint import NoneWhole, Source, find
from moetrain.checkpoint.manifest import MANIFEST
from moetrain.checks import parse
from moetrain.config import Config, MachineConfig
from moetrain.data import Corpus, Tokenizer, load_tokenizer, prepare
from moetrain.models.decoder import Decoder
from moetrain.monitor.history import run_record
from moetrain.monitor.runfolder import RunFolder
from moetrain.parallel.mesh import Mesh, choose_device
from moetrain.types import ConfigError, Problem

FIELD = "CKPT"
GIVE = "give a run folder such as outputs/first-try, or one of its checkpoints/step_*"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in evaluation mode, fp32 (a run in bf16 routes by rounded activations, so near ties may differ).

    path: the checkpoint. passed_over: newer ones that can not be used, and why.
    """

    config: Config
    model: Decoder
    path: Path
    step: int
    passed_over: tuple[str, ...]
    vocab_size: int
    fingerprint: str

    def tokenizer(self) -> Tokenizer:
        """The one that the run's data section names. Raises ConfigError."""
        if self.config.data.source == "bins":
            return self.corpus().tokenizer
        return load_tokenizer(self.config.data.tokenizer)

    def corpus(self) -> Corpus:
        """The corpus of the run, prepared anew if its cache is gone. Raises ConfigError if it is another one."""
        corpus = prepare(self.config.data, context=self.config.model.context, vocab_size=self.vocab_size)
        if corpus.fingerprint != self.fingerprint:
            reason = f"the files have changed since the run was trained on {self.fingerprint[:12]}"
            fix = "put them back, or look at --text instead"
            raise ConfigError([Problem("data", corpus.fingerprint[:12], reason, fix)])
        return corpus


def load(given: Path) -> Loaded:
    """The newest good checkpoint of a run folder, or the one in a step folder, all files verified.

    Raises ConfigError if there is none, if it is damaged or if it does not fit the run's config.
    """
    mesh = Mesh(rank=0, world_size=1, ep_size=1, device=choose_device(MachineConfig()))
    is_step = (given / MANIFEST).is_file()
    folder = RunFolder(given.resolve().parents[1] if is_step else given)
    config = _config(folder)
    source = _step(given) if is_step else _newest(folder, mesh)
    vocab_size = int(source.extra["vocab_size"])
    model = Decoder(config, mesh, vocab_size)
    try:
        source.fill(weight_pieces(model, mesh), weights_only=True)
    except ValueError as error:
        fix = f"see whether {folder.config} is the config that it was trained with"
        raise ConfigError([Problem(FIELD, str(given), str(error), fix)]) from error
    model.eval()
    return Loaded(config, model, source.path, source.step, source.passed_over, vocab_size, source.extra["corpus"])


def _newest(folder: RunFolder, mesh: Mesh) -> Source:
    """Verified and open."""
    try:
        source = find(folder.checkpoints, mesh)
    except NoneWhole as error:
        raise ConfigError([Problem(FIELD, str(folder.path), str(error), GIVE)]) from error
    if source is None:
        reason = f"{folder.checkpoints} holds no checkpoint"
        raise ConfigError([Problem(FIELD, str(folder.path), reason, "train with train.checkpoint_every=100, say")])
    return source


def _step(path: Path) -> Source:
    try:
        source = Source(path)
        source.verify()
        source.open()
    except (ValueError, OSError) as error:
        fix = "give another step of the run, or the run folder itself for its newest good one"
        raise ConfigError([Problem(FIELD, str(path), str(error), fix)]) from error
    return source


def _config(folder: RunFolder) -> Config:
    """The config of the run's latest start, checked for the world of that start."""
    world_size = run_record(folder)["starts"][-1]["world_size"]
    try:
        container = yaml.safe_load(folder.config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([Problem(FIELD, str(folder.config), f"can not be read: {error}", GIVE)]) from error
    if not isinstance(container, dict):
        raise ConfigError([Problem(FIELD, str(folder.config), "is damaged: it holds no sections", GIVE)])
    return parse({name: {} for name in Config.__dataclass_fields__} | container, world_size)
