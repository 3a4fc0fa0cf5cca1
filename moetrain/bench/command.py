"""``moetrain bench``: what is timed, and over which shapes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from moetrain.arguments import Parser, environment_world
from moetrain.bench.layer import bench_layer, write_results
from moetrain.bench.metrics import metrics_bench
from moetrain.bench.routing import ROUTINGS
from moetrain.bench.step import step_bench
from moetrain.checks import ep_size_of
from moetrain.compose import compose
from moetrain.config import Config
from moetrain.parallel.mesh import close_mesh, init_mesh
from moetrain.types import ConfigError, Problem

ABOUT = {
    "layer": "Time one MoE layer, forward and backward, against other libraries' on one process. Commas list shapes:"
    " experts=e16,e64 router.top_k=2,8.",
    "ep": "The same with experts sharded over ranks, and the bytes sent. Start it with torchrun.",
    "dispatch": "Time our dispatchers by themselves, with experts that compute nothing. Start it with torchrun.",
    "step": "Time a training step against Hugging Face's Mixtral, interleaved. Start it with torchrun.",
    "metrics": "CPU time of all that counts, sums up and writes, as a share of a step. Start it with torchrun.",
}
LAYER = {
    "model": "nano",
    "model.dim": "512",
    "model.expert_dim": "1024",
    "model.context": "2048",
    "experts": "e16",
    "router": "mixtral",
    "balance": "switch",
    "capacity": "dropless",
    "train.micro_batch": "2",
    "engine": "local",
    "engine.dtype": "fp32",
}
"""What the layer is where nothing is said: the shape of the field's comparisons, 4,096 tokens a process."""


def layer_configs(overrides: Sequence[str], world_size: int, config_dir: str | None) -> list[Config]:
    """One for each combination of what is listed with commas, ``experts=e16,e64 router.top_k=2,8``."""
    own = {word.partition("=")[0] for word in overrides}
    words = [f"{key}={value}" for key, value in LAYER.items() if key not in own]
    words.append(f"dispatch={'local' if world_size == 1 else 'dedup'}")
    choices = [_choices(word) for word in overrides]
    return [_compose([*words, *combination], world_size, config_dir) for combination in product(*choices)]


def _compose(words: list[str], world_size: int, config_dir: str | None) -> Config:
    """A batch is one micro-batch of each rank."""
    micro_batch = next(word.partition("=")[2] for word in reversed(words) if word.startswith("train.micro_batch="))
    batch = int(micro_batch) * world_size if micro_batch.isdecimal() else world_size
    return compose([*words, f"train.global_batch={batch}"], world_size, config_dir)


def _choices(word: str) -> list[str]:
    key, _, value = word.partition("=")
    return [word] if value.startswith("[") else [f"{key}={one}" for one in value.split(",")]


def bench(arguments: list[str]) -> int:
    """``bench ACTION ...`` on the world that torchrun started, or on one process. Returns the exit code."""
    action, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if action in ("--help", "-h"):
        print("\n".join(f"moetrain bench {name:8} {about}" for name, about in ABOUT.items()))
        return 0
    if action not in ABOUT:
        reason, fix = "moetrain bench has no such benchmark", f"choose of {', '.join(ABOUT)}"
        raise ConfigError([Problem("command", f"bench {action}", reason, fix)])
    if action in ("layer", "ep", "dispatch"):
        return _layer(action, rest)
    parsed = Parser(f"bench {action}", ABOUT[action]).parse_intermixed_args(rest)
    config = compose(parsed.overrides, environment_world() or 1, parsed.config_dir)
    text = step_bench(config) if action == "step" else metrics_bench(config)
    if text is not None:
        print(text)
    return 0


def _layer(action: str, arguments: list[str]) -> int:
    parser = Parser(f"bench {action}", ABOUT[action])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each contestant (default: 7)")
    parser.add_argument("--routing", nargs="*", choices=ROUTINGS, default=list(ROUTINGS), help="default: all of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line for each contestant and routing")
    parsed = parser.parse_intermixed_args(arguments)
    world_size = environment_world() or 1
    if (world_size == 1) != (action == "layer"):
        fix = "torchrun --nproc-per-node 2 -m moetrain bench ep" if world_size == 1 else "moetrain bench layer"
        raise ConfigError([Problem("command", f"bench {action}", f"does not run on {world_size} ranks", fix)])
    configs = layer_configs(parsed.overrides, world_size, parsed.config_dir)
    mesh = init_mesh(ep_size_of(configs[0], world_size), configs[0].machine)
    try:
        results = bench_layer(configs, mesh, parsed.rounds, parsed.routing, exchange_only=action == "dispatch")
        if parsed.out is not None and mesh.is_main:
            write_results(results, parsed.out)
    finally:
        close_mesh()
    return 0
