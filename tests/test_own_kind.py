"""Routers of their own kind in which tokens choose: noisy top-k, hash, top-p, cosine and SparseMixer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import BalanceConfig
from moetrain.moe.balance import Balance
from moetrain.moe.noise import gumbel_like
from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router
from moetrain.moe.routers.cosine import CosineRouter
from moetrain.moe.routers.hash import HashRouter
from moetrain.moe.routers.noisy_topk import NoisyTopKRouter, smooth_load
from moetrain.moe.routers.scoring import best_experts
from moetrain.moe.routers.sparsemixer import SparseMixerRouter
from moetrain.moe.routers.top_p import TopPRouter
from moetrain.ops.init import Draw
from moetrain.types import RouterInput
from tests.gating import NONE_YET
from tests.tiny import VOCAB, alone, complete, seen, site


def made(kind: Callable[..., Router], std: float = 0.5, **settings: Any) -> Any:
    router = kind(site=site(), **settings)
    router.init_weights(Draw(3), std)
    return router


def random_noisy(top_k: int = 2) -> NoisyTopKRouter:
    """One whose gates have moved from 0."""
    router: NoisyTopKRouter = made(NoisyTopKRouter, top_k=top_k)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.gate, std=0.4)
    torch.nn.init.normal_(router.noise.gate, std=0.4)
    return router


def clean_and_std(router: NoisyTopKRouter, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits without noise, and the size of the noise."""
    with torch.no_grad():
        return x_TD @ router.gate.t(), torch.nn.functional.softplus(x_TD @ router.noise.gate.t())


def tokens(num: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(seed))


def phi(z: float) -> float:
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def cv2(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


@pytest.mark.parametrize("top_k", [2, 3])
def test_noisy_topk_losses_by_the_formula(top_k: int) -> None:
    router, x_TD = random_noisy(top_k), tokens()
    routing = router(seen(x_TD), Replay())
    clean_TE, std_TE = clean_and_std(router, x_TD)
    importance, load = [0.0] * 5, [0.0] * 5
    for t, row in enumerate(routing.logits_TE.tolist()):
        order = sorted(range(5), key=lambda e: -row[e])[:top_k]
        assert routing.expert_TK[t].tolist() == order
        total = sum(math.exp(row[e]) for e in order)
        for e in order:
            importance[e] += math.exp(row[e]) / total
        for e in range(5):
            threshold = sorted((row[j] for j in range(5) if j != e), reverse=True)[top_k - 1]
            load[e] += phi((float(clean_TE[t, e]) - threshold) / float(std_TE[t, e]))
    assert routing.own_loss is not None
    assert routing.own_loss.item() == pytest.approx(0.1 * cv2(importance) + 0.1 * cv2(load), rel=1e-4)
    quiet = router.eval()(seen(x_TD), Replay())
    weights_E = torch.zeros(24, 5).scatter(1, quiet.expert_TK, quiet.weight_TK).sum(0).tolist()
    assert quiet.own_loss is not None
    assert quiet.own_loss.item() == pytest.approx(0.1 * cv2(weights_E), rel=1e-4), "no load loss without noise"


def test_smooth_load_is_the_mean_load_over_draws() -> None:
    router, x_TD = random_noisy(), tokens(64)
    clean_TE, std_TE = clean_and_std(router, x_TD)
    smooth_E, counted_E = torch.zeros(5), torch.zeros(5)
    for _ in range(300):
        logits_TE = clean_TE + std_TE * torch.randn_like(clean_TE)
        best_TX = best_experts(logits_TE, 3)
        smooth_E += smooth_load(clean_TE, std_TE, logits_TE, best_TX) / 300
        counted_E += torch.bincount(best_TX[:, :2].flatten(), minlength=5) / 300
    torch.testing.assert_close(smooth_E, counted_E, rtol=0.03, atol=0)


def test_noisy_topk_starts_even_and_its_losses_reach_both_gates() -> None:
    router = made(NoisyTopKRouter)
    assert not router.gate.any()
    assert not router.noise.gate.any()
    routing = router(seen(tokens(500)), Replay())
    counts_E = torch.bincount(routing.expert_TK.flatten(), minlength=5)
    assert counts_E.min() > 150, "noise alone spreads 1000 choices over 5 experts"
    moved = random_noisy()
    moved(seen(tokens()), Replay()).own_loss.backward()
    assert moved.gate.grad.abs().sum() > 0
    assert moved.noise.gate.grad.abs().sum() > 0


def test_noisy_topks_importance_is_the_balance_losses() -> None:
    routing = made(NoisyTopKRouter, load_coef=0.0, importance_coef=0.3)(seen(tokens()), Replay())
    balance = Balance(BalanceConfig(importance_coef=1.0), 5, alone())
    assert routing.own_loss.item() == pytest.approx(0.3 * balance(routing, 1, NONE_YET[:5]).importance.item())


def test_hash_tables() -> None:
    random, other = made(HashRouter, top_k=2), HashRouter(site=site(), top_k=2)
    table_VK = random.expert_VK
    assert table_VK.shape == (VOCAB, 2)
    assert (table_VK[:, 0] != table_VK[:, 1]).all()
    assert torch.bincount(table_VK.flatten(), minlength=5).min() > 10
    other.init_weights(Draw(3, "blocks.1.").of("router"), 0.5)
    assert not torch.equal(table_VK, other.expert_VK), "another table in every layer"
    other.init_weights(Draw(3), 0.5)
    assert torch.equal(table_VK, other.expert_VK), "a function of the seed and the name"
    assert random.state_dict()["expert_VK"].dtype == torch.int64
    balanced = made(HashRouter, top_k=2, assignment="balanced").expert_VK
    assert balanced[:3].tolist() == [[0, 1], [2, 3], [4, 0]]
    counts_E = torch.bincount(balanced.flatten(), minlength=5)
    assert counts_E.max() - counts_E.min() <= 1


def test_hash_weights() -> None:
    tokens_BS = torch.tensor([[5, 9, 5], [63, 0, 9]])
    plain = made(HashRouter, top_k=2)
    routing = plain(RouterInput(tokens(6), tokens_BS), Replay())
    assert list(plain.parameters()) == []
    assert torch.equal(routing.expert_TK, plain.expert_VK[tokens_BS.flatten()])
    assert torch.equal(routing.weight_TK, torch.ones(6, 2))
    v4 = made(HashRouter, top_k=2, weights="sqrtsoftplus", renormalise="sum", scale=1.5)
    routing = v4(RouterInput(tokens(6), tokens_BS), Replay())
    for t, row in enumerate((tokens(6) @ v4.gate.t()).tolist()):
        pair = [math.sqrt(math.log1p(math.exp(row[e]))) for e in routing.expert_TK[t].tolist()]
        assert routing.weight_TK[t].tolist() == pytest.approx([1.5 * s / sum(pair) for s in pair], rel=1e-5)
    for weights, score in (("softmax", lambda l_TE: l_TE.softmax(-1)), ("sigmoid", torch.sigmoid)):
        scored = made(HashRouter, weights=weights)
        routing = scored(RouterInput(tokens(6), tokens_BS), Replay())
        expected_TK = score(tokens(6) @ scored.gate.t()).gather(1, routing.expert_TK)
        torch.testing.assert_close(routing.weight_TK, expected_TK)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("max_experts", [None, 2])
def test_top_p_by_the_formula(threshold: float, max_experts: int | None) -> None:
    router, x_TD = made(TopPRouter, threshold=threshold, max_experts=max_experts), tokens()
    routing = router(seen(x_TD), Replay())
    entropy = 0.0
    for t, p in enumerate((x_TD @ router.gate.t()).softmax(-1).tolist()):
        wanted, total = [], 0.0
        for e in sorted(range(5), key=lambda e: -p[e]):
            if total < threshold - 1e-6 and len(wanted) < (max_experts or 5):
                wanted.append(e)
                total += p[e]
        got = routing.expert_TK[t][routing.valid_TK[t]].tolist()
        assert got == wanted
        assert routing.weight_TK[t].tolist()[: len(got)] == pytest.approx([p[e] for e in got])
        assert not routing.weight_TK[t][len(got) :].any()
        entropy -= sum(q * math.log(q) for q in p) / len(x_TD)
    assert routing.own_loss.item() == pytest.approx(1e-4 * entropy, rel=1e-4)


def test_top_p_expects_what_even_probabilities_take() -> None:
    def expected(num_experts: int, **own: Any) -> float:
        return TopPRouter.traits(num_experts=num_experts, **complete(TopPRouter, **own)).experts_per_token

    assert expected(16) == 7
    assert expected(16, max_experts=4) == 4
    even = made(TopPRouter, std=0.0, threshold=0.5)(seen(tokens()), Replay())
    assert (even.valid_TK.sum(-1) == expected(5, threshold=0.5)).all()
    uneven = made(TopPRouter, threshold=0.6)(seen(tokens()), Replay())
    assert len(uneven.valid_TK.sum(-1).unique()) > 1, "a token takes as many as it needs"


@pytest.mark.parametrize("weights", ["scores", "chosen_softmax"])
@pytest.mark.parametrize("log_scale", [0.3, 7.0])
def test_cosine_by_the_formula(weights: str, log_scale: float) -> None:
    router, x_TD = made(CosineRouter, projection_dim=4, weights=weights), tokens()
    assert math.exp(router.log_scale.item()) == pytest.approx(2.0), "temperature 0.5"
    torch.nn.init.constant_(router.log_scale, log_scale)
    routing = router(seen(x_TD), Replay())
    for t in range(len(x_TD)):
        h = router.projection @ x_TD[t]
        cos = [(h @ e / h.norm() / e.norm()).item() for e in router.embedding]
        logits = [c * min(math.exp(log_scale), 100.0) for c in cos]
        assert routing.logits_TE[t].tolist() == pytest.approx(logits, rel=1e-4, abs=1e-4)
        order = sorted(range(5), key=lambda e: -logits[e])[:2]
        assert routing.expert_TK[t].tolist() == order
        over = range(5) if weights == "scores" else order
        exps = [math.exp(logits[e] - max(logits)) for e in over]
        expected = [math.exp(logits[e] - max(logits)) / sum(exps) for e in order]
        assert routing.weight_TK[t].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def identity_mixer(epsilon: float) -> SparseMixerRouter:
    """Its logits are its input, which must be 6 wide."""
    router = SparseMixerRouter(site=site(num_experts=6), epsilon=epsilon)
    torch.nn.init.eye_(router.gate)
    return router


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("training", [True, False])
def test_sparsemixer_is_phimoes(epsilon: float, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients under the same random numbers; phimoe writes 1/3 as 0.3333 and draws its last one twice."""
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    theirs_TE, ours_TE = (tokens(200).requires_grad_() for _ in range(2))
    torch.manual_seed(5)
    weight_TK, expert_TK = phimoe.sparsemixer(theirs_TE, epsilon, training)
    factor_TK = torch.rand(200, 2, generator=torch.Generator().manual_seed(1))
    (weight_TK * factor_TK).sum().backward()
    rand_like, calls = torch.rand_like, []

    def last_twice(x: Tensor) -> Tensor:
        calls.append(rand_like(x))
        return rand_like(x) if len(calls) == 2 else calls[0]

    monkeypatch.setattr(torch, "rand_like", last_twice)
    torch.manual_seed(5)
    routing = identity_mixer(epsilon).train(training)(seen(ours_TE), Replay())
    (routing.weight_TK * factor_TK).sum().backward()
    assert torch.equal(routing.expert_TK, expert_TK)
    torch.testing.assert_close(routing.weight_TK, weight_TK, rtol=2e-4 if training else 1e-6, atol=1e-7)
    torch.testing.assert_close(ours_TE.grad, theirs_TE.grad, rtol=1e-5, atol=1e-7)
    if training and epsilon == 2.0:
        assert (expert_TK[:, 0] != theirs_TE.argmax(-1)).any(), "the draw took another than the best"


def test_a_draw_that_is_not_the_best_has_its_whole_weight_in_one_case_of_four() -> None:
    x_TD = torch.tensor([[1.0, 1.1, -20.0, -20.0, -20.0, -20.0]]).expand(40_000, 6)
    routing = identity_mixer(0.3)(seen(x_TD), Replay())
    other_T = routing.expert_TK[:, 0] == 0
    chance = math.exp(1.0) / (math.exp(1.0) + math.exp(1.1))
    assert other_T.float().mean().item() == pytest.approx(chance, abs=0.01)
    whole_T = routing.weight_TK[other_T, 0] > 0.9 * chance
    assert whole_T.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(
        routing.weight_TK[other_T, 0][~whole_T], torch.full((int((~whole_T).sum()),), chance / 3)
    )


def test_a_draw_of_zero_does_not_overrule_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exponential draw can be 0; where all are, the noise is alike for all, and the best expert wins."""
    monkeypatch.setattr(Tensor, "exponential_", Tensor.zero_)
    assert torch.isfinite(gumbel_like(torch.ones(3))).all()
    x_TD = torch.tensor([[1.0, 1.1, 1.2, 0.9, 0.0, -1.0]])
    routing = identity_mixer(2.0)(seen(x_TD), Replay())
    assert routing.expert_TK.tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        (NoisyTopKRouter, {"top_k": 1}, "router.top_k"),
        (NoisyTopKRouter, {"top_k": 5}, "router.top_k"),
        (NoisyTopKRouter, {"load_coef": -0.1}, "router.load_coef"),
        (HashRouter, {"scale": 0.0, "weights": "softmax"}, "router.scale"),
        (HashRouter, {"scale": 2.0}, "router.scale"),
        (HashRouter, {"renormalise": "sum"}, "router.renormalise"),
        (HashRouter, {"weights": "sigmoid", "renormalise": "sum"}, "router.renormalise"),
        (TopPRouter, {"threshold": 0.0}, "router.threshold"),
        (TopPRouter, {"max_experts": 6}, "router.max_experts"),
        (TopPRouter, {"entropy_coef": -1.0}, "router.entropy_coef"),
        (CosineRouter, {"projection_dim": 0}, "router.projection_dim"),
        (CosineRouter, {"temperature": 0.01}, "router.temperature"),
        (CosineRouter, {"temperature": 0.0}, "router.temperature"),
        (CosineRouter, {"top_k": 1, "weights": "chosen_softmax"}, "router.weights"),
        (SparseMixerRouter, {"epsilon": -0.1}, "router.epsilon"),
    ],
)
def test_what_cannot_work_is_refused(kind: Any, settings: dict[str, Any], field: str) -> None:
    (problem,) = kind.problems(num_experts=5, **complete(kind, **settings))
    assert problem.field == field
    assert kind.problems(num_experts=5, **complete(kind)) == []
