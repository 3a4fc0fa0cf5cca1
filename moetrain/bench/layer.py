"""One MoE layer, forward and backward with router and balance loss: ours against the layers of other libraries.

All get the same weights and tokens; outputs are compared before anything is timed. On more than one rank experts are
sharded over all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.bench.allocator import name_of_allocator
from moetrain.bench.limit import products_alone
from moetrain.bench.peers import peers
from moetrain.bench.peers.case import LayerCase
from moetrain.bench.race import Contestant, Sample, bytes_sent, median_and_least, most_of, race
from moetrain.bench.routing import Routing, gate_of, tokens_of
from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.ops.kernels import Kernels, make_kernels, torch_kernels
from moetrain.ops.timeline import Timeline
from moetrain.ops.triton_swiglu import has_triton
from moetrain.parallel.machine import processor
from moetrain.parallel.mesh import Mesh, weight_dtype
from moetrain.resume import choose_kernels
from moetrain.rules.layout import ALLTOALL, DEDUP, HIERARCHICAL, PADDED, ranks_of_node
from moetrain.types import ConfigError, Dispatched, Problem

SPREAD = 0.02
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Of the largest entry of the output."""
ROUNDING = {"exact": 0.0, "bf16": 3 * 2**-8, "fp8": 2**-4 + 2 * 2**-8}
"""What ``dispatch.payload`` adds to that: errors of a number (parallel/wire.py), once on the way out and twice on the
way home, which can be two hops, as if all fell on the largest entry; sums over many numbers are off by less.
"""
OTHER_CHOICE = {torch.float32: 0.0, torch.bfloat16: 0.02}
"""The share of tokens that may go to another expert: a gate that rounds its logits to bf16 makes ties."""


@dataclass(frozen=True)
class Result:
    """What one contestant took under one routing. case: what was timed, on what machine. sent: bytes of a step to other
    ranks, by the rank that sends most; crossing: those of them to other nodes, by torchrun's word what a node is.
    """

    case: dict[str, Any]
    routing: Routing
    name: str
    note: str
    samples: list[Sample]
    sent: int
    crossing: int = 0


def bench_layer(
    configs: Sequence[Config],
    mesh: Mesh,
    rounds: int,
    routings: Sequence[Routing],
    against: Sequence[str] = ("",),
    *,
    exchange_only: bool = False,
) -> list[Result]:
    """Every config under every routing. against: parts of the names of those that are timed beside ours. exchange_only:
    our dispatchers, with experts that give back what they get.

    Raises AssertionError if two contestants that drop nothing differ, and ConfigError if ``against`` names nobody.
    """
    field = _dispatchers if exchange_only else _field
    results: list[Result] = []
    for config in configs:
        kernels = choose_kernels(config, mesh, None)
        facts = {"timed": "exchange" if exchange_only else "layer", **facts_of(config, mesh, kernels.gemm_name)}
        for routing in routings:
            case = layer_case(config, mesh, routing)
            contestants, missing = field(case, config, kernels)
            contestants = _chosen(contestants, against)
            _check(contestants, case, TOLERANCE[case.x_TD.dtype] + ROUNDING[config.dispatch.get("payload", "exact")])
            sent, samples = _sent(contestants, mesh), race(contestants, mesh, rounds)
            found = [Result(facts, routing, n.name, n.note, samples[n.name], *sent[n.name]) for n in contestants]
            results += found
            if mesh.is_main:
                print(_text(found, missing if routing == routings[0] else []), flush=True)
    return results


def _sent(contestants: Sequence[Contestant], mesh: Mesh) -> dict[str, list[int]]:
    """Bytes of a step by contestant: to other ranks, and to other nodes."""
    nodes = 1, ranks_of_node(None)
    return {one.name: [int(most_of(bytes_sent(one, mesh, ranks), mesh)) for ranks in nodes] for one in contestants}


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
                "crossing": one.crossing,
                **seconds,
            }
            file.write(json.dumps(row) + "\n")


def _chosen(contestants: list[Contestant], against: Sequence[str]) -> list[Contestant]:
    ours, *others = contestants
    for word in against:
        if not any(word in one.name for one in others):
            fix = f"name parts of {', '.join(repr(one.name) for one in others)}"
            raise ConfigError([Problem("--against", word, "is nobody here", fix)])
    return [ours, *(one for one in others if any(word in one.name for word in against))]


def _field(case: LayerCase, config: Config, kernels: Kernels) -> tuple[list[Contestant], list[str]]:
    theirs, missing = peers(case)
    plain = torch_kernels()
    ours = [_ours(case, config, kernels, "moetrain")]
    if has_triton() and kernels.experts_name != "triton":
        triton = make_kernels(case.mesh.device, "torch", "triton")
        ours.append(_ours(case, config, triton, "moetrain, Triton"))
    if case.mesh.world_size == 1:
        ours.append(_ours(case, config, plain, "moetrain, torch grouped_mm"))
        if case.mesh.device.type == "cpu":
            theirs = [*theirs, products_alone(case, kernels.gemm_name)]
    else:
        per_copy = replace(config, dispatch=_dispatch(config, ALLTOALL))
        ours.append(_ours(case, per_copy, kernels, "moetrain, a copy for each expert"))
        ours.append(_ours(case, per_copy, plain, "a copy for each expert, torch grouped_mm"))
    return ours + theirs, missing


def _dispatch(config: Config, target: str) -> dict[str, Any]:
    """The dispatcher ``target`` with what the configured one has of its settings."""
    shared = ("payload", "chunks", *(["ranks_per_node"] if target == HIERARCHICAL else []))
    return {"_target_": target, **{key: config.dispatch[key] for key in shared if key in config.dispatch}}


def _dispatchers(case: LayerCase, config: Config, kernels: Kernels) -> tuple[list[Contestant], list[str]]:
    limited = replace(config, capacity=replace(config.capacity, factor_train=1.25, factor_eval=1.25))
    choices = [
        ("dedup", DEDUP, config, ""),
        ("alltoall", ALLTOALL, config, ""),
        ("padded, capacity 1.25", PADDED, limited, "drops tokens"),
    ]
    if several := len(case.mesh.hops_by_node(ranks_of_node(config.dispatch.get("ranks_per_node")))) > 1:
        choices.insert(1, ("hierarchical", HIERARCHICAL, config, ""))
    field = [
        _ours(case, replace(given, dispatch=_dispatch(config, target)), kernels, name, note, echo=True)
        for name, target, given, note in choices
    ]
    return field, [] if several else ["hierarchical: on one node, or on nodes of one rank, it is dedup"]


class _Echo(nn.Module):
    def forward(self, sent: Dispatched) -> Tensor:
        return sent.x_CD * (1.0 if sent.weight_CK is None else sent.weight_CK.sum(1, keepdim=True).to(sent.x_CD))


def layer_case(config: Config, mesh: Mesh, routing: Routing) -> LayerCase:
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
    layer = our_layer(case, config, kernels)
    if echo:
        layer.experts = _Echo()
    return our_contestant(layer, case, name, note)


def our_layer(case: LayerCase, config: Config, kernels: Kernels) -> MoELayer:
    """With the weights of ``case``."""
    layer = MoELayer(config, case.mesh, Timeline(case.mesh.device, enabled=False), kernels, 2, 0)
    layer = layer.to(case.x_TD.dtype)
    with torch.no_grad():
        layer.router.get_parameter("gate").copy_(case.gate_ED)
        layer.experts.get_parameter("gate_up").copy_(case.gate_up_eFD)
        layer.experts.get_parameter("down").copy_(case.down_eDF)
    return layer


def our_contestant(layer: MoELayer, case: LayerCase, name: str, note: str = "") -> Contestant:
    """The layer on the tokens of ``case``."""
    tokens_BS = torch.zeros(1, case.x_TD.shape[0], dtype=torch.int64, device=case.x_TD.device)

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        out = layer(x_TD, tokens_BS, Replay())
        return out.hidden_TD, out.losses.balance

    return case.contestant(name, layer, run, note)


def _check(contestants: Sequence[Contestant], case: LayerCase, tolerance: float) -> None:
    """Who drops nothing gives what ours gives, within ``tolerance`` of the largest entry."""
    dtype = case.x_TD.dtype
    reference_TD = _output(contestants[0])
    limit = tolerance * float(reference_TD.abs().max())
    for one in contestants[1:]:
        error_T = (_output(one) - reference_TD).abs().amax(1)
        others = int((error_T > limit).sum())
        told = f"{one.name} differs from ours in {others} tokens, by {float(error_T.max()):.3g}, of {limit:.3g} allowed"
        assert one.note or others <= OTHER_CHOICE[dtype] * len(error_T), told


def _output(one: Contestant) -> Tensor:
    out_TD = one.step().float()
    one.clear()
    return out_TD


def facts_of(config: Config, mesh: Mesh, gemm: str) -> dict[str, Any]:
    return {
        "experts": config.experts.num_experts,
        "top_k": int(traits_of(config).experts_per_token),
        "dim": config.model.dim,
        "expert_dim": config.model.expert_dim,
        "tokens": config.train.micro_batch * config.model.context,
        "dtype": str(weight_dtype(config.engine, mesh.device)).removeprefix("torch."),
        "ranks": mesh.world_size,
        "threads": torch.get_num_threads(),
        "machine": processor(),
        "cores": os.cpu_count(),
        "device": "cpu" if mesh.device.type == "cpu" else torch.cuda.get_device_name(mesh.device),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "gemm": gemm,
        "allocator": name_of_allocator(),
        "at": datetime.now().isoformat(timespec="seconds"),
    }


def _text(results: Sequence[Result], missing: Sequence[str]) -> str:
    """A table: how many times as long as ours each took, by medians; then milliseconds."""
    first, case = results[0], results[0].case
    lines = [
        f"{case['dtype']}, {case['experts']} experts, k = {case['top_k']}, D = {case['dim']}, F = {case['expert_dim']},"
        f" {case['tokens']} tokens a rank, {case['ranks']} ranks x {case['threads']} threads, {first.routing} routing",
        f"{case['machine']}, {case['cores']} cores, {case['device']}, load {case['load']:.1f}, torch {case['torch']},"
        f" products by {case['gemm']}, malloc {case['allocator']}",
        f"{'':40} {'CPU':>7} {'wall':>7}   CPU ms: median, least   wall ms: median, least",
    ]
    for one in results:
        ours, own = ({kind: median_and_least(r.samples, kind) for kind in ("cpu", "wall")} for r in (first, one))
        ratios = " ".join(f"{own[kind][0] / ours[kind][0]:6.2f}x" for kind in ("cpu", "wall"))
        times = "".join(f"{1e3 * own[kind][0]:14.1f} {1e3 * own[kind][1]:7.1f}  " for kind in ("cpu", "wall"))
        sent = f"{one.sent / 2**20:8.1f} MiB sent" if one.sent else ""
        sent += f", {one.crossing / 2**20:.1f} of them to other nodes" if one.crossing else ""
        lines.append(f"{one.name:40} {ratios} {times} {sent} {one.note}")
    return "\n".join([*lines, *(f"not here: {reason}" for reason in missing)]) + "\n"
