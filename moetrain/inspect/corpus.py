"""What each expert specialises in over a sample of the run's validation data. Plain values, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.data import make_loader
from moetrain.inspect.loaded import Loaded
from moetrain.inspect.observe import Seen, observe
from moetrain.inspect.tally import Tally
from moetrain.inspect.text import shown
from moetrain.monitor.domains import divergences

TOP_TOKENS, TOP_PARTNERS = 12, 3
MIN_COUNT = 8
DIGITS = 6


@dataclass(frozen=True)
class TopToken:
    """lift: its share of the expert's assignments over its share of the layer's. count: assignments to the expert."""

    text: str
    lift: float
    count: int


@dataclass(frozen=True)
class Partner:
    """share: of the tokens that chose the one expert, those that chose ``expert`` too."""

    expert: int
    share: float


@dataclass(frozen=True)
class ExpertProfile:
    """load: assignments over the fair share. dropped: share of them, None if there are none. positions: load in each
    eighth of the sequence over the fair share of that eighth, None where the layer saw no token. domains: of each one,
    how often its tokens choose this expert over how often all tokens do, None where there are none.
    """

    expert: int
    load: float
    dropped: float | None
    positions: tuple[float | None, ...]
    tokens: tuple[TopToken, ...]
    partners: tuple[Partner, ...]
    domains: tuple[float | None, ...]


@dataclass(frozen=True)
class LayerProfile:
    """entropy: mean over tokens of that of the router's probabilities, in nats; uniform: the most it can be, ln E.

    vocabulary: the mean over token ids x (seen at least MIN_COUNT times) of max_e N_xe / N_x: 1 where every id always
    goes to one expert; None if there is no such id. divergence: of the domains, see moetrain.monitor.domains; None if
    tokens of fewer than two were seen.
    """

    layer: int
    num_experts: int
    entropy: float | None
    uniform: float
    vocabulary: float | None
    divergence: float | None
    experts: tuple[ExpertProfile, ...]


@dataclass(frozen=True)
class CorpusProfile:
    """num_tokens: of the sample. loss: mean cross-entropy over it, in nats. domains: names of those told apart."""

    source: str
    num_tokens: int
    loss: float
    min_count: int
    domains: tuple[str, ...]
    layers: tuple[LayerProfile, ...]


def corpus_profile(loaded: Loaded, num_batches: int, layers: Sequence[int], *, train_capacity: bool) -> CorpusProfile:
    """Look at the first ``num_batches`` micro-batches of validation windows. layers: none for all."""
    config, corpus = loaded.config, loaded.corpus()
    loader = make_loader(config, corpus, loaded.model.mesh)
    batches = [loader.validation(index) for index in range(num_batches)]
    ids_U = torch.cat([batch.tokens_BS.flatten() for batch in batches]).unique()
    tallies: dict[int, Tally] = {}
    losses = []
    for batch in batches:
        seen, loss = observe(loaded.model, batch, train_capacity=train_capacity)
        losses.append(loss)
        for one in [one for one in seen if not layers or one.layer in layers]:
            empty = Tally(_num_experts(one), ids_U, config.model.context, len(corpus.domains))
            tallies.setdefault(one.layer, empty).add(one, batch.domain_BS)
    words = [shown(corpus.tokenizer, token) for token in ids_U.tolist()]
    profiles = tuple(_layer(layer, tally, words) for layer, tally in tallies.items())
    num_tokens = sum(batch.tokens_BS.numel() for batch in batches)
    loss = sum(losses) / len(losses)
    return CorpusProfile(corpus.meta.source, num_tokens, loss, MIN_COUNT, corpus.domains, profiles)


def lift(counts_UE: Tensor) -> Tensor:
    """Share of each id in each expert over its share overall, fp64 [U, E]; NaN for an expert without assignments."""
    counts_UE = counts_UE.double()
    overall_U1 = counts_UE.sum(1, keepdim=True) / counts_UE.sum()
    return counts_UE / counts_UE.sum(0) / overall_U1


def vocabulary_specialisation(counts_UE: Tensor, occurred_U: Tensor, min_count: int) -> float | None:
    """mean_x max_e N_xe / N_x over the ids x that occurred at least ``min_count`` times; None if none did."""
    often_U = occurred_U >= min_count
    if not bool(often_U.any()):
        return None
    return float((counts_UE[often_U].amax(1).double() / occurred_U[often_U]).mean())


def _num_experts(seen: Seen) -> int:
    return seen.placement.routing.logits_TE.shape[1]


def _layer(layer: int, tally: Tally, words: Sequence[str]) -> LayerProfile:
    num_experts = tally.num_experts
    lift_UE, domain_DE = lift(tally.token_UE), lift(tally.domain_DE)
    experts = tuple(
        _expert(expert, tally, domain_DE, _top_tokens(tally.token_UE[:, expert], lift_UE[:, expert], words))
        for expert in range(num_experts)
    )
    entropy = tally.entropy / tally.num_tokens if tally.num_tokens else None
    vocabulary = vocabulary_specialisation(tally.token_UE, tally.occurred_U, MIN_COUNT)
    divergence = float(divergences(tally.domain_DE.unsqueeze(0).numpy())[0])
    told = divergence if math.isfinite(divergence) else None
    return LayerProfile(layer, num_experts, entropy, math.log(num_experts), vocabulary, told, experts)


def _expert(expert: int, tally: Tally, domain_DE: Tensor, tokens: tuple[TopToken, ...]) -> ExpertProfile:
    mine, every, fair_P = int(tally.assigned_E[expert]), int(tally.assigned_E.sum()), tally.position_PE.sum(1)
    positions = zip(tally.position_PE[:, expert].tolist(), (fair_P / tally.num_experts).tolist(), strict=True)
    return ExpertProfile(
        expert=expert,
        load=mine * tally.num_experts / max(every, 1),
        dropped=1 - int(tally.kept_E[expert]) / mine if mine else None,
        positions=tuple(count / fair if fair else None for count, fair in positions),
        tokens=tokens,
        partners=_partners(expert, tally),
        domains=tuple(one if math.isfinite(one) else None for one in domain_DE[:, expert].tolist()),
    )


def _top_tokens(count_U: Tensor, lift_U: Tensor, words: Sequence[str]) -> tuple[TopToken, ...]:
    """Highest lift first, and of equal ones, such as those that only this expert gets, the most frequent."""
    often = (count_U >= MIN_COUNT).nonzero().squeeze(1).tolist()
    ranked = sorted(often, key=lambda u: (round(float(lift_U[u]), DIGITS), int(count_U[u])), reverse=True)
    return tuple(TopToken(words[u], float(lift_U[u]), int(count_U[u])) for u in ranked[:TOP_TOKENS])


def _partners(expert: int, tally: Tally) -> tuple[Partner, ...]:
    """The experts that tokens choose most often together with this one."""
    together_E = tally.together_EE[expert].clone()
    together_E[expert] = 0
    order = together_E.sort(descending=True, stable=True).indices[:TOP_PARTNERS].tolist()
    mine = max(int(tally.assigned_E[expert]), 1)
    return tuple(Partner(other, int(together_E[other]) / mine) for other in order if together_E[other])
