"""Routers that no library at hand can run, against what their published code does, written out number by number.

Plain Python over lists and numpy in double precision, from the tokens to what the layer gives, without our functions.
Sources: fairseq (BASE), Megatron-LM (Sinkhorn), Flaxformer (Expert Choice), the code of the ReMoE paper.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import StepSeen
from moetrain.ops.auction import balanced_assignment
from tests.tiny import ids, moe_layer, tiny

Array = NDArray[np.float64]
DIM, EXPERTS, TOKENS = 16, 8, 24


def layer_of(module: str, name: str, **own: Any) -> MoELayer:
    part = {"_target_": f"moetrain.moe.routers.{module}.{name}", **own}
    return moe_layer(tiny(router=part, experts__allow_noncausal=True, dispatch="local"))


def tokens(mean: float = 0.3, num: int = TOKENS) -> torch.Tensor:
    return torch.randn(num, DIM, generator=torch.Generator().manual_seed(2)) + mean


def array(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy())


def logits_of(x: Array, gate: Array) -> list[list[float]]:
    return [[float(sum(a * b for a, b in zip(row, column, strict=True))) for column in gate] for row in x]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def ffn(layer: MoELayer, e: int, x: Array) -> Array:
    """SwiGLU of expert e."""
    gate, up = np.split(array(layer.experts.gate_up[e]) @ x, 2)
    return array(layer.experts.down[e]) @ (gate / (1 + np.exp(-gate)) * up)


def given(layer: MoELayer, x_TD: torch.Tensor, num_sequences: int = 1) -> Array:
    return array(layer(x_TD, ids(x_TD, num_sequences), Replay()).hidden_TD)


def cheapest(cost: list[list[float]]) -> list[int]:
    """Which column each row of a square matrix takes, so that the sum is least (Kuhn 1955, Munkres 1957)."""
    size = len(cost)
    row_price, column_price = [0.0] * (size + 1), [0.0] * (size + 1)
    row_of, came_from = [0] * (size + 1), [0] * (size + 1)
    for row in range(1, size + 1):
        row_of[0], column = row, 0
        slack, used = [math.inf] * (size + 1), [False] * (size + 1)
        while row_of[column]:
            used[column] = True
            here, least, following = row_of[column], math.inf, 0
            for j in range(1, size + 1):
                if not used[j]:
                    reduced = cost[here - 1][j - 1] - row_price[here] - column_price[j]
                    if reduced < slack[j]:
                        slack[j], came_from[j] = reduced, column
                    if slack[j] < least:
                        least, following = slack[j], j
            for j in range(size + 1):
                if used[j]:
                    row_price[row_of[j]] += least
                    column_price[j] -= least
                else:
                    slack[j] -= least
            column = following
        while column:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    taken = [0] * size
    for j in range(1, size + 1):
        taken[row_of[j] - 1] = j - 1
    return taken


@pytest.mark.parametrize("seed", range(3))
def test_base_assigns_as_well_as_can_be(seed: int) -> None:
    """64 tokens, 8 experts: against the exact optimum, an expert being eight columns alike."""
    affinity = array(torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(seed))).tolist()
    best = sum(
        affinity[t][j // 8] for t, j in enumerate(cheapest([[-row[j // 8] for j in range(64)] for row in affinity]))
    )
    expert_T = balanced_assignment(torch.tensor(affinity)).tolist()
    assert [expert_T.count(e) for e in range(EXPERTS)] == [8] * EXPERTS
    ours = sum(row[e] for row, e in zip(affinity, expert_T, strict=True))
    assert 0.99 * best <= ours <= best + 1e-4
    assert sum(max(row) for row in affinity) > best + 1, "taking the nearest would not be even"


@pytest.mark.parametrize("training", [True, False])
def test_base_is_fairseqs_residual_block(training: bool) -> None:
    """``alpha * E(h) + (1 - alpha) * h``, the expert having a norm and a residual of its own: E(h) = h + f(n(h))."""
    layer = layer_of("base_layers", "BaseLayersRouter").train(training)
    h_TD = tokens()
    n_TD = torch.nn.functional.rms_norm(h_TD, (DIM,))
    block = array(h_TD) + given(layer, n_TD)
    h, n = array(h_TD), array(n_TD)
    affinity = logits_of(n, array(layer.router.centroids))
    nearest = [row.index(max(row)) for row in affinity]
    expert_T = balanced_assignment(torch.tensor(affinity)).tolist() if training else nearest
    assert (expert_T != nearest) == training
    for t, e in enumerate(expert_T):
        alpha = sigmoid(affinity[t][e])
        expert = h[t] + ffn(layer, e, n[t])
        np.testing.assert_allclose(block[t], alpha * expert + (1 - alpha) * h[t], rtol=1e-4, atol=1e-5)


def megatron_sinkhorn(logits: list[list[float]], tolerance: float = 1e-4) -> list[list[float]]:
    cost = [[math.exp(z) for z in row] for row in logits]
    num_rows, num_columns = len(cost), len(cost[0])
    d1, error = [1.0] * num_columns, math.inf
    while error > tolerance:
        d0 = [1 / num_rows / (sum(a * b for a, b in zip(d1, row, strict=True)) + 1e-8) for row in cost]
        new = [1 / num_columns / (sum(d0[t] * cost[t][e] for t in range(num_rows)) + 1e-8) for e in range(num_columns)]
        error = sum(abs(a - b) for a, b in zip(d1, new, strict=True)) / num_columns
        d1 = new
    return [[d1[e] * cost[t][e] * d0[t] for e in range(num_columns)] for t in range(num_rows)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_is_megatrons(top_k: int, training: bool) -> None:
    layer = layer_of("sinkhorn", "SinkhornRouter", top_k=top_k, iterations=200).train(training)
    x_TD = tokens()
    x, out = array(x_TD), given(layer, x_TD)
    logits = logits_of(x, array(layer.router.gate))
    choose_by = megatron_sinkhorn(logits) if training else logits
    greedy = 0
    for t, row in enumerate(choose_by):
        chosen = sorted(range(EXPERTS), key=lambda e: -row[e])[:top_k]
        greedy += set(chosen) == set(sorted(range(EXPERTS), key=lambda e: -logits[t][e])[:top_k])
        activation = [sigmoid(z) for z in logits[t]] if top_k == 1 else softmax(logits[t])
        np.testing.assert_allclose(
            out[t], sum(activation[e] * ffn(layer, e, x[t]) for e in chosen), rtol=1e-4, atol=1e-5
        )
    assert (greedy < TOKENS) == training


@pytest.mark.parametrize("training", [True, False])
def test_expert_choice_is_flaxformers(training: bool) -> None:
    """Groups are sequences; each expert fills its slots with its best tokens, by 0/1 masks [expert, slot, token]."""
    layer = layer_of("expert_choice", "ExpertChoiceRouter", experts_per_token=2.0).train(training)
    x_TD, group = tokens(), TOKENS // 2
    x, out = array(x_TD), given(layer, x_TD, 2)
    slots = round(2.0 * group / EXPERTS)
    for start in (0, group):
        probs = [softmax(row) for row in logits_of(x[start : start + group], array(layer.router.gate))]
        dispatch, combine = (np.zeros((EXPERTS, slots, group)) for _ in range(2))
        for e in range(EXPERTS):
            for c, t in enumerate(sorted(range(group), key=lambda t: -probs[t][e])[:slots]):
                dispatch[e, c, t], combine[e, c, t] = 1.0, probs[t][e]
        received = np.einsum("ect,td->ecd", dispatch, x[start : start + group])
        made = np.stack([[ffn(layer, e, received[e, c]) for c in range(slots)] for e in range(EXPERTS)])
        wanted = np.einsum("ect,ecd->td", combine, made)
        np.testing.assert_allclose(out[start : start + group], wanted, rtol=1e-4, atol=1e-5)
        assert len(set(dispatch.sum((0, 1)).tolist())) > 1, "tokens get as many experts as want them"


def test_remoe_is_its_papers() -> None:
    """Gates, the loss by Switch's formula with ReLU for the probabilities, and ``lambda * alpha^sign(target - S)``."""
    start, factor, top_k = 0.01, 1.2, 2
    layer = layer_of("remoe", "ReMoERouter", top_k=top_k, l1_start=start, l1_factor=factor)
    x_TD, coefficient = tokens(), start
    for seed in range(3):
        x_TD = tokens(mean=-0.5 * seed)
        x = array(x_TD)
        produced = layer(x_TD, ids(x_TD), Replay())
        relu = [[max(z, 0.0) for z in row] for row in logits_of(x, array(layer.router.gate))]
        for t in range(TOKENS):
            wanted = sum((relu[t][e] * ffn(layer, e, x[t]) for e in range(EXPERTS)), np.zeros(DIM))
            np.testing.assert_allclose(array(produced.hidden_TD)[t], wanted, rtol=1e-4, atol=1e-5)
        per_expert = [sum(row[e] > 0 for row in relu) for e in range(EXPERTS)]
        summed = [sum(row[e] for row in relu) for e in range(EXPERTS)]
        unit = EXPERTS * coefficient / (TOKENS * TOKENS * top_k)
        loss = unit * sum(a * b for a, b in zip(summed, per_expert, strict=True))
        assert produced.losses.own.item() == pytest.approx(loss, rel=1e-4)
        sparsity = 1 - sum(per_expert) / (TOKENS * EXPERTS)
        coefficient *= factor ** np.sign(1 - top_k / EXPERTS - sparsity)
        counts_LE = torch.tensor([per_expert])
        layer.router.adjust(StepSeen(0, counts_LE, layer.router.statistics().unsqueeze(0), 1))
        assert layer.router.l1.item() == pytest.approx(coefficient, rel=1e-5)
