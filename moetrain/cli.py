"""The ``moetrain`` command: sub-commands that need a configuration take the same Hydra overrides."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from moetrain.arguments import Parser, asked_world, environment_world
from moetrain.checks import world_of
from moetrain.compose import RECIPE, compose, compose_with_about, options, resolved_yaml
from moetrain.problems import report
from moetrain.redaction import redact
from moetrain.run_commands import COMMANDS
from moetrain.types import ConfigError, Problem

MISTAKE = 2
SILENCE_S = 5.0

HELP = """\
moetrain: distributed expert-parallel training of Mixture-of-Experts language models.

usage: moetrain COMMAND [key=value | group=option ...] [--config-dir DIR]
       moetrain COMMAND RUN

  train          train; start it with torchrun, one process a rank
  check          say what is wrong with a configuration, or print it resolved, with what follows from it
  preflight      everything about a world that can be found wrong before its first step; start it with torchrun
  plan           sizes, memory and traffic of a configuration, and a dry run of its world in one process
  data prepare   tokenise the corpus of a configuration into flat bins
  bench ACTION   time layer, ep, dispatch, step against other libraries; metrics: what counting costs
  bench metrics  what counting and logging cost, as a share of a step; start it with torchrun
  recipes        the recipes that can be chosen with recipe=NAME
  routers        the routers that can be chosen with router=NAME: paper, traits, what each was measured against
  routers compare
                 train some of them at equal budget and seeds, and write one report
  report RUN     a run as one HTML file; --compare RUN2 shows two beside each other
  inspect RUN    where tokens go: --text, --corpus, and --walk, which shows the routing step by step without any run
  doctor RUN     what is wrong with the routers of a run, by which numbers, and what to do
  top RUN        the expert load of a run in the terminal, while it trains
  wandb-setup    publish a view of the balance in a wandb project

moetrain COMMAND --help says more. For example:

  moetrain check recipe=quickstart model=small experts=e64 router.top_k=8 --world 8
  torchrun --nproc-per-node 2 -m moetrain train recipe=quickstart
  moetrain routers compare recipe=router_comparison router=mixtral,deepseek_v3 --seeds 3
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for a mistake in what was typed, told once a host."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except ConfigError as error:
        _tell_once(report(error.problems))
        return MISTAKE


def _tell_once(text: str) -> None:
    """One rank a host speaks: it may be wrong there only. torchrun kills all ranks as soon as one has left, so the
    others give it time to.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(redact(text), file=sys.stderr, flush=True)
    else:
        time.sleep(SILENCE_S)


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command == "train":
        return _train(rest)
    if command == "preflight":
        return _preflight(rest)
    if command == "check":
        return _check(rest)
    if command == "plan":
        return _plan(rest)
    if command == "data":
        return _data(rest)
    if command == "bench":
        from moetrain.bench.command import bench

        return bench(rest)
    if command == "recipes":
        return _recipes(rest)
    if command == "routers":
        from moetrain.survey.command import routers

        return routers(rest)
    if command in COMMANDS:
        return COMMANDS[command](rest)
    if command in ("--help", "-h"):
        print(HELP, end="")
        return 0
    raise ConfigError([Problem("command", command, "moetrain has no such command", "see moetrain --help")])


def _train(arguments: list[str]) -> int:
    parsed = Parser("train", "Train. The number of ranks is torchrun's.").parse_intermixed_args(arguments)
    composed = compose_with_about(parsed.overrides, environment_world() or 1, parsed.config_dir)
    from moetrain.router_report import published_notes
    from moetrain.train import main as train_main

    if os.environ.get("RANK", "0") == "0":
        for note in published_notes(composed, parsed.config_dir):
            print(f"moetrain: {note}", file=sys.stderr, flush=True)
    return train_main(composed.config)


def _preflight(arguments: list[str]) -> int:
    description = (
        "Check the world that a run would have, as every run does before its first step. Exits with 1 if it fails."
    )
    parsed = Parser("preflight", description).parse_intermixed_args(arguments)
    config = compose(parsed.overrides, environment_world() or 1, parsed.config_dir)
    from rich.console import Console

    from moetrain.preflight.command import main as preflight_main

    return preflight_main(config, Console())


def _check(arguments: list[str]) -> int:
    description = "Check a configuration and print it resolved, with what follows from it. Starts no process group."
    parsed = Parser("check", description, world=True).parse_intermixed_args(arguments)
    world_size = asked_world(parsed.world)
    composed = compose_with_about(parsed.overrides, world_size, parsed.config_dir)
    from moetrain.plan import describe, make_plan
    from moetrain.router_report import router_report

    config = composed.config
    world = world_of(config, world_size)
    follows = [describe(make_plan(config, world)), router_report(composed, world, parsed.config_dir)]
    print(resolved_yaml(config))
    print("\n".join(f"# {line}" for text in follows for line in text.splitlines()))
    return 0


def _plan(arguments: list[str]) -> int:
    description = "Sizes, memory and traffic of a configuration, then a dry run of its rank 0 on the meta device."
    parsed = Parser("plan", description, world=True).parse_intermixed_args(arguments)
    world_size = asked_world(parsed.world)
    config = compose(parsed.overrides, world_size, parsed.config_dir)
    from moetrain.plan import main_report

    print(main_report(config, world_of(config, world_size)))
    return 0


def _data(arguments: list[str]) -> int:
    action, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if action in ("--help", "-h"):
        action, rest = "prepare", ["--help"]
    if action != "prepare":
        fix = "moetrain data prepare data=text data.path=FOLDER"
        raise ConfigError([Problem("command", f"data {action}", "moetrain data has no such action", fix)])
    description = "Tokenise the corpus of a configuration (data=... data.path=...) into flat bins in data.cache."
    parsed = Parser("data prepare", description).parse_intermixed_args(rest)
    config = compose(parsed.overrides, None, parsed.config_dir)
    from moetrain.data import prepare

    corpus = prepare(config.data, context=config.model.context, vocab_size=config.model.vocab_size)
    print(corpus.summary())
    return 0


def _recipes(arguments: list[str]) -> int:
    parsed = Parser("recipes", "List the recipes.", overrides=False).parse_intermixed_args(arguments)
    for name in options(RECIPE, parsed.config_dir):
        config = compose([f"recipe={name}"], None, parsed.config_dir)
        sizes = f"{config.experts.num_experts} experts, {config.model.num_layers} layers of {config.model.dim}"
        print(f"{name}: {sizes}, {config.recipe.world} ranks\n    {config.recipe.about}")
    return 0
