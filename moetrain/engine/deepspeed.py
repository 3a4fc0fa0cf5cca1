"""DeepSpeed's engine around a model whose experts it has never heard of. The only file that imports DeepSpeed.

DeepSpeed 0.19.8 reduces, clips and partitions expert parameters rightly if four things hold, all of them set here: the
parameters are marked (``allreduce``, ``group_name``, ``ds_zero_*``), their layers are instances of a class it knows,
its table of groups names ours, and every dataclass that a module returns is open to its hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.canonical import State
from moetrain.config import Config
from moetrain.engine import zero
from moetrain.engine.base import (
    MAX_BUCKET,
    Engine,
    ExpertWatch,
    ParameterGroup,
    detached,
    make_optimizer,
    param_options,
    parameter_groups,
    set_lr,
)
from moetrain.engine.flat import FlatParameters
from moetrain.engine.state import CanonicalState
from moetrain.parallel.mesh import Mesh, bound_groups, weight_dtype
from moetrain.types import Batch, ModelOutput

NEVER = 2**62
RENAMED = r"`torch\.distributed\.\w+` is deprecated\. Please use `torch\.distributed\.\w+` instead"


def make_deepspeed(config: Config, model: nn.Module, mesh: Mesh, accumulation: int) -> Engine:
    """The engine at ``config.engine.zero_stage``. Where there is no process group, it makes a world of one."""
    _prepare(mesh)
    groups = parameter_groups(model, mesh.ep_size)
    if any(group.is_expert for group in groups):
        _introduce_experts(config, model, mesh)
    if config.engine.zero_stage == 0:
        return ReplicatedEngine(config, model, mesh, accumulation, groups)
    return ZeroEngine(config, model, mesh, accumulation, groups)


class _Engine:
    """Forward and backward, the same at all stages."""

    def __init__(self, config: Config, model: nn.Module, mesh: Mesh, accumulation: int) -> None:
        self.model = model.train()
        self._config, self._mesh, self._accumulation = config, mesh, accumulation
        self._watch = ExpertWatch(model)
        self._canonical = CanonicalState(model, mesh, config.optim)
        self._num_done = 0

    def _initialize(self, optimizer: Optimizer, bf16: bool, clip_norm: float) -> None:
        settings = _settings(self._config, self.model, self._accumulation, bf16, clip_norm)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use; its log does not go this way
            self._deepspeed = deepspeed.initialize(
                model=_Open(self.model), optimizer=optimizer, config=settings, dist_init_required=False
            )[0]
        bound_groups(self._config.machine)

    def forward_backward(self, batch: Batch) -> ModelOutput:
        self._num_done += 1
        self._deepspeed.set_gradient_accumulation_boundary(self._num_done == self._accumulation)
        loss, output = self._deepspeed(batch.to(self._mesh.device))
        self._deepspeed.backward(loss)
        self._watch.check()
        return detached(output)

    def _end_accumulation(self) -> None:
        assert self._num_done == self._accumulation, (self._num_done, self._accumulation)
        self._num_done = 0

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> ModelOutput:
        self._deepspeed.eval()
        _, output = self._deepspeed(batch.to(self._mesh.device))
        self._deepspeed.train()
        return detached(output)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        self._deepspeed.eval()
        logits_BSV: Tensor = self._deepspeed(tokens_BS)
        self._deepspeed.train()
        return logits_BSV


class ReplicatedEngine(_Engine):
    """ZeRO 0. DeepSpeed averages the gradients; clipping and masters are ours.

    It would clip by the average of local norms, and in bf16 it would accumulate in bf16 and take a step with zero
    gradients while it is set up, which decays the weights.
    """

    def __init__(
        self, config: Config, model: nn.Module, mesh: Mesh, accumulation: int, groups: list[ParameterGroup]
    ) -> None:
        super().__init__(config, model, mesh, accumulation)
        self._flat = FlatParameters(groups, weight_dtype(config.engine, mesh.device))
        masters = self._flat.masters
        options = [param_options(group, [masters[group.name]], config.optim) for group in groups]
        self._optimizer = make_optimizer(config.optim, options)
        self._initialize(self._optimizer, bf16=False, clip_norm=0.0)

    def step(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        self._end_accumulation()
        norm = self._flat.clip(self._config.optim.clip_norm, self._mesh.ep_group)
        if accepts(norm):
            set_lr(self._optimizer, lr)
            self._deepspeed.step()
            self._flat.refresh()
        self._flat.zero_grad()
        self._flat.attach()
        return norm

    def state(self) -> State:
        return self._flat.state(self._canonical, self._optimizer, self._mesh)

    @torch.no_grad()
    def load_state(self, fill: Callable[[State], None]) -> None:
        fill(self.state())
        self._flat.refresh()


class ZeroEngine(_Engine):
    """ZeRO 1, 2 and 3: DeepSpeed partitions, reduces, clips (rightly, from stage 1 on) and updates."""

    def __init__(
        self, config: Config, model: nn.Module, mesh: Mesh, accumulation: int, groups: list[ParameterGroup]
    ) -> None:
        super().__init__(config, model, mesh, accumulation)
        options = []
        for group in groups:
            moe = {"moe": True, "name": _group_name(mesh)} if group.is_expert else {"name": group.name}
            options.append(param_options(group, list(group.params.values()), config.optim) | moe)
        bf16 = weight_dtype(config.engine, mesh.device) == torch.bfloat16
        self._initialize(make_optimizer(config.optim, options), bf16, config.optim.clip_norm or 0.0)

    def step(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        self._end_accumulation()
        set_lr(self._deepspeed.optimizer, lr)
        with zero.judged(self._deepspeed.optimizer, accepts) as judge:
            self._deepspeed.step()
        return judge.norm

    def state(self) -> State:
        optimizer = self._deepspeed.optimizer
        held = zero.stretches(optimizer, self.model)
        return self._canonical.of(held, held, zero.inner(optimizer))

    @torch.no_grad()
    def load_state(self, fill: Callable[[State], None]) -> None:
        fill(self.state())
        zero.refresh(self._deepspeed.optimizer)


class _Open(nn.Module):
    """DeepSpeed hooks onto the tensors that the outermost forward returns, and looks into tuples only.

    Whatever is asked of the model is asked through here, where ZeRO 3 sees to weights that one module borrows from
    another (tied embeddings).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, asked: Batch | Tensor) -> Any:
        """A batch -> (its loss, its output); tokens_BS -> their logits."""
        if isinstance(asked, Tensor):
            return self.model.logits(asked)
        output = self.model(asked)
        return output.loss, output


def _settings(config: Config, model: nn.Module, accumulation: int, bf16: bool, clip_norm: float) -> dict[str, Any]:
    """DeepSpeed's own configuration. Nothing that matters is left to its defaults (it clips at 1.0 when not told)."""
    bucket = min(MAX_BUCKET, sum(p.numel() for p in model.parameters()))
    bucket += bucket % 2
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "steps_per_print": NEVER,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }


def _prepare(mesh: Mesh) -> None:
    """Make the ground ready: a process group, LOCAL_RANK, nothing to compile, hooks that see into dataclasses."""
    warnings.filterwarnings("ignore", RENAMED, FutureWarning)  # DeepSpeed's calls, at every step, on every rank
    if mesh.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of g++ for inference only
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(mesh.device)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not hasattr(parameter_offload.apply_to_tensors_only, "sees_dataclasses"):
        parameter_offload.apply_to_tensors_only = _seeing_dataclasses(parameter_offload.apply_to_tensors_only)


def _seeing_dataclasses(apply: Callable[..., Any]) -> Callable[..., Any]:
    """``apply``, which knows tuples, lists and dicts, made to look into frozen dataclasses too.

    ZeRO 3 fetches a module's weights for backward by hooks on what the module returned: without this the weights of a
    router that returns a ``Routing`` would not be there. Only frozen ones: the others are meant to be the same object.
    """

    def to_tensors(function: Callable[[Tensor], Tensor], value: Any, warning_msg_fn: Any = None) -> Any:
        if type(value) is tuple:
            return tuple(to_tensors(function, item, warning_msg_fn) for item in value)
        if not _is_frozen(value):
            return apply(function, value, warning_msg_fn)
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(
            value, **{name: to_tensors(function, getattr(value, name), warning_msg_fn) for name in names}
        )

    to_tensors.sees_dataclasses = True  # type: ignore[attr-defined]
    return to_tensors


def _is_frozen(value: object) -> bool:
    params = getattr(type(value), "__dataclass_params__", None)
    return params is not None and params.frozen


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.ep_size}"  # DeepSpeed reads the size out of the name


def _introduce_experts(config: Config, model: nn.Module, mesh: Mesh) -> None:
    """Tell DeepSpeed which parameters are experts, over which of our groups they are replicated, in which layers."""
    name = _group_name(mesh)
    deepspeed_groups._get_expert_parallel_group_dict()[name] = mesh.ep_group
    deepspeed_groups._get_expert_data_parallel_group_dict()[name] = mesh.expert_dp_group
    experts = model.expert_names()
    for param_name, param in model.named_parameters():
        if param_name in experts:
            param.allreduce = False
            param.group_name = name
            param.ds_zero_placement_family = "autoep_expert"
            param.ds_zero_partition_group_name = name
    num_experts = config.experts.num_experts
    for layer in model.moe_layers():
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (kind, AutoEPMoELayer), {"set_deepspeed_parallelism": _groups_are_set})
        layer.ep_group_name, layer.ep_size = name, mesh.ep_size
        layer.num_experts, layer.num_local_experts = num_experts, num_experts // mesh.ep_size


def _groups_are_set(layer: nn.Module, *_: object, **__: object) -> None:
    """DeepSpeed would make EP groups of its own here; it has been given ours."""
