"""Which experts each token of a text chose, layer by layer. Plain values, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetrain.data import Tokenizer
from moetrain.inspect.loaded import Loaded
from moetrain.inspect.observe import Seen, observe
from moetrain.types import Batch, ConfigError, Problem


@dataclass(frozen=True)
class Choice:
    """slot: the position in the expert's queue. kept: False where that is beyond the capacity."""

    expert: int
    weight: float
    slot: int
    kept: bool


@dataclass(frozen=True)
class TokenRoute:
    """place: of the token in the text. choices: best first. identity: the weight with which experts that compute
    nothing give the token back. logits: one an expert, those that the choice was made from.
    """

    place: int
    choices: tuple[Choice, ...]
    identity: float
    logits: tuple[float, ...]


@dataclass(frozen=True)
class LayerRoutes:
    """capacity: slots per expert, None when nothing is dropped. routes: of the tokens that came to the layer."""

    layer: int
    num_experts: int
    capacity: int | None
    routes: tuple[TokenRoute, ...]

    @property
    def num_dropped(self) -> int:
        return sum(not choice.kept for route in self.routes for choice in route.choices)

    @property
    def num_choices(self) -> int:
        return sum(len(route.choices) for route in self.routes)


@dataclass(frozen=True)
class TextRoutes:
    """tokens: as they are to be shown, see ``shown``."""

    tokens: tuple[str, ...]
    layers: tuple[LayerRoutes, ...]


def text_routes(loaded: Loaded, text: str, layers: Sequence[int], *, train_capacity: bool) -> TextRoutes:
    """Raises ConfigError if the text is empty or longer than the model's context. layers: none for all."""
    tokenizer = loaded.tokenizer()
    ids = encode(loaded, tokenizer, text)
    seen, _ = observe(loaded.model, as_batch(ids), train_capacity=train_capacity)
    tokens = tuple(shown(tokenizer, token) for token in ids)
    return TextRoutes(tokens, tuple(_layer(one) for one in seen if not layers or one.layer in layers))


def encode(loaded: Loaded, tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that fits the model. Raises ConfigError."""
    ids: list[int] = tokenizer.encode_batch([text])[0].tolist()
    context = loaded.config.model.context
    if not ids:
        raise ConfigError([Problem("--text", text, "has no token", "give a few words")])
    if len(ids) > context:
        reason = f"has {len(ids)} tokens, the model's context is {context}"
        raise ConfigError([Problem("--text", f"{text[:40]}...", reason, "give a shorter text")])
    return ids


def as_batch(ids: Sequence[int]) -> Batch:
    """One sequence; its targets do not matter."""
    tokens_BS = torch.tensor([ids], dtype=torch.int64)
    return Batch(tokens_BS, tokens_BS)


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token to be read by itself: white space visible, and its id where it is no text, such as half a letter."""
    if token == tokenizer.end_of_document:
        return "<end>"
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text or not text.replace("\n", "").replace("\t", "").isprintable():
        return f"<{token}>"
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "→")


def _layer(seen: Seen) -> LayerRoutes:
    routing, placement = seen.placement.routing, seen.placement
    valid_TK = torch.ones_like(placement.kept_TK) if routing.valid_TK is None else routing.valid_TK
    identity_T = torch.zeros(len(seen.place_T)) if routing.identity_T is None else routing.identity_T
    columns = (seen.place_T, identity_T, routing.logits_TE, routing.expert_TK, routing.weight_TK)
    rows = zip(*(c.tolist() for c in (*columns, placement.slot_TK, placement.kept_TK, valid_TK)), strict=True)
    routes = tuple(_route(*row) for row in rows)
    return LayerRoutes(seen.layer, routing.logits_TE.shape[1], placement.capacity, routes)


def _route(
    place: int,
    identity: float,
    logits: list[float],
    experts: list[int],
    weights: list[float],
    slots: list[int],
    kept: list[bool],
    valid: list[bool],
) -> TokenRoute:
    every = zip(experts, weights, slots, kept, valid, strict=True)
    choices = tuple(Choice(e, _short(w), slot, is_kept) for e, w, slot, is_kept, is_valid in every if is_valid)
    return TokenRoute(place, choices, _short(identity), tuple(_short(logit) for logit in logits))


def _short(value: float) -> float:
    """Four digits are enough to read."""
    return float(f"{value:.4g}")
