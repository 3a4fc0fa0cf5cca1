"""``moetrain bench``: what is timed, and over which shapes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from moetrain.arguments import Parser, environment_world
from moetrain.bench.allocator import ALLOCATORS, VARIABLE, in_turn
from moetrain.bench.layer import bench_layer, write_results
from moetrain.bench.metrics import metrics_bench
from moetrain.bench.overlap import bench_overlap
from moetrain.bench.picture import draw, read_results
from moetrain.bench.routing import ROUTINGS
from moetrain.bench.skew import bench_skew
from moetrain.bench.step import step_bench
from moetrain.checks import ep_size_of
from moetrain.compose import compose
from moetrain.config import Config
from moetrain.parallel.mesh import Mesh, close_mesh, init_mesh
from moetrain.types import ConfigError, Problem

ABOUT = {
    "layer": "Time one MoE layer, forward and backward, against other libraries' on one process. Commas list shapes:"
    " experts=e16,e64 router.top_k=2,8.",
    "ep": "The same with experts sharded over ranks, and the bytes sent. Start it with torchrun; GLIBC_TUNABLES in its"
    " environment decides how malloc keeps memory.",
    "dispatch": "Time our dispatchers by themselves, with experts that compute nothing. Start it with torchrun.",
    "overlap": "How much of the exchange hides behind experts that sleep. Start it with torchrun.",
    "skew": "Time one MoE layer whose first rank is hot, with shadows and without, against balanced routing. Start it"
    " with torchrun.",
    "step": "Time a training step against Hugging Face's Mixtral, interleaved. Start it with torchrun.",
    "picture": "Draw what layer, ep, dispatch and skew have written with --out: a bar for each contestant, ours = 1.",
    "metrics": "CPU time of loading data, counting, summing up and writing, against a step's. Start it with torchrun.",
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
    if action == "overlap":
        return _overlap(rest)
    if action == "skew":
        return _skew(rest)
    if action == "picture":
        return _picture(rest)
    parser = Parser(f"bench {action}", ABOUT[action])
    if action == "step":
        _add_rounds(parser)
        parser.add_argument(
            "--alone", action="store_true", help="without the peer, which holds every expert on every rank"
        )
    parsed = parser.parse_intermixed_args(rest)
    config = compose(parsed.overrides, environment_world() or 1, parsed.config_dir)
    text = step_bench(config, parsed.rounds, parsed.alone) if action == "step" else metrics_bench(config)
    if text is not None:
        print(text)
    return 0


def _add_rounds(parser: Parser) -> None:
    text = "samples of each contestant (default: 7)"
    parser.add_argument("--rounds", type=_at_least_one, default=7, metavar="N", help=text)


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is fewer than 1")
    return number


def _layer(action: str, arguments: list[str]) -> int:
    parser = Parser(f"bench {action}", ABOUT[action])
    _add_rounds(parser)
    parser.add_argument("--routing", nargs="*", choices=ROUTINGS, default=list(ROUTINGS), help="default: all of them")
    parser.add_argument(
        "--against", nargs="*", default=[""], metavar="NAME", help="parts of names (default: everybody)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line for each contestant and routing")
    text = "malloc as this process has it (default), as the launch scripts set it, or as it comes and then so set"
    parser.add_argument("--allocator", choices=ALLOCATORS, default="given", help=f"{text}; on one process")
    parsed = parser.parse_intermixed_args(arguments)
    world_size = environment_world() or 1
    if world_size > 1 and parsed.allocator != "given":
        fix = f"set {VARIABLE} in the environment of torchrun"
        raise ConfigError([Problem("--allocator", parsed.allocator, "is for one process", fix)])
    if (world_size == 1) != (action == "layer"):
        fix = "torchrun --nproc-per-node 2 -m moetrain bench ep" if world_size == 1 else "moetrain bench layer"
        raise ConfigError([Problem("command", f"bench {action}", f"does not run on {world_size} ranks", fix)])
    configs = layer_configs(parsed.overrides, world_size, parsed.config_dir)
    if parsed.allocator != "given":
        return in_turn(parsed.allocator, _again(action, parsed))
    mesh = init_mesh(ep_size_of(configs[0], world_size), configs[0].machine)
    try:
        chosen, exchange_only = (parsed.rounds, parsed.routing, parsed.against), action == "dispatch"
        results = bench_layer(configs, mesh, *chosen, exchange_only=exchange_only)
        if parsed.out is not None and mesh.is_main:
            write_results(results, parsed.out)
    finally:
        close_mesh()
    return 0


def _overlap(arguments: list[str]) -> int:
    parser = Parser("bench overlap", ABOUT["overlap"])
    _add_rounds(parser)
    parsed = parser.parse_intermixed_args(arguments)
    with _on_ranks("overlap", 2, "one rank exchanges nothing", parsed) as (config, mesh):
        if (text := bench_overlap(config, mesh, parsed.rounds)) is not None:
            print(text)
    return 0


def _skew(arguments: list[str]) -> int:
    parser = Parser("bench skew", ABOUT["skew"])
    _add_rounds(parser)
    parser.add_argument("--times", type=float, default=4.0, help="what the first rank gets over its share (default: 4)")
    parser.add_argument("--hot", type=int, metavar="N", help="on so many of its experts (default: on all of them)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line for each contestant")
    parsed = parser.parse_intermixed_args(arguments)
    with _on_ranks("skew", 4, "one rank holds all experts: none can be hotter", parsed) as (config, mesh):
        results = bench_skew(config, mesh, parsed.rounds, parsed.times, parsed.hot)
        if parsed.out is not None and mesh.is_main:
            write_results(results, parsed.out)
    return 0


@contextmanager
def _on_ranks(action: str, ranks: int, reason: str, parsed: argparse.Namespace) -> Iterator[tuple[Config, Mesh]]:
    """One shape, on more ranks than one, of which ``ranks`` is an example; ``reason``: why one is not enough."""
    command, world_size = f"bench {action}", environment_world() or 1
    if world_size == 1:
        raise ConfigError(
            [Problem("command", command, reason, f"torchrun --nproc-per-node {ranks} -m moetrain {command}")]
        )
    config, *others = layer_configs(parsed.overrides, world_size, parsed.config_dir)
    if others:
        raise ConfigError([Problem("command", command, "times one shape at a time", "name one value for each key")])
    mesh = init_mesh(ep_size_of(config, world_size), config.machine)
    try:
        yield config, mesh
    finally:
        close_mesh()


def _again(action: str, parsed: argparse.Namespace) -> list[str]:
    """The command without ``--allocator``."""
    options = [("--out", parsed.out), ("--config-dir", parsed.config_dir), ("--rounds", parsed.rounds)]
    given = [word for name, value in options if value is not None for word in (name, str(value))]
    lists = ["--routing", *parsed.routing, "--against", *parsed.against]
    return ["bench", action, *given, *lists, "--", *parsed.overrides]


def _picture(arguments: list[str]) -> int:
    parser = Parser("bench picture", ABOUT["picture"], overrides=False)
    parser.add_argument("results", type=Path, metavar="FILE.jsonl", help="what --out has written")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture (or .svg, .pdf)")
    parsed = parser.parse_args(arguments)
    draw(read_results(parsed.results), parsed.out)
    return 0
