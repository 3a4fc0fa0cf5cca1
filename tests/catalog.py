"""The routers that ship, as conf/router describes them: found by looking, so that a new one is tested at once."""

from __future__ import annotations

from functools import cache
from typing import Any

from moetrain.checks import traits_of
from moetrain.compose import compose, options
from moetrain.config import Config
from moetrain.types import RouterTraits
from tests.tiny import tiny

ROUTERS = options("router")


@cache
def router_part(name: str) -> dict[str, Any]:
    """The section that ``router=name`` gives, checked against eight experts."""
    return dict(compose([f"router={name}", "experts=e8", "experts.allow_noncausal=true"], 1).router)


def tiny_with(name: str, **changes: Any) -> Config:
    """The tiny config with that router; eight experts."""
    return tiny(router=router_part(name), experts__allow_noncausal=True, **changes)


def traits(name: str) -> RouterTraits:
    return traits_of(tiny_with(name))
