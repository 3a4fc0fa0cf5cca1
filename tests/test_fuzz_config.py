"""Broken configurations: a clear list of problems or a config that is right, whatever is typed or lies in a file."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import random
import string
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetrain import parts
from moetrain.checks import parse
from moetrain.compose import compose, compose_with_about, conf_folder
from moetrain.config import Config
from moetrain.problems import report
from moetrain.types import ConfigError
from tests.tiny import tiny

NUM_CASES = int(os.environ.get("MOETRAIN_FUZZ", "600"))
NUM_COMPOSED = NUM_CASES // 75
SECRET = "planted-secret-0123456789"
SLOWEST_S = 5.0


class Odd:
    """Values that nobody means, some of them meant to run something."""

    def __init__(self, rng: random.Random, mark: Path) -> None:
        touch = f"touch {mark}"
        self._rng = rng
        self._values = [
            None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-320,
            math.inf, -math.inf, math.nan, "", " ", "0", "null", "???", "a" * 100_000, "\0", "\ud800", "ünïcødé 🤖",
            "../../etc/passwd", "/etc/passwd", "$(" + touch + ")", f"`{touch}`", f"; {touch}", "%s%n{0}{}",
            f"__import__('os').system('{touch}')", f"!!python/object/apply:os.system ['{touch}']",
            "${oc.env:HOME}", "${oc.env:MOETRAIN_FUZZ_API_KEY}", "${train.steps}", "${nothing}", "${", "${oc.eval:1}",
            [], {}, [[]], {"": {}}, {"_target_": "os.system"}, [1, "x", None], {"a": {"b": {"c": []}}},
            {"_target_": "subprocess.Popen", "args": touch}, {"_target_": "moetrain.__main__.main"},
            "moetrain.cli.os.system", "moetrain.__main__.code", "os.system", "moetrain..x", "moetrain.trainer.Trainer",
            "moetrain.moe.routers.token_choice.TokenChoiceRouter", "builtins.eval",
        ]  # fmt: skip

    def value(self) -> Any:
        """One of them, or a list or a mapping of them, or one deep in another."""
        kind, value = self._rng.random(), copy.deepcopy(self._rng.choice(self._values))
        if kind < 0.05:
            for _ in range(self._rng.choice([3, 300])):
                value = [value]
        elif kind < 0.1:
            value = {self.key(): value for _ in range(3)}
        return value

    def key(self) -> str:
        return self._rng.choice(["steps", "_target_", "_about_", "", "a.b", "🤖", "x" * 300, "__class__", "\0", "1"])


def mutated(container: dict[str, Any], odd: Odd, rng: random.Random) -> dict[str, Any]:
    """One to three places changed, lost, renamed or added."""
    out = copy.deepcopy(container)
    for _ in range(rng.choice([1, 1, 2, 3])):
        section = rng.choice(list(out))
        if rng.random() < 0.1 or not isinstance(out[section], dict) or not out[section]:
            out[section] = odd.value()
            continue
        key, kind = rng.choice(list(out[section])), rng.random()
        if kind < 0.1:
            del out[section][key]
        elif kind < 0.2:
            out[section][odd.key()] = out[section].pop(key)
        elif kind < 0.3:
            out[section][odd.key()] = odd.value()
        else:
            out[section][key] = odd.value()
    return out


def is_clear(error: ConfigError) -> bool:
    """Every problem names a field and says why and what to do; the report can be printed."""
    assert error.problems
    assert all(one.field and one.reason and one.fix for one in error.problems), error.problems
    assert SECRET not in report(error.problems).encode(errors="backslashreplace").decode()
    return True


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Odd:
    monkeypatch.setenv("MOETRAIN_FUZZ_API_KEY", SECRET)
    made = functools.cache(parts._schema)  # what a class accepts is the same in every case, and most of the time
    monkeypatch.setattr(parts, "_schema", lambda found, names: made(found, tuple(names)))
    return Odd(random.Random(5), tmp_path / "executed")


def test_any_sections_are_a_config_or_clear_problems(odd: Odd, tmp_path: Path) -> None:
    rng, refused, longest = random.Random(6), 0, 0.0
    for case in range(NUM_CASES):
        container, began = mutated(dataclasses.asdict(tiny()), odd, rng), time.thread_time()
        try:
            assert isinstance(parse(container, rng.choice([None, 1, 2, 3, 8])), Config)
        except ConfigError as error:
            refused += is_clear(error)
        except Exception as error:
            raise AssertionError(f"case {case}: {container}") from error
        longest = max(longest, time.thread_time() - began)
    assert refused > NUM_CASES // 2
    assert longest < SLOWEST_S
    assert not (tmp_path / "executed").exists()


def typed(odd: Odd, rng: random.Random, keys: list[str]) -> str:
    """An override, or what somebody takes for one."""
    key, value = rng.choice([*keys, odd.key(), "hydra.run.dir", "recipe", "router"]), odd.value()
    text = f"{rng.choice(['', '', '', '+', '++', '~'])}{key}={value}"
    if rng.random() < 0.3:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice([*string.punctuation, "\n", "é", "\0", "=="]) + text[at:]
    return text[:2000]


def test_any_words_are_a_config_or_clear_problems(odd: Odd, tmp_path: Path) -> None:
    rng, refused = random.Random(7), 0
    keys = [f"{section}.{key}" for section, values in dataclasses.asdict(tiny()).items() for key in values]
    for case in range(NUM_COMPOSED):
        words = [typed(odd, rng, keys) for _ in range(rng.choice([1, 1, 2]))]
        try:
            compose(["recipe=quickstart", *words], 2)
        except ConfigError as error:
            refused += is_clear(error)
        except Exception as error:
            raise AssertionError(f"case {case}: {words}") from error
    assert refused > NUM_COMPOSED // 2
    assert not (tmp_path / "executed").exists()


def test_any_file_is_an_option_or_a_clear_problem(odd: Odd, tmp_path: Path) -> None:
    """Options of the user's own: YAML of odd values, with bytes flipped, lost or put in."""
    folder = tmp_path / "own" / "router"
    folder.mkdir(parents=True)
    rng, refused = random.Random(8), 0
    good = yaml.safe_load((conf_folder() / "router" / "topk.yaml").read_text())
    for case in range(NUM_COMPOSED):
        text = yaml.dump(mutated({"router": good}, odd, rng)["router"]).encode(errors="replace")
        if rng.random() < 0.5:
            begin, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = (
                text[:begin]
                + rng.choice([b"", rng.randbytes(20), b"&a [*a]", b"[" * 50, b"\t: ", b"---\n"])
                + text[end:]
            )
        (folder / "mine.yaml").write_bytes(text)
        try:
            compose_with_about(["recipe=quickstart", "router=mine"], 2, str(folder.parent))
        except ConfigError as error:
            refused += is_clear(error)
        except Exception as error:
            raise AssertionError(f"case {case}: {text!r}") from error
    assert refused > NUM_COMPOSED // 2
    assert not (tmp_path / "executed").exists()
