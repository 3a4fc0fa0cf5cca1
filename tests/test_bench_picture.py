"""The picture of a benchmark's results, and the same benchmark under both allocator settings."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moetrain.bench import allocator, picture
from moetrain.bench.picture import figure_of, read_results
from moetrain.cli import main

ROOT = Path(__file__).parents[1]
CASE = {
    "timed": "layer",
    "experts": 16,
    "top_k": 2,
    "dim": 512,
    "expert_dim": 1024,
    "tokens": 4096,
    "dtype": "float32",
    "ranks": 1,
    "threads": 1,
    "machine": "a processor",
    "cores": 2,
    "device": "cpu",
    "load": 1.5,
    "torch": "2.13",
    "gemm": "torch",
    "allocator": "as it comes",
    "at": "2026-11-22T10:00:00",
}


def _row(name: str, cpu: float, **changes: Any) -> dict[str, Any]:
    own = {"routing": "natural", "contestant": name, "note": "", "sent": 0, "cpu": [cpu] * 3, "wall": [2 * cpu] * 3}
    return CASE | own | changes


def _written(path: Path) -> Path:
    """Two routings of one shape, the first of which was timed again later; then another shape."""
    later: dict[str, Any] = {"at": "2026-11-23T10:00:00", "load": 0.5}
    rows = [
        *(_row("moetrain", 1.0), _row("old", 9.0)),
        *(_row("moetrain", 1.0, routing="zipf"), _row("DeepSpeed", 3.0, routing="zipf", note="drops tokens")),
        *(_row("moetrain", 2.0, **later), _row("transformers", 5.0, **later), _row("Tutel", 1.0, **later)),
        *(_row("moetrain", 1.0, experts=64), _row("transformers", 7.0, experts=64)),
        *(_row("balanced", 1.0, timed="skew", routing="balanced"), _row("skewed", 4.0, timed="skew", routing="skewed")),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_run_of_each_routing_is_shown(tmp_path: Path) -> None:
    first, second, skew = read_results(_written(tmp_path / "times.jsonl")).values()
    assert [row["contestant"] for row in first["natural"]] == ["moetrain", "transformers", "Tutel"]
    assert [row["contestant"] for row in first["zipf"]] == ["moetrain", "DeepSpeed"]
    assert [row["contestant"] for row in second["natural"]] == ["moetrain", "transformers"]
    assert [row["contestant"] for row in skew["skewed"]] == ["balanced", "skewed"]


def test_bars_are_multiples_of_ours_and_titles_name_shape_and_machine(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = _written(tmp_path / "times.jsonl")
    first, second, skew = figure_of(read_results(path)).subfigs
    natural, zipf = first.axes
    assert [bar.get_width() for bar in natural.patches] == [1.0, 2.5, 0.5]
    assert [bar.get_width() for bar in zipf.patches] == [1.0, 3.0]
    assert [bar.get_hatch() for bar in zipf.patches] == [None, "////"]
    colours = [bar.get_facecolor() for bar in natural.patches]
    assert len(set(colours)) == 3, "ours, slower, quicker"
    assert zipf.get_title() == "zipf routing"
    title = first.get_suptitle()
    for word in ("16 experts, k = 2, D = 512, F = 1024, 4096 tokens", "float32", "a processor", "1 ranks x 1 threads"):
        assert word in title
    assert "load 0.5 to 1.5" in title
    assert "64 experts" in second.get_suptitle()
    assert "a multiple of balanced" in skew.get_suptitle()
    assert [bar.get_width() for bar in skew.axes[0].patches] == [1.0, 4.0]
    assert main(["bench", "picture", str(path), "--out", str(tmp_path / "deep" / "times.png")]) == 0
    assert (tmp_path / "deep" / "times.png").read_bytes().startswith(b"\x89PNG")


def test_what_can_not_be_drawn_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = _written(tmp_path / "times.jsonl"), str(tmp_path / "times.png")
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_text("[1]\n")
    monkeypatch.setattr(picture, "find_spec", lambda _name: None)
    for results, to, words in (
        (path, out, "pip install 'moetrain[bench]'"),
        (path, f"{out}.gif", "format"),
        (tmp_path / "absent", out, "FileNotFoundError"),
        (tmp_path / "other", out, "holds no results"),
        (tmp_path / "empty", out, "is empty"),
    ):
        assert main(["bench", "picture", str(results), "--out", to]) == 2
        assert words in capsys.readouterr().err


def test_both_allocator_settings_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], str | None]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> SimpleNamespace:
        started.append((command[3:], env.get("GLIBC_TUNABLES")))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    options = ["--routing", "zipf", "--against", "eager"]
    typed = ["bench", "layer", "experts=e4,e8", *options, "--rounds", "3", "--out", "FILE", "--allocator"]
    again = ["bench", "layer", "--out", "FILE", "--rounds", "3", *options, "--", "experts=e4,e8"]
    assert main([*typed, "both"]) == 0
    assert started == [(again, None), (again, allocator.TUNED)]
    started.clear()
    assert main([*typed, "tuned"]) == 0
    assert started == [(again, allocator.TUNED)]
    assert allocator.TUNED in (ROOT / "launch" / "environment.sh").read_text()


def test_allocator_settings_are_for_one_process_and_glibc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert main(["bench", "layer", "--allocator", "both"]) == 2
    assert "needs glibc" in capsys.readouterr().err
    monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2", "RANK": "0"})
    assert main(["bench", "ep", "--allocator", "both"]) == 2
    assert "GLIBC_TUNABLES in the environment of torchrun" in capsys.readouterr().err
