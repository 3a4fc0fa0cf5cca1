"""One copy of a token for each node that holds any of its experts, and from there one for each rank there that does.

Results are summed where the experts are, then over the ranks of a node, then at home: so links between nodes carry a
token once there and its sum once back for each node that it reaches, at most the number of nodes, whatever k is
(DeepEP, DeepSeek 2025, sends so; Tutel, Hwang 2023, exchanges in two stages without merging). A rank sends to those in
its own place on other nodes, and they send on; so what is for another place travels on the links within a node besides,
and waits for two exchanges in place of one.

A payload is coded again at the second hop: fp8 codes stay as they are, sums and gradients are rounded once more.
"""

from __future__ import annotations

from moetrain.moe.dispatch.merging import Merging
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.wire import Payload
from moetrain.rules.layout import ranks_of_node


class HierarchicalDispatcher(Merging):
    """ranks_per_node: consecutive ranks with fast links between them; None: as many as torchrun has started on this
    host. An EP group within a node, or nodes of one rank, leave one hop, that of ``dedup``. Collective over the world.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        mesh: Mesh,
        timeline: Timeline,
        payload: Payload = "exact",
        chunks: int = 1,
        ranks_per_node: int | None = None,
    ) -> None:
        super().__init__(num_experts=num_experts, mesh=mesh, timeline=timeline, payload=payload, chunks=chunks)
        self.hops = mesh.hops_by_node(ranks_of_node(ranks_per_node))
