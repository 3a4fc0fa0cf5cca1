"""Layout invariance: every layout of the same global batch gives what one process gives.

Loss, clip norm, load, every gradient (seen through one SGD step, which moves each weight by its clipped gradient) and
every weight after three steps, fp32, relative 1e-5. The layouts below are a selection from EP 1, 2, 4 x expert-DP 1,
2, 4 x ZeRO 0, 1, 2, 3 x accumulation 1, 2 x recompute off, on x dropless and global capacity: at world 4 every EP size
meets every ZeRO stage, and every other pair of values occurs, except capacity with accumulation, where a smaller
micro-step is another queue. Some lend hot experts, some send tokens in chunks. Worlds 2 and 8 add the sizes of
expert-DP that world 4 has not. The balance loss has ``sequence`` scope, or ``global_batch`` where accumulation is 1;
``micro_batch`` scope depends on the layout by its definition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moetrain.engine import make_engine
from moetrain.models.decoder import Decoder
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.types import ModelOutput
from tests.engine_runs import partition_everything
from tests.ranks import run_ranks
from tests.tiny import VOCAB, alone, part_of, tiny, tokens

GLOBAL_BATCH, STEPS, LR = 8, 3, 0.5


class Layout(NamedTuple):
    """One way to spread the same work."""

    engine: str
    ep: int
    zero: int
    accumulation: int
    recompute: bool
    capacity: float | None = None
    scope: str = "sequence"
    shadows: tuple[int, ...] = ()
    chunks: int = 1

    def config(self, micro_batch: int) -> Any:
        return tiny(
            dispatch="alltoall",
            dispatch__chunks=self.chunks,
            engine__name=self.engine,
            engine__zero_stage=self.zero,
            engine__ep_size=self.ep,
            engine__recompute=self.recompute,
            capacity__factor_train=self.capacity,
            capacity__minimum=1,
            capacity__scope="global",
            train__micro_batch=micro_batch,
            train__global_batch=GLOBAL_BATCH,
            balance__scope=self.scope,
            balance__balance_coef=1.0,
            experts__num_shared=1,
            model__moe_every=2,
            model__num_layers=3,
            model__init_std=0.3,
            optim__clip_norm=1.0,
        )


WORLD_4 = [
    Layout("local", 4, 0, 2, True, shadows=(0, 3, 7)),
    Layout("local", 2, 0, 1, False, 0.8),
    Layout("local", 1, 0, 2, False),
    Layout("deepspeed", 1, 0, 1, True, None, "global_batch"),
    Layout("deepspeed", 2, 0, 2, False, shadows=(4, 5)),
    Layout("deepspeed", 4, 0, 1, False, 0.8),
    Layout("deepspeed", 1, 1, 2, False),
    Layout("deepspeed", 2, 1, 1, True, 0.8, shadows=(1,), chunks=2),
    Layout("deepspeed", 4, 1, 2, True, chunks=3),
    Layout("deepspeed", 1, 2, 1, False, 0.8),
    Layout("deepspeed", 2, 2, 2, True),
    Layout("deepspeed", 4, 2, 1, False, None, "global_batch", (0, 1, 2, 3, 4, 5, 6, 7)),
    Layout("deepspeed", 1, 3, 2, True),
    Layout("deepspeed", 2, 3, 1, False, 0.8, chunks=2),
    Layout("deepspeed", 4, 3, 2, False),
]
WORLD_2 = [
    Layout("local", 2, 0, 2, False),
    Layout("deepspeed", 2, 1, 1, False, shadows=(2, 6)),
    Layout("deepspeed", 1, 2, 2, True),
    Layout("deepspeed", 2, 3, 2, True, chunks=2),
    Layout("local", 1, 0, 1, False, None, "global_batch"),
]
WORLD_8 = [Layout("deepspeed", 4, 1, 1, True), Layout("deepspeed", 2, 2, 1, False, 0.8)]


def weights_of(model: Decoder, stage: int, mesh: Mesh) -> dict[str, np.ndarray]:
    """This rank's parameters by name, whole also under ZeRO 3."""
    if stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().clone().numpy() for name, p in model.named_parameters()}
    return {name: p.detach().clone().numpy() for name, p in model.named_parameters()}


def train(layout: Layout, mesh: Mesh) -> dict[str, Any]:
    """Three steps: per step the mean loss and the norm, and the weights after the first and the last."""
    micro_batch = GLOBAL_BATCH // (mesh.world_size * layout.accumulation)
    model = Decoder(layout.config(micro_batch), mesh, VOCAB)
    experts = model.expert_names()
    found: dict[str, Any] = {"losses": [], "norms": [], "experts": experts, "load": []}
    first = weights_of(model, 0, mesh)
    engine = make_engine(model.config, model, mesh, layout.accumulation)
    model.set_shadows([layout.shadows] * len(model.moe_layers()))
    for step in range(STEPS):
        batch = tokens(GLOBAL_BATCH, 16, seed=step)
        outputs: list[ModelOutput] = []
        for micro in range(layout.accumulation):
            start = (micro * mesh.world_size + mesh.rank) * micro_batch
            outputs.append(engine.forward_backward(part_of(batch, start, start + micro_batch)))
            model.commit_load()
        found["losses"].append(np.mean([float(out.loss) for out in outputs]))
        found["norms"].append(engine.step(LR))
        load = model.take_load()
        found["load"].append(torch.stack([load.assigned_LE, load.kept_LE]).numpy())
        if step == 0:
            now = weights_of(model, layout.zero, mesh)
            found["gradients"] = {name: first[name] - now[name] for name in first}
    found["weights"] = weights_of(model, layout.zero, mesh)
    return found


def train_all(rank: int, world: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    partition_everything()
    meshes = {ep: mesh_of_world(ep, torch.device("cpu")) for ep in sorted({layout.ep for layout in layouts})}
    return [train(layout, meshes[layout.ep]) for layout in layouts]


def joined(by_rank: list[dict[str, Any]], kind: str, name: str, ep: int) -> np.ndarray:
    """A tensor of the whole model: experts of one EP group side by side, the rest from rank 0."""
    if name in by_rank[0]["experts"]:
        return np.concatenate([by_rank[rank][kind][name] for rank in range(ep)])
    return by_rank[0][kind][name]


def compare(layout: Layout, by_rank: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    losses = np.mean([found["losses"] for found in by_rank], axis=0)
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-5, err_msg=f"{layout} loss")
    load = np.sum([found["load"] for found in by_rank], axis=0)
    np.testing.assert_array_equal(load, reference["load"], err_msg=f"{layout} load")
    for found in by_rank:
        np.testing.assert_allclose(found["norms"], reference["norms"], rtol=1e-5, err_msg=f"{layout} norm")
        assert min(found["norms"]) > 1.0, "clipping must have been at work"
    for kind in ("gradients", "weights"):
        for name, expected in reference[kind].items():
            ours = joined(by_rank, kind, name, layout.ep)
            # A gradient is read off as the difference of two weights, which rounds it by half a unit of the weight.
            resolution = 6e-8 * np.linalg.norm(reference["weights"][name]) if kind == "gradients" else 0.0
            error = max(np.linalg.norm(ours - expected) - resolution, 0.0) / np.linalg.norm(expected)
            assert error < 1e-5, f"{layout} {kind} {name}: relative error {error:.1e}"


@pytest.mark.parametrize(("world", "layouts"), [(4, WORLD_4), (2, WORLD_2), (8, WORLD_8)])
def test_every_layout_equals_one_process(world: int, layouts: list[Layout]) -> None:
    """Also TRAPS 2 and T6 (expert gradients times EP), 3 and T7 (clip norm), 4 (load), 15 and T2 (aux and
    accumulation).
    """
    by_rank = run_ranks(world, train_all, layouts)
    references: dict[tuple[float | None, str], dict[str, Any]] = {}
    for number, layout in enumerate(layouts):
        kind = (layout.capacity, layout.scope)
        if kind not in references:
            references[kind] = train(Layout("local", 1, 0, 1, False, *kind), alone())
        compare(layout, [results[number] for results in by_rank], references[kind])
