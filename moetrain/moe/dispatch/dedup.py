"""One copy of a token for each rank that holds any of its experts, and one weighted sum of their results back.

The bytes of a round trip fall from k rows a token to the number of ranks it reaches: under a uniform routing over G
ranks to G (1 - (1 - 1/G)^k), a quarter at k = 8 on two ranks. The weights travel along, so that the sum is taken where
the experts are; their gradients come home the same way (DeepEP, DeepSeek 2025, sends one copy a node so).
"""

from __future__ import annotations

from moetrain.moe.dispatch.merging import Merging
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.wire import Payload


class DedupDispatcher(Merging):
    """One hop over the EP group."""

    def __init__(
        self, *, num_experts: int, mesh: Mesh, timeline: Timeline, payload: Payload = "exact", chunks: int = 1
    ) -> None:
        super().__init__(num_experts=num_experts, mesh=mesh, timeline=timeline, payload=payload, chunks=chunks)
        self.hops = (mesh.hop,)
