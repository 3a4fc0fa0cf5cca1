"""Expert usage by domain: counted once whatever the layout, one number a layer, and shown."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from moetrain.cli import main
from moetrain.inspect.command import Asked, inspect
from moetrain.models.decoder import Decoder
from moetrain.moe.replay import Replay
from moetrain.monitor import heatmap
from moetrain.monitor.domains import DomainCounts, divergences, domain_numbers, is_domain_step
from moetrain.monitor.expert_load import ExpertLoadFile, ExpertLoadReader, LoadWindow
from moetrain.monitor.history import read_history
from moetrain.monitor.html import page, report
from moetrain.monitor.window import Window
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.types import Batch
from tests.pages import ENGINES, ask, probe
from tests.ranks import run_ranks
from tests.synthetic_runs import Shape, write_run
from tests.tiny import VOCAB, alone, moe_layer, part_of, tiny, tokens

CPU = torch.device("cpu")
NUM_DOMAINS = 3


def named(batch: Batch) -> Batch:
    """Domains that change within a sequence, and differ from one sequence to the next."""
    return replace(batch, domain_BS=(batch.tokens_BS + torch.arange(len(batch.tokens_BS)).unsqueeze(1)) % NUM_DOMAINS)


def cut(batch: Batch, start: int, stop: int) -> Batch:
    return replace(part_of(batch, start, stop), domain_BS=batch.domain_BS[start:stop])


def counts_of(config: object, mesh: Mesh, accumulation: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """One step of sixteen sequences over ranks and micro-batches: by domain, and all together."""
    model, window = Decoder(config, mesh, VOCAB), Window(mesh)  # type: ignore[arg-type]
    model.count_domains(NUM_DOMAINS)
    batch, size = named(tokens(16, 16)), 16 // mesh.world_size // accumulation
    for micro in range(accumulation):
        start = (micro * mesh.world_size + mesh.rank) * size
        output = model(cut(batch, start, start + size))
        output.loss.backward()
        window.add(output)
        model.commit_load()
    model.eval()(cut(batch, 0, 2))
    window.add_load(model.take_load(), model.take_gauges())
    load = window.reduce().load
    assert load is not None
    assert load.domain_LDE is not None
    assert load.domain_LDE.dtype == torch.int64
    return load.domain_LDE.numpy(), load.assigned_LE.numpy()


@pytest.fixture(scope="module")
def plain() -> tuple[np.ndarray, np.ndarray]:
    return counts_of(tiny(), alone())


def test_domains_add_up_and_every_token_is_counted_in_its_own(plain) -> None:
    by_domain_LDE, assigned_LE = plain
    assert by_domain_LDE.shape == (2, NUM_DOMAINS, 8)
    assert (by_domain_LDE.sum(axis=1) == assigned_LE).all()
    tokens_D = torch.bincount(named(tokens(16, 16)).domain_BS.flatten()).numpy()
    assert (by_domain_LDE.sum(axis=2) == 2 * tokens_D).all(), "two assignments a token, before dropping"


@pytest.mark.parametrize(
    ("changes", "accumulation"),
    [({"engine__recompute": True}, 1), ({}, 2), ({"engine__recompute": True}, 4)],
)
def test_recompute_and_accumulation_count_once(plain, changes, accumulation) -> None:
    found = counts_of(tiny(**changes), alone(), accumulation)
    assert (found[0] == plain[0]).all()


def test_dropped_assignments_count_too() -> None:
    by_domain_LDE, assigned_LE = counts_of(tiny(capacity__factor_train=0.5, capacity__minimum=1), alone())
    assert by_domain_LDE[0].sum() == assigned_LE[0].sum() == 16 * 16 * 2


def on_ranks(rank: int, world: int) -> list[np.ndarray]:
    return [counts_of(tiny(), mesh_of_world(ep, CPU), accumulation)[0] for ep, accumulation in ((1, 1), (2, 1), (2, 2))]


def test_layouts_count_the_same(plain) -> None:
    for found in run_ranks(2, on_ranks):
        assert all((one == plain[0]).all() for one in found)


def test_only_tokens_that_go_through_a_block_count_there_in_their_own_domain() -> None:
    model = Decoder(tiny(model__depth_every=2, model__depth_fraction=0.25), alone(), VOCAB)
    best: list[torch.Tensor] = []
    batch = named(tokens(16, 16))
    model.count_domains(NUM_DOMAINS)
    model.blocks[1].depth.register_forward_hook(lambda module, args, out: best.append(out.best_BC))
    model(batch)
    model.commit_load()
    by_domain_LDE = model.take_load().domain_LDE
    assert by_domain_LDE is not None
    through_D = torch.bincount(batch.domain_BS.gather(1, best[0]).flatten(), minlength=NUM_DOMAINS)
    assert by_domain_LDE[1].sum(dim=1).tolist() == (2 * through_D).tolist()
    assert by_domain_LDE[0].sum() == 16 * 16 * 2


def test_all_counts_travel_in_one_sum(monkeypatch) -> None:
    summed = []
    monkeypatch.setattr("moetrain.monitor.window.sum_over", lambda x, group: summed.append(x) or x.detach())
    counts_of(tiny(), alone())
    assert len(summed) == 1


def test_nothing_is_counted_where_nothing_was_asked_for() -> None:
    model = Decoder(tiny(), alone(), VOCAB)
    model(named(tokens(2, 16)))
    model.commit_load()
    assert model.take_load().domain_LDE is None
    assert all(layer.domains is None for layer in model.moe_layers())


def planted(overlap: int) -> np.ndarray:
    """[1, 2, 8] counts of a layer whose router sends domain A to experts 0-3, and B to the next four but overlap."""
    layer = moe_layer(tiny(dispatch="local"))
    layer.count_domains(2)
    gate_ED = layer.router.get_parameter("gate").detach().zero_()
    gate_ED[:4, 0], gate_ED[4 - overlap : 8 - overlap, 1] = 5.0, 5.0
    gate_ED[:, 2:] = torch.randn(8, 14, generator=torch.Generator().manual_seed(0)) / 10
    domain_BS = torch.arange(2).repeat(100).view(4, 50)
    x_TD = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    x_TD[:, :2] = torch.nn.functional.one_hot(domain_BS.flatten(), 2)
    layer(x_TD, torch.zeros_like(domain_BS), Replay(), domain_BS)
    layer.commit()
    assert layer.domains is not None
    return layer.domains.take().unsqueeze(0).numpy()


def test_a_router_that_keeps_domains_apart_is_told_from_one_that_does_not() -> None:
    apart = planted(0)
    assert apart[0, 0, 4:].sum() == apart[0, 1, :4].sum() == 0
    assert divergences(apart).tolist() == [1.0]
    half = planted(2)
    assert half[0, :, 2:4].min() > 0
    assert 0.2 < divergences(half)[0] < 0.9
    assert divergences(planted(4))[0] < 0.02


def test_the_number_is_that_of_a_hand() -> None:
    """Two domains of 40, each even over four experts, two of them in common: H(d) = 1 bit, and H(d | e) = 1/2 bit."""
    counts = np.array([[[10, 10, 10, 10, 0, 0], [0, 0, 10, 10, 10, 10]]])
    assert divergences(counts)[0] == pytest.approx(0.5)
    uneven = np.array([[[30, 10], [5, 15]]])
    h = lambda *p: -sum(q * math.log2(q) for q in p if q)  # noqa: E731
    told = h(35 / 60, 25 / 60) - (40 * h(0.75, 0.25) + 20 * h(0.25, 0.75)) / 60
    assert divergences(uneven)[0] == pytest.approx(told / h(2 / 3, 1 / 3))
    assert divergences(np.array([[[3, 9], [1, 3], [0, 0]]]))[0] == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(divergences(np.array([[[3, 9], [0, 0]], [[0, 0], [0, 0]]]))).all()


def test_a_key_a_layer_whatever_the_number_of_domains_and_experts() -> None:
    few, many = np.ones((2, 2, 4), dtype=np.int64), np.ones((2, 33, 128), dtype=np.int64)
    names = ["moe/layer_01/domain_divergence", "moe/layer_03/domain_divergence", "balance/domain_divergence_mean"]
    assert list(domain_numbers(few, [1, 3])) == list(domain_numbers(many, [1, 3])) == names
    few[0, 1] = 0
    assert domain_numbers(few, [1, 3])["balance/domain_divergence_mean"] == 0.0, "of the layers that have one"


def test_large_tables_are_recorded_less_often() -> None:
    def recorded(num_counts: int) -> int:
        return sum(is_domain_step(step, 10_000, 10, num_counts) for step in range(10, 10_001, 10))

    assert recorded(2 * 3 * 8) == 500
    assert 80 <= recorded(4 * 16 * 4096) <= 100
    assert recorded(60 * 33 * 256) == 48
    assert is_domain_step(9_999, 9_999, 10, 60 * 33 * 256)


def window_of(names: tuple[str, ...], counts_LDE: np.ndarray, step: int = 10) -> LoadWindow:
    assigned_LE = counts_LDE.sum(axis=1)
    layers = tuple(range(1, len(counts_LDE) + 1))
    domains = DomainCounts(names, counts_LDE)
    return LoadWindow(step, step * 10, 10, layers, 1, assigned_LE, assigned_LE, domains=domains)


def test_tables_are_read_back_and_a_wrong_one_is_named(tmp_path) -> None:
    counts_LDE = np.arange(24).reshape(2, 3, 4)
    path = tmp_path / "expert_load.jsonl"
    file = ExpertLoadFile(path, 0, 0)
    file.write(window_of(("a", "b", "other"), counts_LDE))
    file.close()
    reader = ExpertLoadReader(path)
    reader.poll()
    (found,) = reader.windows()
    assert found.domains is not None
    assert found.domains.names == ("a", "b", "other")
    assert (found.domains.assigned_LDE == counts_LDE).all()
    path.write_text(path.read_text().replace("[[0, 1, 2, 3]", "[[0, 1, 2, 4]"))
    with pytest.raises(ValueError, match=r"line 2: domains\.assigned does not add up"):
        ExpertLoadReader(path).poll()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_shows_domains_by_layer_and_step(engine, tmp_path) -> None:
    """Layer 2 keeps them apart at step 20 only; names are text, and long ones do not push the map aside."""
    names = ("laws", "<b>poems", "a name that is much too long to stand beside a map")
    even = np.full((2, 3, 8), 100)
    apart = even.copy()
    apart[1, 0, 4:] = apart[1, 1:, :4] = 0
    history = read_history(write_run(tmp_path, "healthy", Shape(num_layers=2, done=20)))
    loads = tuple(window_of(names, counts, step) for step, counts in ((10, even), (20, apart)))
    out = tmp_path / "report.html"
    out.write_text(page([replace(history, loads=loads)]))
    answer = ask(engine, out, probe("""
      const map = all("article canvas")[1];
      const choose = (layer) => {
        const one = all("article select")[0];
        one.value = layer;
        one.dispatchEvent(new Event("change"));
      };
      const wide = (map.parentNode.clientWidth - 120) / 8;
      const at = (column, row) => [120 + Math.floor((column + 0.4) * wide), 26 * row + 10];
      const look = () => {
        point(map, ...at(1, 1), "pointermove");
        return { tip: id("tip").textContent, said: all("article label")[0].textContent,
                 mine: pixel(map, ...at(1, 0)), other: pixel(map, ...at(1, 1)) };
      };
      const first = look();
      choose("2");
      const second = look();
      slide(0);
      return { first, second, before: look(), layers: all("article option").map((one) => one.textContent) };
    """), tmp_path)  # fmt: skip
    fair = list(heatmap.FAIR)
    assert answer["layers"] == ["1", "2"]
    assert answer["first"]["mine"] == answer["first"]["other"] == fair
    assert answer["first"]["tip"].splitlines() == [
        "<b>poems, expert 1", "1.00 times as often as all tokens", "12.5 % of its assignments, 100"
    ]  # fmt: skip
    assert answer["second"]["mine"] == list(heatmap.OVERLOADED), "laws choose it three times as often as all"
    assert answer["second"]["other"] == list(heatmap.STARVED)
    assert "0.00 times as often" in answer["second"]["tip"]
    assert f"at step 20, domain divergence {divergences(apart)[1]:.2f}" in answer["second"]["said"]
    assert "at step 10, domain divergence 0.00" in answer["before"]["said"]
    assert answer["before"]["other"] == fair


def test_the_page_of_a_large_run_holds_few_tables(tmp_path) -> None:
    history = read_history(write_run(tmp_path, "healthy", Shape(num_layers=2, done=20)))
    counts_LDE = np.full((24, 33, 64), 70_000)
    loads = tuple(window_of(tuple("ab"), counts_LDE, step) for step in range(10, 2000, 10))
    text = page([replace(history, loads=loads)])
    assert 300_000 < len(text) < 2_300_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains with hardly a letter in common, by the command line; saved once."""
    root = tmp_path_factory.mktemp("domains")
    texts = {"low": "abcd " * 30, "high": "wxyz" * 30}
    rows = [{"from": name, "text": f"{i} {texts[name]}"} for i in range(20) for name in texts]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        "model=nano model.context=32 model.num_layers=2 model.dim=32 model.num_heads=2 model.num_kv_heads=1"
        " model.head_dim=16 model.expert_dim=16 experts=e8 engine=local train.steps=4 train.global_batch=4"
        " train.micro_batch=2 train.checkpoint_every=4 optim.warmup_steps=1 machine.device=cpu monitor.log_every=2"
        " monitor.progress=false run.id=one data.domain_field=from data.tokenizer=byte data.validation_fraction=0.2"
    )
    folders = [f"data.path={root / 'rows.jsonl'}", f"run.root={root}", f"data.cache={root / 'cache'}"]
    assert main(["train", "data=jsonl", *settings.split(), *folders]) == 0
    return root / "one"


def test_a_run_logs_its_domains(run: Path, tmp_path: Path) -> None:
    history = read_history(run)
    assert {"balance/domain_divergence_mean", "moe/layer_01/domain_divergence"} <= history.series.keys()
    last = history.loads[-1]
    assert last.domains is not None
    assert last.domains.names == ("low", "high")
    assert last.domains.assigned_LDE[0].sum() == 2 * 4 * 32 * 2, "steps, sequences, tokens and choices"
    logged = history.series["moe/layer_01/domain_divergence"].values_N[-1]
    assert logged == pytest.approx(divergences(last.domains.assigned_LDE)[1])
    assert "Domain (down)" in report(run, tmp_path / "report.html", None).read_text()


def test_inspect_tells_which_domains_an_expert_serves(run: Path) -> None:
    out = io.StringIO()
    assert inspect(Asked(run, corpus=True, num_batches=8, json=True), Console(file=out)) == 0
    found = json.loads(out.getvalue())["corpus"]
    assert found["domains"] == ["low", "high"]
    for layer in found["layers"]:
        assert 0 <= layer["divergence"] <= 1
        assert all(len(one["domains"]) == 2 for one in layer["experts"])
        assert any(max(one["domains"], key=lambda lift: lift or 0) > 1.05 for one in layer["experts"])
    out = io.StringIO()
    assert inspect(Asked(run, corpus=True, num_batches=8), Console(file=out, width=120)) == 0
    assert "divergence 0." in " ".join(out.getvalue().split())
    assert "high×" in out.getvalue()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_of_inspect_has_a_column_of_domains(engine, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens.html"
    assert inspect(Asked(run, corpus=True, num_batches=8, html=out), Console(file=io.StringIO())) == 0
    heads = ask(engine, out, probe('return rows("#profiles table")[0].concat(id("measures").textContent);'), tmp_path)
    assert heads[-2] == "domains by lift"
    assert "domain divergence" in heads[-1]
