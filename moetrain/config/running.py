"""What a run is beside its training: where it lives, what it shows, what it guards against, on which machine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.base import STRICT


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RunConfig:
    """Where a run lives. ``root``/``id`` is one folder for all ranks; ``resume`` continues from its newest
    checkpoint. elastic: engine.ep_size and train.micro_batch are upper bounds, lowered to what fits the ranks.
    With capacity.scope=rank or balance.scope=micro_batch the latter changes what is dropped and balanced.
    """

    id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    root: str = "outputs"
    seed: int = Field(default=0, ge=0)
    resume: Literal["auto", "never", "must"] = "auto"
    on_config_change: Literal["refuse", "allow"] = "refuse"
    elastic: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class MonitorConfig:
    """metrics.jsonl is always written; the rest is by choice. ``log_every``, ``gradient_ratio_every`` (0: never; see
    moetrain.monitor.gradient_ratio) are in steps.
    """

    log_every: int = Field(default=10, gt=0)
    progress: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "moetrain"
    wandb_group: str | None = None
    timing: bool = True
    gradient_ratio_every: int = Field(default=0, ge=0)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class HealthConfig:
    """What is done about faults of a run.

    A step is bad if its loss or gradient norm is not finite or, unless ``outlier_sigmas`` is null, lies more than that
    many robust standard deviations (1.4826 times the median absolute deviation) over the median of the last
    ``outlier_window`` good steps. It is skipped. ``max_bad_steps`` in a row: back to the newest checkpoint, and past
    their data; more than ``max_rollbacks`` times: the run stops. replicas_every: steps between comparisons of what
    ranks hold in common, which is compared before each checkpoint too (0: never). preflight: check the world first.
    """

    outlier_sigmas: float | None = Field(default=None, gt=0)
    outlier_window: int = Field(default=128, ge=16)
    max_bad_steps: int = Field(default=5, ge=1)
    max_rollbacks: int = Field(default=1, ge=0)
    replicas_every: int = Field(default=0, ge=0)
    preflight: bool = True


@dataclass(frozen=True, config=STRICT, kw_only=True)
class MachineConfig:
    """The device type of every rank (auto: an accelerator where torch sees one) and process-level settings."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    timeout_s: int = Field(default=600, gt=0)
    experts_kernel: Literal["torch", "triton"] = "torch"
    peak_tflops: float | None = Field(default=None, gt=0)
    allow_modules: list[str] = Field(default_factory=list)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DebugConfig:
    """Ways to look for a fault. overfit: the same batch at every step. fake_world: dry-run at this world size.
    collapsed_router: a bias sends all tokens to experts 0 and 1 from the start."""

    overfit: bool = False
    collapsed_router: bool = False
    fake_world: int | None = Field(default=None, gt=0)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RecipeConfig:
    """What a recipe says about itself. Published sizes are in parameters; the counted ones must lie within 1 %."""

    name: str = "none"
    about: str = ""
    source: str = ""
    world: int = Field(default=1, ge=1)
    published_total: float | None = Field(default=None, gt=0)
    published_active: float | None = Field(default=None, gt=0)
