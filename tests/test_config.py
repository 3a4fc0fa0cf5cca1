"""Every mistake in a configuration is one clear problem, and all of them come together."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from moetrain.checks import ep_size_of, parse, world_of
from moetrain.problems import report
from moetrain.rules.layout import LOCAL, PADDED
from moetrain.types import ConfigError, Problem, RouterTraits
from tests.tiny import tiny


def raw(**changes: object) -> dict[str, Any]:
    """A right container (2 ranks' worth), changed: ``raw(model__dim=3)``."""
    container = copy.deepcopy(dataclasses.asdict(tiny()))
    for key, value in changes.items():
        section, name = key.split("__", 1)
        container[section][name] = value
    return container


def problems_of(container: dict[str, Any], world: int | None = 2) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse(container, world)
    return list(caught.value.problems)


def test_a_right_container_gives_the_same_config() -> None:
    assert parse(raw(), 2) == tiny()


FIELDS = [
    ("model", "dims", 8, "no key 'dims'", "write model.dim=8"),
    ("train", "zebra", 8, "no key 'zebra'", "the keys are train.steps, train.global_batch"),
    ("model", "dim", 0, "greater than 0", "model.dim"),
    ("model", "dim", "wide", "a whole number", "model.dim"),
    ("model", "dim", None, "a whole number", "model.dim"),
    ("model", "dim", 16.5, "a whole number", "model.dim"),
    ("train", "steps", 1000.0, "a whole number", "write train.steps=1000"),
    ("train", "steps", True, "a whole number", "train.steps"),
    ("train", "steps", [1], "a whole number", "train.steps"),
    ("optim", "lr", "fast", "a number", "optim.lr"),
    ("optim", "lr", float("nan"), "a number", "optim.lr"),
    ("optim", "lr", float("inf"), "a number", "optim.lr"),
    ("optim", "beta1", 1.0, "less than 1", "optim.beta1=0.9"),
    ("optim", "decay_fraction", 1.5, "at most 1", "optim.decay_fraction=0.2"),
    ("capacity", "factor_train", "big", "a number, or null", "capacity.factor_train=1.25"),
    ("engine", "recompute", 1, "true or false", "write engine.recompute=true"),
    ("engine", "zero_stage", 4, "none of the options", "0 | 1 | 2 | 3"),
    ("engine", "dtype", "fp16", "none of the options", "auto | fp32 | bf16; nearest is bf16"),
    ("run", "id", 7, "text, or null", "run.id='\"7\"'"),
    ("machine", "allow_modules", "mine", "a list", "machine.allow_modules=[a,b]"),
    ("router", "topk", 3, "no key 'topk'", "write router.top_k=3"),
    ("router", "top_k", "two", "a whole number", "router.top_k=2"),
    (
        "router",
        "noise",
        "jiter",
        "none of the options",
        "none | jitter | gaussian | learned | gumbel | warmup; nearest is jitter",
    ),
    ("router", "site", 5, "supplied by moetrain", "leave router.site out"),
    ("router", "_target_", "os.path.Path", "outside of moetrain", "machine.allow_modules=[os]"),
    ("router", "_target_", None, "dotted path of a class", "router=NAME"),
    ("dispatch", "slots", 3, "no key 'slots'", "the keys are dispatch.payload, dispatch.chunks"),
]


@pytest.mark.parametrize(("section", "key", "value", "reason", "fix"), FIELDS)
def test_a_wrong_field_is_one_problem(section: str, key: str, value: object, reason: str, fix: str) -> None:
    (problem,) = problems_of(raw(**{f"{section}__{key}": value}))
    assert problem.field == f"{section}.{key}"
    assert reason in problem.reason
    assert fix in problem.fix


RULES = [
    ({"router__top_k": 9}, "router.top_k", "of 8", "experts.num_experts=9"),
    ({"router__top_k": 0}, "router.top_k", "at least one", "router.top_k=1"),
    ({"router__top_k": 1}, "router.weights", "no gradient", "router.weights=scores"),
    ({"engine__ep_size": 3}, "engine.ep_size", "the 4 ranks of this world nor experts.num_experts = 8", "1 | 2 | 4"),
    ({"engine__ep_size": 8}, "engine.ep_size", "doesn't divide the 4 ranks", "1 | 2 | 4"),
    (
        {"engine__ep_size": 4, "experts__num_experts": 6},
        "engine.ep_size",
        "doesn't divide experts.num_experts = 6",
        "1 | 2",
    ),
    ({"train__global_batch": 12}, "train.global_batch", "multiple of 8", "8 or 16"),
    ({"train__global_batch": 4}, "train.global_batch", "multiple of 8", "global_batch=8"),
    (
        {"model__num_heads": 6, "model__num_kv_heads": 4},
        "model.num_kv_heads",
        "divide model.num_heads",
        "1 | 2 | 3 | 6",
    ),
    ({"model__head_dim": 7}, "model.head_dim", "even", "model.head_dim=8"),
    ({"model__first_dense": 2}, "model.first_dense", "no MoE layer", "model.first_dense=1"),
    ({"optim__warmup_steps": 4}, "optim.warmup_steps", "train.steps = 3", "optim.warmup_steps=3"),
    ({"engine__zero_stage": 1}, "engine.zero_stage", "plain torch", "engine=deepspeed"),
    ({"dispatch__chunks": 0}, "dispatch.chunks", "one part at least", "dispatch.chunks=1"),
    ({"machine__experts_kernel": "triton"}, "machine.experts_kernel", "needs an accelerator", "experts_kernel=torch"),
    ({"dispatch___target_": PADDED}, "capacity.factor_train", "can't be dropless", "dispatch=alltoall"),
    (
        {"dispatch___target_": PADDED, "capacity__factor_train": 1.0},
        "capacity.factor_eval",
        "can't be dropless",
        "capacity=seed",
    ),
    (
        {
            "dispatch___target_": PADDED,
            "capacity__factor_train": 1.0,
            "capacity__factor_eval": 1.0,
            "capacity__scope": "global",
        },
        "capacity.scope",
        "per rank",
        "capacity.scope=rank",
    ),
    ({"dispatch___target_": LOCAL}, "engine.ep_size", "null means 4 at 4 ranks", "engine.ep_size=1"),
    ({"dispatch___target_": LOCAL, "engine__ep_size": 2}, "engine.ep_size", "all experts", "alltoall"),
    ({"data__source": "text"}, "data.path", "a file or a folder", "data.path=/path"),
    ({"data__source": "hub"}, "data.path", "name of a data set", "data.path=owner/name"),
    ({"data__source": "bins", "data__path": "/no/such"}, "data.path", "nothing exists at /no/such", "correct"),
    ({"data__path": "book.txt"}, "data.path", "reads no path", "data=text"),
    ({"data__tokenizer": "gpt9"}, "data.tokenizer", "no file is there", "kjv | byte"),
    ({"model__depth_every": 3, "experts__allow_noncausal": True}, "model.depth_every", "no block", "depth_every=2"),
    ({"capacity__priority": "probs"}, "capacity.priority", "nothing is dropped", "capacity.priority=choice_major"),
    ({"capacity__renormalise": True}, "capacity.renormalise", "nothing is dropped", "capacity.renormalise=false"),
    ({"experts__allow_noncausal": 0}, "experts.allow_noncausal", "true or false", "experts.allow_noncausal=false"),
    ({"router__top_k": 12, "router__zero_experts": 4}, "router.top_k", "zero experts take", "router.top_k=8 or less"),
]


@pytest.mark.parametrize(("changes", "field", "reason", "fix"), RULES)
def test_a_broken_rule_is_one_problem(changes: dict[str, object], field: str, reason: str, fix: str) -> None:
    (problem,) = problems_of(raw(**changes), world=4)
    assert problem.field == field
    assert reason in problem.reason
    assert fix in problem.fix


def test_cuda_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (problem,) = problems_of(raw(machine__device="cuda"))
    assert (problem.field, problem.value) == ("machine.device", "cuda")
    assert parse(raw(machine__device="auto"), 2).machine.device == "auto"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert parse(raw(machine__device="cuda"), 2).machine.device == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for device in ("auto", "cuda"):
        (problem,) = problems_of(raw(machine__device=device))
        assert "a device takes one rank" in problem.reason
    assert parse(raw(machine__device="cpu"), 2).machine.device == "cpu"


@pytest.mark.parametrize("key", ["model__dim", "model__expert_dim"])
def test_widths_are_aligned_for_grouped_products(key: str) -> None:
    (problem,) = problems_of(raw(**{key: 20}))
    assert problem.field == key.replace("__", ".")
    assert "=24" in problem.fix


@pytest.mark.parametrize(("noise", "scale"), [("jitter", -1.0), ("jitter", 2.0), ("gaussian", -0.1)])
def test_noise_that_can_not_be_drawn_is_refused(noise: str, scale: float) -> None:
    (problem,) = problems_of(raw(router__noise=noise, router__noise_scale=scale))
    assert problem.field == "router.noise_scale"
    assert parse(raw(router__noise="gaussian", router__noise_scale=2.0), 2).router["noise_scale"] == 2.0


def test_all_problems_come_at_once_those_of_two_sections_too() -> None:
    container = raw(
        model__dims=3, model__head_dim=7, router__topk=2, router__top_k=9, train__steps="many", train__global_batch=7
    )
    container["modle"] = {"dim": 4, "context": 8}
    fields = sorted(problem.field for problem in problems_of(container))
    assert fields == sorted(
        [
            "model.dims",
            "model.head_dim",
            "modle.context",
            "modle.dim",
            "router.top_k",
            "router.topk",
            "train.global_batch",
            "train.steps",
        ]
    )


def test_a_rule_is_silent_where_it_would_guess() -> None:
    container = raw(router__top_k=9, experts__num_experts="8", engine__ep_size=5)
    assert [problem.field for problem in problems_of(container)] == ["experts.num_experts"]


def test_sections_that_are_no_sections() -> None:
    container = raw()
    container["model"], container["router"] = 3, [1]
    assert [problem.field for problem in problems_of(container)] == ["model", "router"]


def test_required_keys_are_asked_for() -> None:
    container = raw(model__dim="???")
    del container["optim"]
    problems = problems_of(container)
    assert [(problem.field, problem.reason) for problem in problems] == [
        ("model.dim", "needs a value"),
        ("optim.lr", "needs a value"),
    ]


def test_the_world_is_the_fake_one_else_that_asked_for_else_the_recipes() -> None:
    container = raw(recipe__world=4)
    assert [world_of(parse(container, world), world) for world in (None, 2)] == [4, 2]
    container["debug"]["fake_world"] = 3
    assert [problem.field for problem in problems_of(container, 2)] == ["train.global_batch"]


@pytest.mark.parametrize(
    ("world", "experts", "asked", "size"), [(1, 8, None, 1), (4, 8, None, 4), (6, 8, None, 2), (8, 8, 2, 2)]
)
def test_ep_size(world: int, experts: int, asked: int | None, size: int) -> None:
    assert ep_size_of(tiny(experts__num_experts=experts, engine__ep_size=asked), world) == size


def test_the_report_is_read_from_top_to_bottom() -> None:
    problems = [
        Problem("router.topk", None, "router has no key 'topk'", "write router.top_k=null"),
        Problem("run.id", "", "is empty", "name it"),
    ]
    assert report(problems) == (
        "moetrain: 2 problems in the configuration\n"
        "\n"
        "  router.topk = null\n"
        "      why: router has no key 'topk'\n"
        "      fix: write router.top_k=null\n"
        "\n"
        "  run.id = ''\n"
        "      why: is empty\n"
        "      fix: name it\n"
    )


class Picky:
    """A router whose own words on ``top_k`` are enough."""

    def __init__(self, *, site: object, top_k: int) -> None: ...

    @staticmethod
    def problems(*, num_experts: int, top_k: int) -> list[Problem]:
        return [Problem("router.top_k", top_k, "isn't to my taste", "ask another")]


def test_a_field_that_its_class_speaks_of_is_not_told_twice() -> None:
    container = raw(machine__allow_modules=["tests"])
    container["router"] = {"_target_": "tests.test_config.Picky", "top_k": 99}
    (problem,) = problems_of(container)
    assert problem.reason == "isn't to my taste"


class Lamp:
    """No router at all."""

    def __init__(self, *, site: object) -> None: ...


def test_a_router_tells_its_traits() -> None:
    container = raw(machine__allow_modules=["tests"])
    container["router"] = {"_target_": "tests.test_config.Lamp"}
    (problem,) = problems_of(container)
    assert problem.field == "router._target_"
    assert "traits" in problem.reason


class Homebody(Lamp):
    """A router that cannot do without the experts of other ranks."""

    @staticmethod
    def traits(*, num_experts: int) -> RouterTraits:
        return RouterTraits(experts_per_token=1, expert_parallel=False)


def test_a_router_that_needs_all_experts_is_refused_under_expert_parallelism() -> None:
    container = raw(machine__allow_modules=["tests"])
    container["router"] = {"_target_": "tests.test_config.Homebody"}
    (problem,) = problems_of(container)
    assert (problem.field, problem.fix) == ("engine.ep_size", "set engine.ep_size=1, or choose another router")
    container["engine"]["ep_size"] = 1
    assert parse(container, 2).engine.ep_size == 1


@pytest.mark.parametrize("name", ["../x", "", "a b", ".hidden"])
def test_a_run_id_is_a_plain_name(name: str) -> None:
    (problem,) = problems_of(raw(run__id=name))
    assert (problem.field, problem.reason) == ("run.id", "must be a plain name")
