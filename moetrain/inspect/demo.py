"""A tiny seeded layer for the routing walk without any run: six words, four experts, too few slots for all."""

from __future__ import annotations

import torch

from moetrain.config import CapacityConfig, ExpertsConfig
from moetrain.inspect.observe import Seen
from moetrain.moe.capacity import Capacity
from moetrain.moe.experts import Experts
from moetrain.moe.replay import Replay
from moetrain.moe.routers.token_choice import TokenChoiceRouter
from moetrain.ops.init import Draw
from moetrain.ops.kernels import make_kernels
from moetrain.parallel.mesh import Mesh
from moetrain.types import RouterInput, RouterSite

WORDS = ("to", "be", "or", "not", "to", "be")
DIM, NUM_EXPERTS, TOP_K, SEED = 8, 4, 2, 0
FACTOR = 0.8


def demo() -> Seen:
    """The router and capacity of conf/router/topk.yaml and conf/capacity/seed.yaml, but for fewer slots; no attention:
    equal words are equal vectors and choose alike.
    """
    mesh, draw = Mesh(rank=0, world_size=1, ep_size=1, device=torch.device("cpu")), Draw(SEED)
    vocabulary = sorted(set(WORDS))
    site = RouterSite(DIM, NUM_EXPERTS, len(vocabulary), 0, mesh.device)
    router = TokenChoiceRouter(site=site, top_k=TOP_K, select="logits", weights="chosen_softmax")
    router.init_weights(draw.of("router"), 0.5)
    capacity = Capacity(CapacityConfig(factor_eval=FACTOR, minimum=1), NUM_EXPERTS, TOP_K, mesh)
    kernels = make_kernels(mesh.device, "torch")
    experts = Experts(ExpertsConfig(num_experts=NUM_EXPERTS), DIM, DIM, NUM_EXPERTS, 0, mesh.device, kernels)
    experts.init_weights(draw.of("experts"), 0.5, 0.5)
    embedding_VD = torch.empty(len(vocabulary), DIM)
    draw.normal_(embedding_VD, "embedding", 1.0)
    tokens_BS = torch.tensor([[vocabulary.index(word) for word in WORDS]])
    given, replay = RouterInput(embedding_VD[tokens_BS[0]], tokens_BS), Replay()
    with torch.no_grad():
        placement = capacity.eval()(router.eval()(given, replay), 1, replay)
    return Seen(router, capacity, experts, given, placement, torch.arange(len(WORDS)))
