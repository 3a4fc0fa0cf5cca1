"""The closing report and the load table: what they say, that they fit, and that the file is plain."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from moetrain.monitor.balance import summarise
from moetrain.monitor.heatmap import FAIR, OVERLOADED, STARVED
from moetrain.monitor.report import (
    MIB,
    ClosingReport,
    LoadReport,
    LossReport,
    RankMemory,
    bits_per_byte,
    closing_report,
    write_report,
)
from moetrain.monitor.tables import load_table
from moetrain.types import LoadCounts


def load(assigned) -> LoadReport:
    assigned_LE = torch.as_tensor(np.asarray(assigned), dtype=torch.int64)
    counts = LoadCounts(assigned_LE, torch.minimum(assigned_LE, torch.tensor(150)))
    return LoadReport(counts, summarise(counts, 1, range(len(assigned_LE))), tokens=200, expected=None)


def random_load(num_layers: int, num_experts: int) -> LoadReport:
    return load(np.random.default_rng(0).integers(50, 200, (num_layers, num_experts)))


def report(**changes) -> ClosingReport:
    base = ClosingReport(
        reached=400,
        planned=400,
        steps=400,
        tokens=1_638_400,
        seconds=231.2,
        tokens_per_second=7087.4,
        mfu=None,
        loss=LossReport(train=4.2, validation=4.3, unigram_entropy=6.4, bigram_entropy=4.9, bytes_per_token=4.0),
        phase_seconds={"rest": 0.3, "experts": 0.1},
        memory=(
            RankMemory(0, 30 * MIB, 31 * MIB, 62 * MIB, 1500 * MIB),
            RankMemory(1, 30 * MIB, 31 * MIB, 62 * MIB, 100 * MIB),
        ),
        load=load([[100, 100, 0, 200], [100, 100, 100, 100]]),
        sample="And the [bold]LORD[/bold] said :smile:",
        notes=("wandb: 40 records sent, 0 lost",),
        folder=Path("outputs/x"),
        metrics=Path("outputs/x/metrics.jsonl"),
        checkpoint=None,
    )
    return dataclasses.replace(base, **changes)


def text_of(renderable, width: int, colours: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(),
        width=width,
        color_system="truecolor" if colours else None,
        force_terminal=colours,
        no_color=None,
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def row(lines: list[str], start: str) -> list[str]:
    return next(line for line in lines if line.strip().startswith(start)).split()


def test_the_report_says_what_a_user_asks():
    lines = text_of(closing_report(report(), 100), 100)
    assert "400 steps, 1.6M tokens in 3:51: 7.1k tokens/s" in lines[2]
    assert row(lines, "validation")[1:] == ["4.300", f"{4.3 / math.log(2) / 4:.3f}"]
    assert row(lines, "corpus, bigram")[3:] == ["4.900", f"{4.9 / math.log(2) / 4:.3f}"]
    assert "The validation loss is 0.600 nats/token below the bigram entropy." in "\n".join(lines)
    assert row(lines, "0 1.00") == ["0", "1.00", "1.00", "0.00", "2.00", "2.00", "12.5%"]
    assert "worst expert 2.00x its fair share (layer 0)" in "\n".join(lines)
    assert row(lines, "rest") == ["rest", "300.0", "75.0%", "█" * 22]
    assert row(lines, "rank 0")[2:] == ["30", "31", "62", "1,377", "1,500"]
    assert row(lines, "rank 1")[2:] == ["30", "31", "62", "0", "100"]
    assert row(lines, "checkpoint") == ["checkpoint", "none", "saved"]
    assert "And the [bold]LORD[/bold] said :smile:" in "\n".join(lines), "a sample is text, not markup"


def test_a_loss_above_bigram_is_not_hidden_and_unknowns_are_left_out():
    loss = LossReport(train=5.0, validation=None, unigram_entropy=6.4, bigram_entropy=4.9, bytes_per_token=4.0)
    changed = report(loss=loss, load=None, phase_seconds={}, sample=None, mfu=0.412, checkpoint=Path("c/step_9"))
    text = "\n".join(text_of(closing_report(changed, 100), 100))
    assert "The train loss is 0.100 nats/token ABOVE the bigram entropy." in text
    assert "41.2% of the machine's peak" in text
    assert "c/step_9" in text
    for absent in ("validation", "Expert load", "Step time", "Sample", "nan", "None"):
        assert absent not in text


def test_of_many_ranks_the_fullest_are_shown():
    memory = tuple(RankMemory(rank, MIB, MIB, MIB, (10 + rank) * MIB) for rank in range(64))
    lines = text_of(closing_report(report(memory=memory), 100), 100)
    assert [line.split()[1] for line in lines if line.startswith("rank ")] == [str(rank) for rank in range(56, 64)]
    assert any("the fullest 8 of 64 ranks" in line for line in lines)


def test_the_file_is_plain_text(tmp_path):
    path = tmp_path / "report.txt"
    write_report(report(), path)
    text = path.read_text()
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "outputs/x/metrics.jsonl" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("num_experts", [2, 8, 16, 17, 64, 256])
def test_the_table_fits_and_shows_numbers_or_blocks(width, num_experts):
    one = random_load(3, num_experts)
    lines = text_of(load_table(one.counts, one.balance, width), width)
    assert all(len(line) <= width for line in lines)
    rows = [line for line in lines if line.split() and line.split()[0] in ("0", "1", "2") and "%" in line]
    assert len(rows) == 3, "no row is wrapped"
    assert all("…" not in line for line in lines)
    if num_experts in (2, 8) or (num_experts == 16 and width >= 100):
        relative = one.counts.assigned_LE[0] / one.counts.assigned_LE[0].double().mean()
        assert rows[0].split()[1:-2] == [f"{value:.2f}" for value in relative.tolist()]
    else:
        assert sum(rows[0].count(shade) for shade in "░▒▓█") >= min(num_experts, width - 20) // 2


def test_colours_are_on_the_fixed_scale():
    one = load([[0, 100, 200, 100]])
    (cells,) = [line for line in text_of(load_table(one.counts, one.balance, 80), 80, colours=True) if "2.00" in line]
    starts = ["48;2;" + ";".join(map(str, rgb)) for rgb in (STARVED, FAIR, OVERLOADED)]
    assert [cells.count(start) for start in starts] == [1, 2, 1]
    assert cells.index(starts[0]) < cells.index(starts[1]) < cells.index(starts[2])


def test_a_block_shows_the_worst_of_its_experts():
    even = [100] * 256
    even[100] = 0
    one = load([even])
    rows = text_of(load_table(one.counts, one.balance, 60), 60)
    cells = rows[-1].split()[1]
    assert cells.count("▒") == len(cells), "the starved block is a blank, so the row splits there"
    assert len(rows[-1].split()) == 5


def test_a_layer_without_tokens():
    one = load([[100, 100], [0, 0]])
    lines = text_of(load_table(one.counts, one.balance, 80), 80)
    assert lines[-1].split()[1:4] == ["none", "none", "none"]


def test_a_layer_without_tokens_is_named_and_ragged_load_is_told():
    starved = dataclasses.replace(load([[100, 300], [0, 0]]), expected=2.5)
    text = " ".join(" ".join(text_of(closing_report(report(load=starved), 100), 100)).split())
    assert "layer 1 received no token" in text
    assert "worst expert 1.50x its fair share (layer 0)" in text
    assert "experts per token 2.00 (layer 0), 0.00 (layer 1); 2.5 are expected" in text
    assert "nan" not in text
    assert "are expected" not in " ".join(text_of(closing_report(report(), 100), 100))


def test_a_loss_that_is_no_number_is_a_failure():
    loss = LossReport(train=math.nan, validation=None, unigram_entropy=6.4, bigram_entropy=4.9, bytes_per_token=4.0)
    text = " ".join(text_of(closing_report(report(loss=loss), 100), 100))
    assert "The train loss is nan: the run has failed." in text
    assert "bigram entropy." not in text


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 8, 8.0) == pytest.approx(1.0)
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0), "a byte tokenizer that knows nothing"
