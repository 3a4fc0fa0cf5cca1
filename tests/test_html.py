"""The page of a report: it runs without an error, shows the exact numbers, follows the slider and is one safe file."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from moetrain.monitor import heatmap, page_data
from moetrain.monitor.charts import CHARTS, MAX_POINTS, points
from moetrain.monitor.domains import domain_numbers
from moetrain.monitor.events import Event
from moetrain.monitor.expert_load import LoadWindow
from moetrain.monitor.history import Series, read_history
from moetrain.monitor.html import embedded, page, report
from moetrain.types import ConfigError
from tests.pages import ENGINES, NEEDS_BROWSER, ask, probe
from tests.synthetic_runs import Shape, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("healthy", "collapsing", "late_positions"):
        write_run(root, name)
    return root


def data_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dark", [False, True])
def test_the_slider_chooses_the_step_of_everything(engine, dark, runs, tmp_path):
    """Expert 5 of layer 1 of a run that collapses onto experts 0 and 1: even at first, starved in the end."""
    out = report(runs / "collapsing", tmp_path / "report.html", None)
    answer = ask(engine, out, probe("""
      const heat = all("#runs canvas")[0];
      const look = (index) => {
        slide(index);
        point(heat, ...center(heat, 5, 8, 0), "pointermove");
        return { step: id("step-text").textContent, tip: id("tip").textContent, state: all("article p")[0].textContent,
                 starved: pixel(heat, ...center(heat, 5, 8, 0)), busy: pixel(heat, ...center(heat, 0, 8, 0)),
                 table: rows("article table") };
      };
      return { last: Number(id("step").max), then: look(0), now: look(39) };
    """), tmp_path, dark)  # fmt: skip
    loads = read_history(runs / "collapsing").loads
    assert answer["last"] == len(loads) - 1 == 39
    for shown, window in ((answer["then"], loads[0]), (answer["now"], loads[39])):
        assert shown["step"] == str(window.step)
        assert f"steps {window.step - 9} to {window.step}," in shown["state"]
        assigned, kept = int(window.assigned_LE[0, 5]), int(window.kept_LE[0, 5])
        share = window.assigned_LE[0, 5] / window.assigned_LE[0].mean()
        dropped = f"dropped {100 * (1 - kept / assigned):.1f} %" if assigned else "none assigned"
        assert shown["tip"].splitlines() == [
            "layer 1, expert 5", f"load {share:.2f} of the fair share", f"{assigned:,} assigned, {kept:,} kept", dropped
        ]  # fmt: skip
        relative = window.assigned_LE[1].max() / window.assigned_LE[1].mean()
        assert shown["table"][2][:2] == ["2", f"{relative:.2f} (expert {window.assigned_LE[1].argmax()})"]
    blue, red = ((96, 170, 240), (245, 110, 100)) if dark else (heatmap.STARVED, heatmap.OVERLOADED)
    assert answer["now"]["starved"] == list(blue)
    assert answer["now"]["busy"] == list(red)
    assert answer["then"]["starved"] != answer["now"]["starved"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_drop_map_and_the_drops_by_choice_and_position(engine, runs, tmp_path):
    out = report(runs / "late_positions", tmp_path / "report.html", None)
    answer = ask(engine, out, probe("""
      const heat = all("#runs canvas")[0];
      const before = pixel(heat, ...center(heat, 2, 8, 1));
      const radio = [...document.getElementsByName("mode")].find((one) => one.value === "drop");
      radio.checked = true;
      radio.dispatchEvent(new Event("change"));
      return { before, after: pixel(heat, ...center(heat, 2, 8, 1)), scale: id("scale-high").textContent,
               bars: all("article span").map((span) => span.textContent) };
    """), tmp_path)  # fmt: skip
    window = read_history(runs / "late_positions").loads[-1]
    dropped = 1 - window.kept_LE[1, 2] / window.assigned_LE[1, 2]
    assert dropped > 0.05, "the case must drop something"
    expected = [
        round(low + (high - low) * min(dropped / 0.5, 1)) for low, high in zip((247,) * 3, (84, 39, 136), strict=True)
    ]
    assert answer["after"] == expected
    assert answer["before"] != expected
    assert "50 %" in answer["scale"]
    late = 100 * (1 - window.position.kept_LX[:, 7].sum() / window.position.assigned_LX[:, 7].sum())
    assert answer["bars"][-2:] == ["part 8 of 8", f"{late:.1f} %"]
    assert answer["bars"][0] == "choice 1"


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_share_the_slider_and_the_curves(engine, runs, tmp_path):
    write_run(tmp_path, "healthy", Shape(steps=800, done=200), name="cut")
    out = report(runs / "collapsing", tmp_path / "report.html", tmp_path / "cut")
    answer = ask(engine, out, probe("""
      const steps = () => all("article p").map((one) => one.textContent).filter((text) => text.startsWith("steps"));
      const loss = all("#charts canvas")[0];
      const late = steps();
      slide(9);
      const early = steps();
      point(loss, 60, 50, "pointermove");
      const tip = id("tip").textContent;
      const seen = id("step-text").textContent;
      point(loss, 49, 50, "click");
      const heads = all("article h2").map((head) => head.textContent);
      return { late, early, tip, seen, clicked: id("step-text").textContent, heads };
    """), tmp_path)  # fmt: skip
    assert answer["heads"] == ["A: collapsing", "B: cut"]
    assert [text.split(",")[0] for text in answer["late"]] == ["steps 391 to 400", "steps 191 to 200"]
    assert "step 200 of 800 when this page was written" in answer["late"][1]
    assert [text.split(",")[0] for text in answer["early"]] == ["steps 91 to 100"] * 2
    assert answer["seen"] == "100"
    assert [row.split(":")[0] for row in answer["tip"].splitlines()] == ["A", "A", "B", "B"]
    assert answer["clicked"] == "10"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_run_and_a_layer_without_tokens_are_shown(engine, tmp_path):
    write_run(tmp_path, "healthy", Shape(done=0), name="empty")
    answer = ask(engine, report(tmp_path / "empty", None, None), probe("""
      return { text: all("article p").map((one) => one.textContent), canvases: all("canvas").length };
    """), tmp_path)  # fmt: skip
    assert answer == {
        "text": ["step 0 of 400 when this page was written", "This run has recorded no expert load."],
        "canvases": 0,
    }
    history = read_history(write_run(tmp_path, "healthy", Shape(done=10), name="idle"))
    counts_LE = np.zeros((4, 8), dtype=np.int64)
    counts_LE[1, 0] = 3
    idle = replace(
        history.loads[0], assigned_LE=counts_LE, kept_LE=counts_LE, received_LW=None, choice=None, position=None
    )
    out = tmp_path / "idle.html"
    out.write_text(page([replace(history, loads=(idle,))]))
    answer = ask(engine, out, probe("""
      const heat = all("#runs canvas")[0];
      point(heat, ...center(heat, 5, 8, 0), "pointermove");
      const colour = pixel(heat, ...center(heat, 5, 8, 0));
      const other = pixel(heat, ...center(heat, 0, 8, 1));
      return { tip: id("tip").textContent, colour, other, row: rows("article table")[1] };
    """), tmp_path)  # fmt: skip
    assert answer["colour"] == list(heatmap.NO_TOKENS)
    assert answer["other"] == list(heatmap.OVERLOADED), "each layer has a fair share of its own"
    assert "no token came to this layer" in answer["tip"]
    assert answer["row"] == ["1", "none", "none", "none", "8", "none", "-"]


@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_an_event_says_is_text(engine, tmp_path):
    history = read_history(write_run(tmp_path, "healthy", Shape(done=10)))
    evil = "</script><script>document.title = 'broken'</script><!-- @DATA@ & \u2028 '\""
    shown = Event(10, "alert", evil, {}, 1, undone=True)
    out = tmp_path / "report.html"
    out.write_text(page([replace(history, events=(shown,), facts=replace(history.facts, id="<b>&x"))]))
    answer = ask(engine, out, probe("""
      return { cells: rows("#events table").slice(-1)[0], undone: all("#events tr").slice(-1)[0].className,
               title: all("title")[0].textContent,
               bold: all("b").filter((one) => one.parentNode.className !== "bars").length };
    """), tmp_path)  # fmt: skip
    assert answer["cells"] == ["10", "alert", evil]
    assert answer["undone"] == "undone"
    assert answer["bold"] == 0
    assert "broken" not in answer["title"]


@NEEDS_BROWSER
@pytest.mark.parametrize("width", [500, 900, 1600])
@pytest.mark.parametrize(("layers", "experts", "windows"), [(48, 128, 5), (2, 8, 400)])
def test_nothing_sticks_out_of_the_window(width, layers, experts, windows, tmp_path):
    """Wide tables scroll by themselves; the frame around the chosen window is whole."""
    shape = Shape(layers, experts, steps=windows, log_every=1, world_size=32, ep_size=8)
    run = write_run(tmp_path, "collapsing", shape)
    answer = ask("chromium", report(run, tmp_path / "a.html", run if width == 1600 else None), probe("""
      const root = document.documentElement;
      const out = all("body *").filter((one) => !one.closest(".scroll, .unseen") &&
        one.getBoundingClientRect().right > root.clientWidth + 0.5);
      const ranks = all("#runs canvas")[1];
      const edge = pixel(ranks, ranks.width - 1, 40);
      return { width: root.clientWidth, page: root.scrollWidth, out: out.map((one) => one.outerHTML.slice(0, 80)),
               edge, ink: getComputedStyle(root).getPropertyValue("--ink"),
               said: id("step").getAttribute("aria-valuetext") };
    """), tmp_path, size=f"{width},800")  # fmt: skip
    assert answer["width"] == width
    assert answer["out"] == []
    assert answer["page"] == width
    assert answer["edge"] == [int(answer["ink"][i : i + 2], 16) for i in (1, 3, 5)]
    assert answer["said"] == f"step {windows}"


def test_the_file_needs_nothing_else(runs, tmp_path):
    text = report(runs / "healthy", tmp_path / "report.html", runs / "collapsing").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://|fetch\(|XMLHttp""", text)
    assert "default-src 'none'" in text
    assert len(text) < 200_000
    assert not re.search("@[A-Z]+@", text)


def test_the_colours_are_those_of_the_other_pictures(runs):
    light = page([read_history(runs / "healthy")]).split("prefers-color-scheme")[0]
    shades = {
        "starved": heatmap.STARVED,
        "fair": heatmap.FAIR,
        "overloaded": heatmap.OVERLOADED,
        "unknown": heatmap.NO_TOKENS,
    }
    for name, shade in shades.items():
        assert f"--{name}: {' '.join(map(str, shade))};" in light


def test_a_large_run_stays_below_two_megabytes_and_says_what_it_leaves_out(tmp_path):
    history = read_history(
        write_run(tmp_path, "collapsing", Shape(12, 64, steps=80, log_every=10, world_size=8, ep_size=8))
    )
    many = replace(history, loads=tuple(replace(history.loads[i % 8], step=i + 1) for i in range(500)))
    data = data_of(text := page([many]))["runs"][0]
    assert 1_000_000 < len(text) < 2_000_000
    steps = [load["step"] for load in data["loads"]]
    assert steps[-1] == 500
    assert len(set(np.diff(steps))) == 1
    assert data["note"] == f"{len(steps)} of 500 recorded windows are in this page."


def test_large_counts_keep_three_digits_and_one_is_not_none():
    assigned_LE = np.array([[10_000_000, 1, 0, 123_456]])
    window = LoadWindow(1, 1, 1, (0,), 1, assigned_LE, assigned_LE)
    packed = page_data._window(window)
    raw = np.frombuffer(base64.b64decode(packed["assigned"]), "<u2").astype(np.int64)
    assert raw.max() <= 65535
    assert raw[1] == 1
    assert raw[2] == 0
    assert raw[[0, 3]] * packed["scale"] == pytest.approx(assigned_LE[0, [0, 3]], rel=1e-3)
    assert packed["kept"] is None


def test_the_table_is_that_of_the_balance_and_the_busiest_rank_is_the_one_that_received_most(runs):
    window = read_history(runs / "collapsing").loads[-1]
    row = page_data._window(window)["table"][0]
    assert row[3] == int((window.assigned_LE[0] == 0).sum()) == 6
    assert row[4] == pytest.approx(100 * (1 - window.kept_LE[0].sum() / window.assigned_LE[0].sum()), rel=1e-3)
    received_W = window.received_LW[0]
    assert (row[5], row[6]) == (received_W.argmax(), pytest.approx(received_W.max() / received_W.mean(), rel=1e-3))


def test_thinned_curves_keep_their_peaks_their_ends_and_their_gaps():
    values_N = np.sin(np.arange(20_000) / 50)
    values_N[7_777], values_N[3_333], values_N[5_000] = 9.0, -9.0, math.nan
    kept = points(Series("x", np.arange(20_000), values_N), 2.0)
    assert len(kept) <= MAX_POINTS
    assert [7_777, 18.0] in kept
    assert [3_333, -18.0] in kept
    assert [5_000, None] in kept
    assert kept[0][0] == 0
    assert kept[-1][0] == 19_999
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})


def test_every_curve_is_a_metric_that_is_logged(runs):
    """A curve whose name nobody logs would be missing from every page without a word."""
    logged = read_history(runs / "healthy").series.keys() | {"train/own_loss"}
    # of controllers: test_control.py, test_shadow.py
    logged |= {"control/balance_coef", "control/capacity_factor", "control/restarts", "control/shadowed"}
    logged |= domain_numbers(np.ones((1, 2, 4), dtype=np.int64), [0]).keys()
    assert {curve.name for chart in CHARTS for curve in chart.curves} <= logged


def test_a_page_that_can_not_be_written_is_a_mistake_of_the_user(runs, tmp_path):
    with pytest.raises(ConfigError, match="--out"):
        report(runs / "healthy", tmp_path / "nowhere" / "report.html", None)


def test_nothing_in_the_data_can_end_the_script():
    text = embedded({"a": "</script><!--&"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!--&"}
