"""How it is trained: engine, optimiser, corpus, batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.base import STRICT


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EngineConfig:
    """deepspeed is the distributed engine, local plain torch, its oracle. dtype auto: bf16 on an accelerator."""

    name: Literal["deepspeed", "local"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    ep_size: int | None = Field(default=None, ge=1)
    recompute: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimConfig:
    """AdamW (or SGD, for exact comparisons), a warm-up of ``warmup_steps`` and a schedule down to ``min_lr_ratio``."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """Flat token bins. ``source``: kjv (ships with moetrain), text, jsonl, parquet, hub, or bins already prepared.

    ``path``: the folder, file or data set name that the source reads; ``field``: the text column of jsonl, parquet and
    hub.
    ``domain_field``: the column of jsonl, parquet and hub that names a document's domain, for expert usage by domain;
    of text ``folder`` (the first one below ``path`` that a file lies in) or ``file``.
    ``tokenizer``: ``kjv`` (a small BPE that ships), ``byte``, or the path of a ``tokenizer.json``.
    """

    source: Literal["kjv", "text", "jsonl", "parquet", "hub", "bins"] = "kjv"
    path: str | None = None
    field: str = "text"
    domain_field: str | None = None
    subset: str | None = None
    split: str = "train"
    tokenizer: str = "kjv"
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    mask_documents: bool = False
    cache: str = "outputs/data"


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """Batch sizes are in sequences of ``model.context`` tokens: global_batch = micro_batch * ranks * accumulation.

    Of checkpoints the newest ``keep_checkpoints`` stay, those of steps that are multiples of ``keep_every`` (0: none
    for that) and, with keep_best, the one with the lowest validation loss of those that were saved at a step with
    evaluation. async_checkpoint: a save stops training for a copy to the host only, and is written beside it.
    A run that is asked to leave saves whatever ``checkpoint_every`` is, 0 included.
    """

    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    micro_batch: int = Field(gt=0)
    eval_every: int = Field(default=0, ge=0)
    eval_batches: int = Field(default=8, gt=0)
    checkpoint_every: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    keep_every: int = Field(default=0, ge=0)
    keep_best: bool = False
    async_checkpoint: bool = False
    sample_tokens: int = Field(default=0, ge=0)
