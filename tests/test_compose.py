"""What a user types gives exactly that config, or every mistake in it; and all that ships composes."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from omegaconf import OmegaConf

from moetrain import cli
from moetrain.checks import CONTEXT
from moetrain.compose import compose, conf_folder, options, resolved_yaml
from moetrain.config import Config
from moetrain.types import ConfigError, Problem

ROOT = Path(__file__).parents[1]
GROUPS = [field.name for field in dataclasses.fields(Config) if options(field.name)]
ANY_ROUTER = "experts.allow_noncausal=true"  # the routers that look ahead are refused without it
# A path that a source needs, and what else an option needs of the machine.
NEEDS = {
    **{f"data={name}": f"data.path={Path(__file__).parent}" for name in ("text", "jsonl", "parquet", "bins")},
    "data=hub": "data.path=owner/name",
    "capacity=dropless": "dispatch=alltoall",
    "capacity=global": "dispatch=alltoall",
    "control=bias_decay": "router=moonlight",
    "control=shadow": "run.elastic=true dispatch=dedup",
    "debug=collapsed_router": "router.logit_bias=true",
    **{f"router={name}": ANY_ROUTER for name in options("router")},
}


def problems_of(*overrides: str, world: int = 2, config_dir: str | None = None) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, world, config_dir)
    return list(caught.value.problems)


def test_the_groups_are_those_that_are_swapped() -> None:
    swapped = (
        "model experts router capacity dispatch balance control engine optim data monitor health machine debug recipe"
    )
    assert swapped.split() == GROUPS


@pytest.mark.parametrize("recipe", options("recipe"))
def test_every_recipe_composes_at_its_own_world(recipe: str) -> None:
    config = compose([f"recipe={recipe}"])
    assert config.recipe.name == recipe
    assert config.recipe.about
    assert config.recipe.source
    assert f"`{recipe}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("experts", options("experts"))
def test_every_model_takes_every_number_of_experts(experts: str) -> None:
    for model in options("model"):
        config = compose([f"model={model}", f"experts={experts}"], 2)
        assert config.experts.num_experts == int(experts.removeprefix("e"))


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "recipe"])
def test_every_option_composes_and_spells_out_every_key(group: str) -> None:
    for option in options(group):
        choice = f"{group}={option}"
        compose([choice, *NEEDS.get(choice, "").split()], 1)
        written = OmegaConf.load(conf_folder() / group / f"{option}.yaml")
        section = written.get(group, written)
        if group not in CONTEXT:
            assert set(section) == set(get_type_hints(Config)[group].__dataclass_fields__), choice


def test_every_file_starts_with_a_comment() -> None:
    for path in [*conf_folder().rglob("*.yaml"), *(ROOT / "recipes").glob("*.yaml")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = next(line for line in lines if not line.startswith("# @package"))
        assert re.match(r"# \S.*[.:]$", comment), path


def test_what_is_typed_is_what_comes() -> None:
    config = compose(["recipe=quickstart", "model=small", "experts=e64", "router.top_k=8"], 2)
    bare = compose(["model=small", "experts=e64"], 2)
    recipe = compose(["recipe=quickstart"], 2)
    assert (config.model, config.experts) == (bare.model, bare.experts)
    assert config.experts.num_experts == 64
    assert config.router == {**recipe.router, "top_k": 8}
    assert config == dataclasses.replace(recipe, model=bare.model, experts=bare.experts, router=config.router)


def test_a_group_choice_drops_the_recipes_values_of_that_section_only() -> None:
    recipe = compose(["recipe=olmoe_1b_7b"], 8)
    assert (recipe.router["top_k"], recipe.engine.ep_size) == (8, 8)
    assert recipe.router == {**compose(["router=olmoe"], 2).router, "top_k": 8}
    config = compose(["engine.dtype=bf16", "router=topk", "recipe=olmoe_1b_7b", "engine=local"], 8)
    assert config.router == compose(["router=topk"], 2).router
    assert config.engine == dataclasses.replace(compose(["engine=local"], 2).engine, dtype="bf16")
    assert (config.optim, config.train) == (recipe.optim, recipe.train)


def test_debug_goes_over_the_recipe_and_values_over_debug() -> None:
    config = compose(["recipe=quickstart", "debug=one_step"], 2)
    assert (config.train.steps, config.train.checkpoint_every, config.optim.warmup_steps) == (1, 0, 0)
    assert compose(["train.steps=3", "recipe=quickstart", "debug=one_step"], 2).train.steps == 3
    assert compose(["recipe=olmoe_1b_7b", "debug=fake_world"], 2).debug.fake_world == 256


def test_a_plus_is_no_hole() -> None:
    for plus in ("", "+", "++"):
        (problem,) = problems_of(f"{plus}router.topk=3")
        assert (problem.field, problem.value, problem.fix) == ("router.topk", 3, "write router.top_k=3")
        (problem,) = problems_of(f"{plus}moddel.dim=3")
        assert (problem.field, problem.fix) == ("moddel.dim", "write model.dim=3")
    assert compose(["+recipe=quickstart", "++router.top_k=1", "+router.weights=scores"], 2).router["top_k"] == 1


MISTAKES = [
    (["model=smal"], "model", "no such option", "nearest is model=small"),
    (["recipe=olmoe"], "recipe", "no such option", "quickstart"),
    (["experts=64"], "experts", "no such option", "nearest is experts=e64"),
    (["modell=small"], "modell", "no section 'modell'", "write model=small"),
    (["model=null"], "model", "no such option", "small"),
    (["router=mixtral,topk"], "router", "a sweep", "moetrain routers compare router=mixtral,topk"),
    (["model=nano,small"], "model", "a sweep", "choose one, model=nano"),
    (["router=mixtrl"], "router", "no such option", "nearest is router=mixtral"),
    (["router=zzz"], "router", "no such option", "moetrain routers lists them all"),
    (["router=mixture_of_depths"], "router", "no such option", "model.depth_every=2"),
    (["router=MoD"], "router", "no such option", "model.depth_every=2"),
    (["router=soft_moe"], "router", "no such option", "mixtures of all tokens"),
    (["router={top_k: 3}"], "router", "no such option", "topk"),
    (["train=3"], "train", "is a section", "train.steps"),
    (["train.steps"], "train.steps", "no '='", "key=value"),
    (["train.steps=[1"], "train.steps", "grammar", "quote"),
    (["optim.lr=1e-3,1e-4"], "optim.lr", "a sweep", "[1e-3,1e-4]"),
    (["hydra.run.dir=here"], "hydra.run.dir", "no hydra.* settings", "run.root"),
    (["~router.nothing"], "router.nothing", "nothing", "leave it out"),
    (["run.root=${no.such}"], "run.root", "'no.such' not found", "correct"),
    (["router.top_k=9"], "router.top_k", "of 8", "experts.num_experts=9"),
    (["engine.ep_size=3"], "engine.ep_size", "2 ranks", "1 | 2"),
    (["experts.num_experts=7", "engine.ep_size=2"], "engine.ep_size", "experts.num_experts = 7", "1"),
    (["train.global_batch=17"], "train.global_batch", "multiple of 16", "16 or 32"),
    (["model.dim=wide"], "model.dim", "whole number", "model.dim"),
]


@pytest.mark.parametrize(("overrides", "field", "reason", "fix"), MISTAKES)
def test_a_mistake_is_one_problem(overrides: list[str], field: str, reason: str, fix: str) -> None:
    (problem,) = problems_of(*overrides)
    assert problem.field == field
    assert reason in problem.reason
    assert fix in problem.fix


def test_all_mistakes_come_at_once_whatever_their_kind() -> None:
    found = problems_of(
        "model=smal", "+router.topk=3", "router.top_k=9", "~optim.nothing", "train.steps=x", "run.id", "a=1,2"
    )
    fields = ["model", "run.id", "a", "optim.nothing", "train.steps", "router.topk", "router.top_k"]
    assert [problem.field for problem in found] == fields


def test_nothing_is_guessed_of_a_section_whose_choice_failed() -> None:
    (problem,) = problems_of("experts=e640", "router.top_k=9")
    assert problem.field == "experts"
    found = problems_of("recipe=olmo", "router.top_k=9", "train.stepz=3", "balance=none")
    assert [problem.field for problem in found] == ["recipe", "train.stepz"]


def write(folder: Path, **texts: str) -> str:
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(folder)


def test_options_and_recipes_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "it's mine, [all]"
    folder.mkdir()
    recipe = "# @package _global_\ndefaults:\n  - override /experts: e12\ntrain:\n  steps: 77\n"
    config_dir = write(folder, experts__e12="num_experts: 12\n", recipe__mine=recipe)
    config = compose(["recipe=mine"], 2, config_dir)
    assert (config.experts.num_experts, config.train.steps) == (12, 77)
    assert compose(["experts=e12"], 2, config_dir).experts.num_experts == 12


def test_mistakes_in_files_of_ones_own(tmp_path: Path) -> None:
    config_dir = write(
        tmp_path,
        optim__typo="lr: 1e-3\nwarmup: 3\n",
        recipe__broken="# @package _global_\ntrain: [\n",
        recipe__lost="# @package _global_\ndefaults:\n  - override /model: tiny\n",
    )
    (problem,) = problems_of("optim=typo", config_dir=config_dir)
    assert (problem.field, problem.fix) == ("optim.warmup", "write optim.warmup_steps=3")
    for name in ("broken", "lost"):
        assert [problem.field for problem in problems_of(f"recipe={name}", config_dir=config_dir)] == ["recipe"]
    write(tmp_path, model__small="dim: 3\n")
    (problem,) = problems_of(config_dir=config_dir)
    assert (problem.field, problem.value) == ("--config-dir", "model/small.yaml")
    (problem,) = problems_of(config_dir=str(tmp_path / "none"))
    assert problem.reason == "is no folder"


def test_resolved_yaml_composes_to_itself(tmp_path: Path) -> None:
    config = compose(["recipe=qwen3_30b_a3b"], 8)
    parts = "defaults:\n  - override /router: null\n  - override /dispatch: null\n"
    again = "# @package _global_\n" + parts + resolved_yaml(config)
    assert compose(["recipe=again"], 8, write(tmp_path, recipe__again=again)) == config


def test_mistakes_are_told_once_by_rank_0(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for rank in ("0", "1", None):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False) if rank is None else monkeypatch.setenv(name, rank)
        assert cli.main(["check", "router.topk=3", "--world", "2"]) == 2
        told.append(capsys.readouterr())
    assert [text.out for text in told] == ["", "", ""]
    assert told[0].err.startswith("moetrain: 1 problem in the configuration\n\n  router.topk = 3\n")
    assert [text.err for text in told[1:]] == ["", told[0].err]


@pytest.mark.parametrize("arguments", [["chek"], ["check", "--wold", "3"], ["data", "eat"], ["check", "--world", "0"]])
def test_a_wrong_command_is_a_mistake_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("moetrain: 1 problem")


def test_check_takes_the_world_from_its_option_the_environment_or_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["check", "--world", "3", "recipe=quickstart"]) == 2
    assert "3 ranks" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert cli.main(["check", "recipe=quickstart"]) == 2
    assert "5 ranks" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert cli.main(["check", "recipe=quickstart", "engine.ep_size=3"]) == 2
    assert "2 ranks" in capsys.readouterr().err


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in options("recipe"))


def test_names_count_upwards() -> None:
    assert options("experts") == [f"e{2**n}" for n in range(2, 8)]


def test_pairs_of_choices_do_not_disturb_each_other() -> None:
    for router, capacity in zip(options("router")[::4], itertools.cycle(options("capacity"))):
        choices = [f"router={router}", f"capacity={capacity}", "dispatch=alltoall", ANY_ROUTER]
        config = compose(["recipe=nano_moe", *choices], 8)
        bare = compose(choices, 2)
        assert (config.router, config.capacity) == (bare.router, bare.capacity)
