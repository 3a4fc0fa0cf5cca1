"""What is saved goes on: in the same layout as if nothing had happened, to the bit; in another one with every weight
and every moment the same to the bit, and losses that differ by rounding only.

One chain of processes serves both: four ranks train and save; two ranks, one process and again four ranks load what the
one before has loaded and saved again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint import Source, find, load_weights
from moetrain.config import Config
from moetrain.engine import Engine, make_engine
from moetrain.models.decoder import Decoder
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.engine_runs import (
    CPU,
    ONE,
    Case,
    Run,
    engine_of,
    load_and_train,
    load_from,
    partition_everything,
    save_to,
    train,
    train_and_save,
)
from tests.ranks import run_ranks
from tests.tiny import ROUTER, VOCAB, part_of, tiny, tokens

WORLD, SAVED, LAST = 4, 3, 6
ENGINES = [("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
CASES = [Case(*engine, 2, optim="adamw") for engine in ENGINES]
CASES += [
    Case(*engine, 2, dtype="bf16", optim="adamw") for engine in (("local", 0), ("deepspeed", 1), ("deepspeed", 3))
]
MODELS = ("toy", "decoder")


@dataclass(frozen=True)
class Link:
    """One layout of the chain; what it saves lies in a folder of its name. shadows: experts lent to all ranks."""

    name: str
    world: int
    ep_size: int
    engine: str
    zero_stage: int
    shadows: tuple[int, ...] = ()


CHAIN = [
    Link("first", 4, 4, "deepspeed", 2, (0, 3, 6)),
    Link("half", 2, 2, "deepspeed", 1),
    Link("alone", 1, 1, "local", 0),
    Link("replicas", 4, 2, "deepspeed", 3),
    Link("back", 4, 4, "deepspeed", 2),
]


def decoder_config(link: Link) -> Config:
    """With all that a checkpoint must hold: shared experts, experts with biases, a head, a buffer that moves."""
    return tiny(
        router=ROUTER | {"bias": "sign", "bias_rate": 0.02},
        experts__num_shared=1,
        experts__bias=True,
        model__tied_embeddings=False,
        model__first_dense=1,
        model__num_layers=3,
        optim__name="adamw",
        optim__eps=1e-3,
        optim__weight_decay=0.1,
        engine__name=link.engine,
        engine__zero_stage=link.zero_stage,
        engine__ep_size=link.ep_size,
        train__global_batch=16,
        train__micro_batch=16 // link.world,
    )


def make(model: str, link: Link, mesh: Mesh) -> Engine:
    if model == "toy":
        return engine_of(Case(link.engine, link.zero_stage, link.ep_size, optim="adamw"), mesh)
    config = decoder_config(link)
    decoder = Decoder(config, mesh, VOCAB)
    decoder.set_shadows([link.shadows] * len(decoder.moe_layers()))
    return make_engine(config, decoder, mesh, 1)


def go_on(engine: Engine, mesh: Mesh, steps: range) -> list[float]:
    """Losses of some steps, means over the world."""
    if not isinstance(engine.model, Decoder):
        return train(engine, mesh, 1, steps, Run()).losses
    losses, mine = [], 16 // mesh.world_size
    for step in steps:
        batch = part_of(tokens(16, 16, seed=step), mine * mesh.rank, mine * (mesh.rank + 1))
        loss = engine.forward_backward(batch).loss.clone()
        engine.model.commit_load()
        engine.step(0.01 * (step + 1))
        engine.model.adapt_routers(moved=True)
        engine.model.take_load()
        if mesh.world_group is not None:
            dist.all_reduce(loss)
        losses.append(float(loss) / mesh.world_size)
    return losses


def begin(rank: int, world: int, folder: str) -> dict[str, Any]:
    """The runs that nothing happens to: saved in the middle."""
    result: dict[str, Any] = {"exact": train_and_save(rank, world, CASES, folder)}
    for model in MODELS:
        mesh = mesh_of_world(CHAIN[0].ep_size, CPU)
        engine = make(model, CHAIN[0], mesh)
        go_on(engine, mesh, range(SAVED))
        save_to(Path(folder) / model / CHAIN[0].name, SAVED, engine, mesh)
        result[model] = go_on(engine, mesh, range(SAVED, LAST))
    return result


def reload(rank: int, world: int, folder: str, numbers: list[int]) -> list[dict[str, list[float]]]:
    """For each link: load what the one before has saved, save it again, train to the end."""
    partition_everything()
    results = []
    for number in numbers:
        before, link = CHAIN[number - 1], CHAIN[number]
        mesh = mesh_of_world(link.ep_size, CPU) if world > 1 else ONE
        losses = {}
        for model in MODELS:
            engine = make(model, link, mesh)
            load_from(Path(folder) / model / before.name, engine, mesh)
            save_to(Path(folder) / model / link.name, SAVED, engine, mesh)
            losses[model] = go_on(engine, mesh, range(SAVED, LAST))
        results.append(losses)
    return results


def reload_and_resume(rank: int, world: int, folder: str, numbers: list[int]) -> dict[str, Any]:
    return {"links": reload(rank, world, folder, numbers), "exact": load_and_train(rank, world, CASES, folder)}


@dataclass(frozen=True)
class Chain:
    """Results of rank 0 by link and model, and of all ranks of the exact cases, whole and resumed."""

    folder: Path
    losses: list[dict[str, list[float]]]
    exact: dict[Case, list[tuple[Run, Run]]]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    whole = run_ranks(WORLD, begin, folder)
    losses = [{model: whole[0][model] for model in MODELS}]
    losses += run_ranks(2, reload, folder, [1])[0]
    losses += reload(0, 1, folder, [2])
    resumed = run_ranks(WORLD, reload_and_resume, folder, [3, 4])
    losses += resumed[0]["links"]
    exact = {
        case: [(whole[rank]["exact"][i], resumed[rank]["exact"][i]) for rank in range(WORLD)]
        for i, case in enumerate(CASES)
    }
    return Chain(Path(folder), losses, exact)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_same_layout_goes_on_to_the_bit(chain: Chain, case: Case) -> None:
    for whole, resumed in chain.exact[case]:
        assert resumed.losses == whole.losses[SAVED:]
        assert resumed.norms == whole.norms[SAVED:]
        assert resumed.weights.keys() == whole.weights.keys()
        for name, wanted in whole.weights.items():
            assert np.array_equal(resumed.weights[name], wanted), name


def everything(source: Source) -> dict[str, torch.Tensor]:
    return {key: source.tensor(key) for key in source.manifest.tensors}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("number", range(1, len(CHAIN)), ids=[link.name for link in CHAIN[1:]])
def test_another_layout_holds_the_same_bits_and_goes_on(chain: Chain, number: int, model: str) -> None:
    first, here = (find(chain.folder / model / CHAIN[n].name, ONE) for n in (0, number))
    assert first is not None
    assert here is not None
    wanted, got = everything(first), everything(here)
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key
    np.testing.assert_allclose(chain.losses[number][model], chain.losses[0][model], rtol=2e-6)


@pytest.mark.parametrize("model", MODELS)
def test_the_chain_compares_something(chain: Chain, model: str) -> None:
    """Losses fall, moments are not zero, experts differ, and the router's buffer has moved."""
    losses = chain.losses[0][model]
    assert losses[-1] < losses[0] - 1e-3
    source = find(chain.folder / model / "first", ONE)
    assert source is not None
    tensors = everything(source)
    assert all(bool(t.abs().sum() > 0) for key, t in tensors.items() if key.startswith(("optimizer", "weight")))
    (stem, *_) = sorted(key.removesuffix("/00000") for key in tensors if key.endswith("down/00000") and "weight" in key)
    assert len({tuple(tensors[f"{stem}/{expert:05d}"].flatten().tolist()) for expert in range(8)}) == 8
    assert any(bool(t.abs().sum() > 0) for key, t in tensors.items() if key.startswith("buffer"))
    assert float(tensors["optimizer/step"]) == SAVED


def test_a_tool_loads_the_weights_alone(chain: Chain) -> None:
    """Saved by four ranks under ZeRO 2 with AdamW; loaded where there is one process and no optimiser."""
    config = decoder_config(CHAIN[2])
    model = Decoder(config, ONE, VOCAB)
    path = chain.folder / "decoder" / "first" / f"step_{SAVED:08d}"
    source = load_weights(path, model, ONE)
    for name, param in model.named_parameters():
        if name in model.expert_names():
            wanted = torch.stack([source.tensor(f"weight/{name}/{expert:05d}") for expert in range(8)])
        else:
            wanted = source.tensor(f"weight/{name}")
        assert torch.equal(param, wanted), name
    for name in ("blocks.1.moe.router.bias_E", "blocks.2.moe.router.bias_E"):
        assert torch.equal(model.get_buffer(name), source.tensor(f"buffer/{name}"))
    with pytest.raises(ValueError, match="is of another model"):
        load_weights(path, Decoder(config, ONE, VOCAB + 1), ONE)
