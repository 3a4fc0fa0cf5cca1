"""One MoE layer, forward and backward with router and balance loss: ours against the layers of other libraries.

All get the same weights and tokens; outputs are compared before anything is timed. On more than one rank experts are
sharded over all of them.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.bench.peers import LayerCase, peers
from moetrain.bench.race import Contestant, Sample, bytes_sent, median_and_least, most_of, race
from moetrain.bench.routing import Routing, gate_of, tokens_of
from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.ops.grouped_swiglu import grouped_swiglu
from moetrain.ops.kernels import Kernels, fastest_gemm, make_kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.collectives import broadcast_text
from moetrain.parallel.mesh import Mesh, weight_dtype
from moetrain.rules.layout import PADDED
from moetrain.types import Dispatched

SPREAD = 0.02
ALLTOALL = "moetrain.moe.dispatch.alltoall.AllToAllDispatcher"
DEDUP = "moetrain.moe.dispatch.dedup.DedupDispatcher"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Of the largest entry of the output."""


@dataclass(frozen=True)
class Result:
    """What one contestant took under one routing. case: what was timed, on what machine. sent: bytes of a step to other
    ranks, by the rank that sends most.
    """

    case: dict[str, Any]
    routing: Routing
    name: str
    note: str
    samples: list[Sample]
    sent: int


def bench_layer(
    configs: Sequence[Config], mesh: Mesh, rounds: int, routings: Sequence[Routing], *, exchange_only: bool = False
) -> list[Result]:
    """Every config under every routing. exchange_only: our dispatchers, with experts that give back what they get.

    Raises AssertionError if two contestants that drop nothing differ.
    """
    field = _dispatchers if exchange_only else _field
    gemm = broadcast_text(fastest_gemm(mesh.device), mesh.world_group)
    results: list[Result] = []
    for config in configs:
        facts = _facts(config, mesh, gemm)
        for routing in routings:
            case = _case(config, mesh, routing)
            contestants, missing = field(case, config, gemm)
            _check(contestants, case)
            sent = {one.name: int(most_of(bytes_sent(one.step), mesh)) for one in contestants}
            samples = race(contestants, mesh, rounds)
            found = [Result(facts, routing, n.name, n.note, samples[n.name], sent[n.name]) for n in contestants]
            results += found
            if mesh.is_main:
                print(_text(found, missing if routing == routings[0] else []), flush=True)
    return results


def write_results(results: Sequence[Result], path: Path) -> None:
    """A JSON line for each contestant under each routing, appended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for one in results:
            seconds = {kind: [getattr(sample, kind) for sample in one.samples] for kind in ("wall", "cpu")}
            row = {
                **one.case,
                "routing": one.routing,
                "contestant": one.name,
                "note": one.note,
                "sent": one.sent,
                **seconds,
            }
            file.write(json.dumps(row) + "\n")


def _field(case: LayerCase, config: Config, gemm: str) -> tuple[list[Contestant], list[str]]:
    theirs, missing = peers(case)
    kernels = make_kernels(case.mesh.device, "onednn" if gemm == "onednn" else "torch")
    plain = Kernels("torch", torch.nn.functional.linear, grouped_swiglu)
    ours = [_ours(case, config, kernels, "moetrain")]
    if case.mesh.world_size > 1:
        per_copy = replace(config, dispatch={"_target_": ALLTOALL})
        ours.append(_ours(case, per_copy, kernels, "moetrain, a copy for each expert"))
        ours.append(_ours(case, per_copy, plain, "a copy for each expert, torch grouped_mm"))
    return ours + theirs, missing


def _dispatchers(case: LayerCase, config: Config, gemm: str) -> tuple[list[Contestant], list[str]]:
    kernels = make_kernels(case.mesh.device, "onednn" if gemm == "onednn" else "torch")
    limited = replace(config, capacity=replace(config.capacity, factor_train=1.25, factor_eval=1.25))
    field = []
    for name, target, given, note in (
        ("dedup", DEDUP, config, ""),
        ("alltoall", ALLTOALL, config, ""),
        ("padded, capacity 1.25", PADDED, limited, "drops tokens"),
    ):
        one = _ours(case, replace(given, dispatch={"_target_": target}), kernels, name, note, echo=True)
        field.append(one)
    return field, []


class _Echo(nn.Module):
    def forward(self, sent: Dispatched) -> Tensor:
        return sent.x_CD * 1.0


def _case(config: Config, mesh: Mesh, routing: Routing) -> LayerCase:
    """Weights depend on the seed and the expert alone, tokens on the rank too."""
    num_experts, dim, width = config.experts.num_experts, config.model.dim, config.model.expert_dim
    dtype, seed = weight_dtype(config.engine, mesh.device), config.run.seed
    top_k = int(traits_of(config).experts_per_token)
    num_tokens, num_local = config.train.micro_batch * config.model.context, num_experts // mesh.ep_size
    gate_ED = gate_of(num_experts, dim, seed)
    tokens_TD = tokens_of(routing, gate_ED, num_tokens, top_k, seed + 1 + mesh.rank)
    first = mesh.ep_rank * num_local
    stacks = [_drawn(range(first, first + num_local), shape, seed) for shape in ((2 * width, dim), (dim, width))]
    grad_TD = torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(seed))
    given = [tensor.to(mesh.device, dtype) for tensor in (tokens_TD, grad_TD, gate_ED, *stacks)]
    return LayerCase(given[0], given[1], given[2], given[3], given[4], top_k, mesh)


def _drawn(experts: range, shape: tuple[int, int], seed: int) -> Tensor:
    draw = [torch.Generator().manual_seed(1000 * seed + expert) for expert in experts]
    return torch.stack([torch.randn(*shape, generator=generator) * SPREAD for generator in draw])


def _ours(
    case: LayerCase, config: Config, kernels: Kernels, name: str, note: str = "", *, echo: bool = False
) -> Contestant:
    layer = MoELayer(config, case.mesh, Timeline(case.mesh.device, enabled=False), kernels, 2, 0)
    layer = layer.to(case.x_TD.dtype)
    with torch.no_grad():
        layer.router.get_parameter("gate").copy_(case.gate_ED)
        layer.experts.get_parameter("gate_up").copy_(case.gate_up_eFD)
        layer.experts.get_parameter("down").copy_(case.down_eDF)
    if echo:
        layer.experts = _Echo()
    tokens_BS = torch.zeros(1, case.x_TD.shape[0], dtype=torch.int64, device=case.x_TD.device)

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        out = layer(x_TD, tokens_BS, Replay())
        return out.hidden_TD, out.losses.balance

    return case.contestant(name, layer, run, note)


def _check(contestants: Sequence[Contestant], case: LayerCase) -> None:
    """Who drops nothing gives what ours gives."""
    reference_TD = contestants[0].step().float()
    limit = TOLERANCE[case.x_TD.dtype] * float(reference_TD.abs().max())
    for one in contestants[1:]:
        error = float((one.step().float() - reference_TD).abs().max())
        assert one.note or error <= limit, f"{one.name} differs from ours by {error:.3g}, of {limit:.3g} allowed"


def _facts(config: Config, mesh: Mesh, gemm: str) -> dict[str, Any]:
    return {
        "experts": config.experts.num_experts,
        "top_k": int(traits_of(config).experts_per_token),
        "dim": config.model.dim,
        "expert_dim": config.model.expert_dim,
        "tokens": config.train.micro_batch * config.model.context,
        "dtype": str(weight_dtype(config.engine, mesh.device)).removeprefix("torch."),
        "ranks": mesh.world_size,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": "cpu" if mesh.device.type == "cpu" else torch.cuda.get_device_name(mesh.device),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "gemm": gemm,
        "allocator": os.environ.get("GLIBC_TUNABLES", "as it comes"),
    }


def _text(results: Sequence[Result], missing: Sequence[str]) -> str:
    """A table: how many times as long as ours each took, by medians; then milliseconds."""
    first, case = results[0], results[0].case
    lines = [
        f"{case['dtype']}, {case['experts']} experts, k = {case['top_k']}, D = {case['dim']}, F = {case['expert_dim']},"
        f" {case['tokens']} tokens a rank, {case['ranks']} ranks x {case['threads']} threads, {first.routing} routing",
        f"{case['machine']}, {case['cores']} cores, {case['device']}, load {case['load']:.1f}, torch {case['torch']},"
        f" products by {case['gemm']}, allocator: {case['allocator']}",
        f"{'':40} {'CPU':>7} {'wall':>7}   CPU ms: median, least   wall ms: median, least",
    ]
    for one in results:
        ours, own = ({kind: median_and_least(r.samples, kind) for kind in ("cpu", "wall")} for r in (first, one))
        ratios = " ".join(f"{own[kind][0] / ours[kind][0]:6.2f}x" for kind in ("cpu", "wall"))
        times = "".join(f"{1e3 * own[kind][0]:14.1f} {1e3 * own[kind][1]:7.1f}  " for kind in ("cpu", "wall"))
        sent = f"{one.sent / 2**20:8.1f} MiB sent" if one.sent else ""
        lines.append(f"{one.name:40} {ratios} {times} {sent} {one.note}")
    return "\n".join([*lines, *(f"not here: {reason}" for reason in missing)]) + "\n"
