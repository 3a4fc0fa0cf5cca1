"""Typed schema of a run; ``rules`` has every check that needs two sections at once.

Sections are named after the Hydra groups in ``conf/``. A section whose parts are swapped (``router``, ``dispatch``) is
a mapping with a ``_target_``: its keys are checked against the keyword-only parameters of that class, so that a new
router is one file and one config.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from moetrain.config.base import STRICT as STRICT
from moetrain.config.base import Part as Part
from moetrain.config.model import AboutPart as AboutPart
from moetrain.config.model import BalanceConfig as BalanceConfig
from moetrain.config.model import BalanceUnits as BalanceUnits
from moetrain.config.model import CapacityConfig as CapacityConfig
from moetrain.config.model import ControlConfig as ControlConfig
from moetrain.config.model import ExpertsConfig as ExpertsConfig
from moetrain.config.model import ModelConfig as ModelConfig
from moetrain.config.running import DebugConfig as DebugConfig
from moetrain.config.running import HealthConfig as HealthConfig
from moetrain.config.running import MachineConfig as MachineConfig
from moetrain.config.running import MonitorConfig as MonitorConfig
from moetrain.config.running import RecipeConfig as RecipeConfig
from moetrain.config.running import RunConfig as RunConfig
from moetrain.config.training import DataConfig as DataConfig
from moetrain.config.training import EngineConfig as EngineConfig
from moetrain.config.training import OptimConfig as OptimConfig
from moetrain.config.training import TrainConfig as TrainConfig


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Config:
    """A whole run, resolved and checked."""

    run: RunConfig
    model: ModelConfig
    experts: ExpertsConfig
    router: Part
    capacity: CapacityConfig
    dispatch: Part
    balance: BalanceConfig
    control: ControlConfig
    engine: EngineConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    monitor: MonitorConfig
    health: HealthConfig
    machine: MachineConfig
    debug: DebugConfig
    recipe: RecipeConfig
