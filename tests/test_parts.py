"""Parts are found by name only where that is allowed, and checked against their own signature."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from moetrain.moe.routers.token_choice import TokenChoiceRouter
from moetrain.parts import build, part_problems, resolve
from moetrain.types import ConfigError, Problem

HERE = "tests.test_parts"
ALLOW = ["tests"]


class Good:
    def __init__(
        self,
        *,
        dim: int,
        rate: float,
        kind: Literal["a", "b"] = "a",
        sizes: list[int] = [1, 2],  # noqa: B006
    ) -> None:
        self.dim, self.rate, self.kind, self.sizes = dim, rate, kind, sizes

    @staticmethod
    def problems(*, num_experts: int, rate: float, kind: str, sizes: list[int]) -> list[Problem]:
        return [Problem("router.rate", rate, f"{kind}{sizes}", "less")] if rate > num_experts else []


class Positional:
    def __init__(self, dim: int, rate: float = 1.0) -> None: ...


class NoContext:
    def __init__(self, *, rate: float = 1.0) -> None: ...


class Bare:
    pass


def found(name: str = "Good", allow: list[str] = ALLOW, **keys: object) -> list[Problem]:
    return part_problems("router", {"_target_": f"{HERE}.{name}", **keys}, allow, 4, ("dim",))


def test_resolve_finds_classes_of_moetrain_and_of_allowed_packages() -> None:
    assert resolve("moetrain.moe.routers.token_choice.TokenChoiceRouter", []) is TokenChoiceRouter
    assert resolve(f"{HERE}.Bare", ALLOW) is Bare
    assert resolve(f"{HERE}.Bare", [HERE]) is Bare


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "lies outside of moetrain"),
        ("moetrains.Router", "lies outside of moetrain"),
        (f"{HERE}s.Good", "there is no module"),
        (f"{HERE}.Path", "is a class of pathlib"),
        ("moetrain.parts.importlib.Loader", "there is no module"),
        ("moetrain.parts.resolve", "has no class 'resolve'"),
        ("moetrain.moe.routers.base.Ruter", "has no class 'Ruter'"),
        ("moetrain.moe.routers.bas.Router", "there is no module moetrain.moe.routers.bas"),
        ("Good", "lies outside of moetrain"),
        ("moetrain.cli.os.system", "there is no module"),
        ("moetrain.__main__.code", "is no dotted path of plain names"),  # an import of it would run the command
        ("moetrain.parts.__class__", "is no dotted path of plain names"),
        ("moetrain..os.system", "is no dotted path of plain names"),
    ],
)
def test_resolve_refuses(target: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(target, ["tests"])
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("_target_", target)
    assert reason in problem.reason or ("pathlib" in reason and "pathlib" in problem.reason)


def test_a_refused_target_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Evil: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError):
        resolve("evil.Evil", [])
    assert not (tmp_path / "ran").exists()
    resolve("evil.Evil", ["evil"])
    assert (tmp_path / "ran").exists()


def test_the_nearest_class_is_named() -> None:
    (problem,) = found("Goood")
    assert problem.fix == f"write {HERE}.Good"


def test_an_import_that_fails_inside_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_part.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve("broken_part.Router", ["broken_part"])
    assert "not_installed_anywhere" in caught.value.problems[0].reason


def test_keys_are_checked_against_the_signature() -> None:
    assert found(rate=1) == []
    assert [problem.field for problem in found(rate="x", knd="a", dim=3)] == ["router.dim", "router.rate", "router.knd"]
    assert [problem.reason for problem in found()] == ["needs a value"]
    assert [problem.fix for problem in found(rate=1, kind="c")] == ["choose a | b"]
    (problem,) = found(rate=1, sizes=[1, "x"])
    assert (problem.field, problem.reason) == ("router.sizes.1", "input should be a valid integer")


def test_the_class_speaks_with_all_parameters_once_they_are_right() -> None:
    assert [problem.reason for problem in found(rate=5)] == ["a[1, 2]"]
    assert [problem.field for problem in found(rate=5, other=1)] == ["router.other"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Positional", "its parameters dim, rate aren't keyword-only"),
        ("NoContext", "lacks the parameters dim"),
        ("Bare", "lacks the parameters dim"),
    ],
)
def test_a_class_that_can_be_no_part(name: str, reason: str) -> None:
    (problem,) = found(name)
    assert problem.field == "router._target_"
    assert reason in problem.reason


def test_build_hands_over_context_and_checked_parameters() -> None:
    part = build({"_target_": f"{HERE}.Good", "rate": 2, "kind": "b"}, ALLOW, dim=3)
    assert (part.dim, part.rate, part.kind, part.sizes) == (3, 2.0, "b", [1, 2])
    assert isinstance(part.rate, float)
    with pytest.raises(ConfigError, match="dim"):
        build({"_target_": f"{HERE}.Good", "rate": 2, "dim": 3}, ALLOW, dim=3)
