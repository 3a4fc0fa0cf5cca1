"""metrics.jsonl survives being killed, being resumed and numbers that are not finite."""

from __future__ import annotations

import json
import math

import pytest

from moetrain.monitor.jsonl import MetricsFile, read_metrics


def test_lines_are_on_disk_at_once_and_carry_step_tokens_and_segment(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, step=0, tokens=0) as metrics:
        metrics.write(10, 640, {"train/loss": 4.5})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1] == {"train/step": 10, "train/tokens": 640, "run/segment": 1, "train/loss": 4.5}
    assert read_metrics(path) == lines[1:]


def test_lines_of_one_step_are_merged_and_the_last_value_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as metrics:
        metrics.write(10, 640, {"train/loss": 4.5, "perf/mfu": 0.5})
        metrics.write(10, 640, {"validation/loss": 4.7, "train/loss": 4.4})
    (row,) = read_metrics(path)
    assert (row["train/loss"], row["perf/mfu"], row["validation/loss"]) == (4.4, 0.5, 4.7)


def test_a_resume_goes_back_over_what_was_logged_beyond_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as metrics:
        for step in (10, 20, 30, 37):
            metrics.write(step, step, {"train/loss": 1.0})
    with MetricsFile(path, 20, 20) as metrics:
        metrics.write(30, 30, {"train/loss": 2.0})
    rows = read_metrics(path)
    assert [(row["train/step"], row["train/loss"], row["run/segment"]) for row in rows] == [
        (10, 1.0, 1), (20, 1.0, 1), (30, 2.0, 2)
    ]  # fmt: skip
    assert len(path.read_text().splitlines()) == 2 + 4 + 1, "nothing is ever removed"
    with MetricsFile(path, 30, 30) as metrics:
        metrics.write(40, 40, {})
    assert json.loads(path.read_text().splitlines()[-1])["run/segment"] == 3


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_segment(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as metrics:
        metrics.write(1, 1, {"train/loss": 1.0})
    with path.open("ab") as file:
        file.write('{"train/step": 2, "tr\xc3'.encode("latin-1"))
    assert [row["train/step"] for row in read_metrics(path)] == [1]
    with MetricsFile(path, 1, 1) as metrics:
        metrics.write(2, 2, {"train/loss": 2.0})
    assert [row["train/step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("garbage", [b"{oops}\n", b"3\n", b"\xff\xfe\n"])
def test_any_other_bad_line_is_named(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0, 0).close()
    with path.open("ab") as file:
        file.write(garbage)
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        read_metrics(path)


def test_what_is_not_finite_is_strict_json_and_comes_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as metrics:
        metrics.write(1, 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300})
    json.loads(path.read_text().splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1e300)


def test_reserved_names_are_ours(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", 0, 0) as metrics, pytest.raises(AssertionError, match="reserved"):
        metrics.write(1, 1, {"train/step": 3.0})


def test_no_file_means_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_damaged_line_does_not_keep_a_run_from_going_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0, 0) as file:
        file.write(1, 10, {"loss": 1.0})
    with path.open("a") as raw:
        raw.write("not json\n")
    with MetricsFile(path, 1, 10) as file:
        file.write(2, 20, {"loss": 2.0})
    lines = [line for line in path.read_text().splitlines() if line != "not json"]
    assert [json.loads(line)["run/segment"] for line in lines] == [1, 1, 2, 2]
