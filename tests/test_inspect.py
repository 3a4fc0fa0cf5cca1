"""Where tokens go: what is shown is what the layers did, from a saved run to terminal, JSON and page."""

from __future__ import annotations

import io
import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moetrain.cli import main
from moetrain.inspect.command import Asked, inspect
from moetrain.inspect.corpus import ExpertProfile
from moetrain.inspect.corpus_table import LEGEND, bars
from moetrain.inspect.loaded import Loaded, load
from moetrain.inspect.observe import observe
from moetrain.inspect.text import LayerRoutes, shown, text_routes
from moetrain.models.decoder import Decoder
from moetrain.monitor.jsonl import read_metrics
from moetrain.types import ConfigError
from tests.pages import ENGINES, ask
from tests.tiny import VOCAB, alone, tiny, tokens

TEXT = "and the sea saw it <b> & fled"
LINES = ("the sea saw it and fled", "the mountains skipped like rams", "and the little hills like lambs\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on bytes, saved twice; too few slots in evaluation, so that choices are dropped."""
    root = tmp_path_factory.mktemp("inspected")
    (root / "text").mkdir()
    for number in range(40):
        (root / "text" / f"{number}.txt").write_text(" ".join(LINES[(number + i) % 3] for i in range(12)))
    settings = (
        "model=nano model.context=32 model.num_layers=3 model.dim=32 model.num_heads=2 model.num_kv_heads=1"
        " model.head_dim=16 model.expert_dim=16 experts=e8 router.noise=gaussian capacity.factor_eval=1.0"
        " capacity.minimum=1"
    )
    settings += " engine=local train.steps=4 train.global_batch=4 train.micro_batch=2 train.eval_every=2"
    settings += " train.eval_batches=1 train.checkpoint_every=2 optim.warmup_steps=1 machine.device=cpu"
    settings += " monitor.progress=false run.id=one"
    data = [f"data.path={root / 'text'}", "data.tokenizer=byte", "data.validation_fraction=0.2"]
    folders = [f"run.root={root}", f"data.cache={root / 'cache'}"]
    assert main(["train", "data=text", *settings.split(), *data, *folders]) == 0
    return root / "one"


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    return load(run)


def printed(asked: Asked, width: int = 80, colour: bool = False) -> str:
    """What a terminal of that width, or a pipe, is given."""
    out = io.StringIO()
    assert inspect(asked, Console(file=out, width=width, force_terminal=colour)) == 0
    return out.getvalue()


def queue_by_hand(layer: LayerRoutes) -> dict[tuple[int, int], int]:
    """(place, expert) -> position in the expert's queue: all first choices before all second ones."""
    lengths: dict[int, int] = defaultdict(int)
    found = {}
    for k in range(2):
        for route in layer.routes:
            expert = route.choices[k].expert
            found[route.place, expert] = lengths[expert]
            lengths[expert] += 1
    return found


def test_each_token_shows_its_best_experts_with_weights_slots_and_drops(loaded: Loaded) -> None:
    routes = text_routes(loaded, TEXT, [], train_capacity=False)
    assert "".join(routes.tokens) == TEXT.replace(" ", "·")
    assert [layer.layer for layer in routes.layers] == [0, 1, 2]
    for layer in routes.layers:
        assert layer.capacity == -(-2 * len(TEXT) // 8 // 2) * 2 == 8
        queue = queue_by_hand(layer)
        for place, route in enumerate(layer.routes):
            chosen = [route.logits[choice.expert] for choice in route.choices]
            assert chosen == sorted(route.logits, reverse=True)[:2]
            weights = torch.tensor(chosen).softmax(0).tolist()
            assert [choice.weight for choice in route.choices] == pytest.approx(weights, abs=2e-3)
            for choice in route.choices:
                assert choice.slot == queue[place, choice.expert]
                assert choice.kept == (choice.slot < 8)
    assert any(layer.num_dropped for layer in routes.layers)
    roomier = text_routes(loaded, TEXT, [2], train_capacity=True)
    assert [(layer.layer, layer.capacity) for layer in roomier.layers] == [(2, 10)]


def test_the_weights_are_those_of_the_run_and_looking_leaves_no_trace(run: Path, loaded: Loaded) -> None:
    """The loss over the run's validation batches is the one that the run recorded; two micro-batches are one batch."""
    found = json.loads(printed(Asked(run, corpus=True, num_batches=2, json=True)))["corpus"]
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "validation/lm_loss" in row]
    assert found["loss"] == pytest.approx(rows[-1]["validation/lm_loss"], rel=1e-5)
    assert rows[0]["validation/lm_loss"] != pytest.approx(rows[-1]["validation/lm_loss"], rel=1e-5)
    for layer in found["layers"]:
        assert sum(expert["load"] for expert in layer["experts"]) == pytest.approx(8)
        for part in range(8):
            assert sum(expert["positions"][part] for expert in layer["experts"]) == pytest.approx(8)
        for expert in layer["experts"]:
            assert sum(partner["share"] for partner in expert["partners"]) <= 1 + 1e-9
            assert min((token["count"] for token in expert["tokens"]), default=8) >= 8
            lifts = [token["lift"] for token in expert["tokens"]]
            assert lifts == pytest.approx(sorted(lifts, reverse=True))
        assert 1 < 8 * layer["vocabulary"] <= 8
        assert 0 < layer["entropy"] <= layer["uniform"] == pytest.approx(2.0794, abs=1e-4)
    text_routes(loaded, TEXT, [], train_capacity=True)
    for module in loaded.model.modules():
        assert not module.training
        assert not module._forward_hooks
    assert int(loaded.model.take_load().assigned_LE.sum()) == 0


def test_a_run_gives_its_newest_good_checkpoint_and_a_step_itself(run: Path, tmp_path: Path) -> None:
    assert (load(run).step, load(run / "checkpoints" / "step_00000002").step) == (4, 2)
    copy = tmp_path / "one"
    shutil.copytree(run, copy)
    file = copy / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    older = load(copy)
    assert older.step == 2
    assert "step_00000004" in older.passed_over[0]
    with pytest.raises(ConfigError, match="damaged"):
        load(file.parent)
    with pytest.raises(ConfigError, match=r"no run\.json"):
        load(tmp_path)


def test_tokens_that_pass_a_block_by_are_told_from_the_others() -> None:
    """Mixture of Depths: the layer is given some rows only, and each stands at its place in the text."""
    config = tiny(model__depth_every=2, model__depth_fraction=0.5)
    model = Decoder(config, alone(), VOCAB).eval()
    with torch.no_grad():
        model.blocks[1].depth.predictor.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(0))
    batch = tokens(1, 12)
    whole, some = observe(model, batch, train_capacity=False)[0]
    assert whole.place_T.tolist() == list(range(12))
    assert 0 < len(some.place_T) < 12
    assert torch.equal(batch.tokens_BS[0, some.place_T], some.given.tokens_BS[0])


def test_the_terminal_is_plain_when_piped_and_wraps_by_token(run: Path) -> None:
    asked = Asked(run, text=TEXT, layers=(1,))
    narrow, wide = printed(asked, 50), printed(asked, 5000)
    assert "\x1b" not in narrow
    assert "\x1b" in printed(asked, 50, colour=True)
    body = narrow.split("layer 1")[1].splitlines()[1:]
    assert max(len(line) for line in body) <= 50
    assert sorted(narrow.split()) == sorted(wide.split())
    assert "dropped" in wide
    assert "8 experts of 8 slots" in wide


def test_mistakes_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([str(run)], "does not say what to show"),
        (["--text", "hi"], "need a checkpoint"),
        ([str(run), "--text", ""], "has no token"),
        ([str(run), "--text", "x" * 33], "33 tokens, the model's context is 32"),
        ([str(run), "--text", "hi", "--layer", "9"], "no MoE layer"),
        ([str(run), "--corpus", "--batches", "0"], "at least 1"),
        ([str(run), "--text", "hi", "--html", "no/such/page.html"], "--html"),
    ):
        assert main(["inspect", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_a_token_can_be_read_by_itself(loaded: Loaded) -> None:
    tokenizer = loaded.tokenizer()
    assert [shown(tokenizer, ord(c)) for c in "a \n\t\x07"] == ["a", "·", "⏎", "→", "<7>"]
    assert [shown(tokenizer, token) for token in (0xC3, 256)] == ["<195>", "<end>"]


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_the_page_shows_the_layer_that_is_chosen(engine: str, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "tokens.html"
    asked = Asked(run, text=TEXT, corpus=True, walk=True, num_batches=2, html=page, json=True)
    told = json.loads(printed(asked))
    answer = ask(engine, page, PROBE, tmp_path)
    assert answer["layers"] == ["0", "1", "2"]
    assert answer["words"] == told["text"]["tokens"]
    choice = told["text"]["layers"][2]["routes"][3]["choices"][0]
    place = f"slot {choice['slot']}" if choice["kept"] else "dropped"
    assert f"expert {choice['expert']}: weight {choice['weight']:.3f}, {place}" in answer["tip"]
    logit = told["text"]["layers"][2]["routes"][1]["logits"][0]
    assert f"expert 0: logit {logit:.3f}" in answer["logit"]
    routes = told["text"]["layers"][2]["routes"]
    assert answer["struck"] == sum(not any(c["kept"] for c in route["choices"]) for route in routes)
    assert [row[1] for row in answer["profiles"]] == [
        f"{e['load']:.2f}" for e in told["corpus"]["layers"][2]["experts"]
    ]
    assert answer["walk"].startswith("# The routing walk: layer 0")
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page.read_text()


PROBE = """(() => {
  const id = (name) => document.getElementById(name);
  const point = (target, x, y) => {
    const box = target.getBoundingClientRect();
    target.dispatchEvent(new MouseEvent("pointermove", { clientX: box.left + x, clientY: box.top + y }));
  };
  id("layer").value = "2";
  id("layer").dispatchEvent(new Event("change"));
  const spans = [...document.querySelectorAll("#ribbon span")];
  point(spans[3], 1, 1);
  const tip = id("tip").textContent;
  point(id("logits"), 112, 20);
  return {
    layers: [...id("layer").options].map((one) => one.value), words: spans.map((one) => one.textContent), tip,
    logit: id("tip").textContent, struck: document.querySelectorAll("#ribbon .none").length,
    profiles: [...document.querySelectorAll("#profiles tbody tr")].map((row) =>
      [...row.children].map((cell) => cell.textContent)),
    walk: id("steps").textContent,
  };
})()"""


def test_the_bar_of_the_fair_share_is_the_one_that_the_legend_says() -> None:
    profile = ExpertProfile(0, 1.0, None, (0.0, 1.0, 2.0, 5.0, None), (), (), ())
    assert bars(profile) == "▁▄▇▇?"
    assert "from ▁ none over ▄ fair to ▇ twice the fair share or more" in LEGEND
