"""What a hot rank costs a layer, and what shadows make of it: forward and backward under even and under skewed routing,
interleaved, beside what the cost model says of the three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moetrain.bench.layer import Result, facts_of, layer_case, our_contestant, our_layer
from moetrain.bench.peers.case import LayerCase
from moetrain.bench.race import Contestant, bytes_sent, median_and_least, most_of, race
from moetrain.bench.routing import Routing, gate_of, skewed_tokens
from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.control.cost import Cost, Load, Rates, cheapest, cost, load_of
from moetrain.control.rates import measure_rates
from moetrain.moe.layer import MoELayer
from moetrain.parallel.collectives import sum_over
from moetrain.parallel.mesh import Mesh
from moetrain.resume import choose_kernels
from moetrain.types import ConfigError, Problem

MIB = 2**20
ROUTING: dict[bool, Routing] = {True: "balanced", False: "skewed"}


@dataclass(frozen=True)
class Runner:
    """One of the three. rows: of the busiest rank, over the mean."""

    contestant: Contestant
    routing: Routing
    hot: tuple[int, ...]
    rows: float
    cost: Cost


def bench_skew(config: Config, mesh: Mesh, rounds: int, times: float, num_hot: int | None) -> list[Result]:
    """``times``: the share of all assignments that the first rank gets, over the fair one (at most all of them), spread
    evenly over its first ``num_hot`` experts (None: over all of them).
    """
    even = layer_case(config, mesh, "balanced")
    skewed = replace(even, x_TD=_skewed(config, mesh, min(times / mesh.ep_size, 1.0), num_hot).to(even.x_TD))
    kernels = choose_kernels(config, mesh, None)
    runners: list[Runner] = []
    rates: Rates | None = None
    for name, case, shadowed in (("balanced", even, False), ("skewed", skewed, False), ("shadowed", skewed, True)):
        layer = our_layer(case, config, kernels)
        contestant = our_contestant(layer, case, name)
        rates = rates or measure_rates(config, layer, mesh)
        load = _load(layer, contestant, config, mesh)
        hot = cheapest(load, config.control.shadow_max, rates) if shadowed else ()
        layer.shadows.put(hot)
        found, routing = cost(load, hot, rates), ROUTING[case is even]
        busiest = float(found.rows / load.rows_E.sum() * mesh.ep_size)
        runners.append(Runner(contestant, routing, hot, busiest, found))
    _check(runners, even)
    sent = {one.contestant.name: int(most_of(bytes_sent(one.contestant, mesh), mesh)) for one in runners}
    samples = race([one.contestant for one in runners], mesh, rounds)
    facts = {"timed": "skew", **facts_of(config, mesh, kernels.gemm_name)}
    results = []
    for one in runners:
        name, own = one.contestant.name, {"hot": list(one.hot), "busiest": one.rows, "model_seconds": one.cost.seconds}
        results.append(Result(facts | own, one.routing, name, "", samples[name], sent[name]))
    if mesh.is_main and rates is not None:
        print(_text(results, runners, rates, even), flush=True)
    return results


def _skewed(config: Config, mesh: Mesh, share: float, num_hot: int | None) -> torch.Tensor:
    num_experts, top_k = config.experts.num_experts, int(traits_of(config).experts_per_token)
    num_tokens, seed = config.train.micro_batch * config.model.context, config.run.seed
    gate_ED, num_local = gate_of(num_experts, config.model.dim, seed), num_experts // mesh.ep_size
    hot = {"num_local": num_local, "num_hot": num_hot or num_local}
    if not top_k <= hot["num_hot"] <= num_local:
        reason = f"a token has {top_k} experts, and the first rank {num_local}"
        raise ConfigError([Problem("--hot", hot["num_hot"], reason, f"choose --hot {num_local}")])
    return skewed_tokens(gate_ED, num_tokens, top_k, seed + 1 + mesh.rank, share=share, **hot)


def _load(layer: MoELayer, contestant: Contestant, config: Config, mesh: Mesh) -> Load:
    """What all ranks' tokens have chosen. Collective."""
    contestant.clear()
    contestant.step()
    layer.load.commit()
    kept_E = sum_over(layer.load.take()[1], mesh.ep_group).cpu().numpy().astype(float)
    return load_of(config, kept_E)


def _check(runners: list[Runner], case: LayerCase) -> None:
    """Shadows change nothing."""
    without_TD, with_TD = (one.contestant.step().float() for one in runners[1:])
    limit = (1e-4 if case.x_TD.dtype == torch.float32 else 4e-2) * float(without_TD.abs().max())
    assert float((with_TD - without_TD).abs().max()) <= limit, "a layer with shadows gives something else"


def _text(results: list[Result], runners: list[Runner], rates: Rates, case: LayerCase) -> str:
    facts = results[0].case
    expert = sum(stack[0].nbytes for stack in (case.gate_up_eFD, case.down_eDF))
    lines = [
        f"{facts['dtype']}, {facts['experts']} experts, k = {facts['top_k']}, D = {facts['dim']}, F = "
        f"{facts['expert_dim']}, {facts['tokens']} tokens a rank, {facts['ranks']} ranks x {facts['threads']} threads",
        f"{facts['machine']}, {facts['cores']} cores, load {facts['load']:.1f}, malloc {facts['allocator']}",
        f"measured: {1e6 * rates.row:.2f} us a row, {1e6 * rates.copy:.2f} us a token sent, {1e3 * rates.loan:.2f} ms "
        f"for an expert lent ({expert / MIB:.1f} MiB there and back)",
        f"{'':10} {'busiest rank':>12} {'CPU':>7} {'wall':>7} {'model':>7}   CPU ms: median, least   wall ms: median,"
        " least   model ms   MiB of tokens sent by one rank",
    ]
    for result, one in zip(results, runners, strict=True):
        ours, own = ({k: median_and_least(r.samples, k) for k in ("cpu", "wall")} for r in (results[0], result))
        ratios = " ".join(f"{own[kind][0] / ours[kind][0]:6.2f}x" for kind in ("cpu", "wall"))
        times = "".join(f"{1e3 * own[kind][0]:14.1f} {1e3 * own[kind][1]:7.1f}  " for kind in ("cpu", "wall"))
        model = f"{one.cost.seconds / runners[0].cost.seconds:6.2f}x"
        lent = f"  experts {', '.join(map(str, one.hot))} are lent" if one.hot else ""
        lines.append(
            f"{one.contestant.name:10} {one.rows:11.2f}x {ratios} {model} {times} {1e3 * one.cost.seconds:9.1f} "
            f"{result.sent / MIB:8.1f}{lent}"
        )
    return "\n".join(lines) + "\n"
