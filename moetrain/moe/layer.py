"""The MoE layer: router -> capacity -> dispatch -> experts -> combine. It assembles; the parts do not know each
other.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moetrain.checks import traits_of
from moetrain.config import Config
from moetrain.moe.adapt import Observed
from moetrain.moe.balance import Balance
from moetrain.moe.capacity import Capacity
from moetrain.moe.contract import break_of_contract
from moetrain.moe.domains import DomainLoad
from moetrain.moe.experts import Experts
from moetrain.moe.gauges import LayerGauges
from moetrain.moe.journey import set_out, travel
from moetrain.moe.load import ExpertLoad
from moetrain.moe.replay import Replay
from moetrain.moe.routers.base import Router
from moetrain.moe.shared import SharedExperts
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.parts import build
from moetrain.types import Dispatched, LossTerms, MoEOutput, Placement, RouterInput, RouterSite, Routing


class MoELayer(nn.Module):
    """One feed-forward layer with ``num_experts`` experts, of which this rank holds ``num_experts / ep_size``."""

    def __init__(
        self, config: Config, mesh: Mesh, timeline: Timeline, kernels: Kernels, vocab_size: int, layer: int
    ) -> None:
        """layer: the index of the block it stands in."""
        super().__init__()
        num_experts, allow = config.experts.num_experts, config.machine.allow_modules
        dim, expert_dim = config.model.dim, config.model.expert_dim
        num_local = num_experts // mesh.ep_size
        self.timeline = timeline
        site = RouterSite(dim, num_experts, vocab_size, layer, mesh.device)
        self.router: Router = build(config.router, allow, site=site)
        self.capacity = Capacity(config.capacity, num_experts, traits_of(config).experts_per_token, mesh)
        self.dispatcher = build(config.dispatch, allow, num_experts=num_experts, mesh=mesh, timeline=timeline)
        first_expert = mesh.ep_rank * num_local
        self.experts = Experts(config.experts, dim, expert_dim, num_local, first_expert, mesh.device, kernels)
        shared = config.experts.num_shared > 0
        self.shared = SharedExperts(config.experts, dim, expert_dim, mesh.device, kernels) if shared else None
        self.balance = Balance(config.balance, num_experts, mesh)
        self.load = ExpertLoad(num_experts, mesh.device)
        self.gauges, self.observed = LayerGauges(), Observed()
        self.domains: DomainLoad | None = None
        self._layer, self._judged = layer, mesh.device.type == "meta"

    def init_weights(self, draw: Draw, std: float, std_out: float) -> None:
        self.router.init_weights(draw.of("router"), std)
        self.experts.init_weights(draw.of("experts"), std, std_out)
        if self.shared is not None:
            self.shared.init_weights(draw.of("shared"), std, std_out)

    def forward(self, x_TD: Tensor, tokens_BS: Tensor, replay: Replay, domain_BS: Tensor | None = None) -> MoEOutput:
        """[T, D], and the ids of those tokens, whose rows are sequences -> [T, D] to be added to the residual.

        domain_BS: where tokens come from; only counted, and only if ``count_domains`` asked for it.
        """
        through, num_sequences = self.timeline.through, tokens_BS.shape[0]
        x_TD = through(x_TD, "rest", "route")
        chosen = self.router(RouterInput(x_TD, tokens_BS), replay)
        self._judge(chosen)
        placement = self.capacity(chosen, num_sequences, replay)
        trips = set_out(self.dispatcher, through(x_TD, "route", "dispatch"), placement)
        self.timeline.mark("route")
        losses = self._observe(placement, num_sequences, domain_BS)
        self.timeline.mark("dispatch")
        done = travel(trips, self._work, lambda: self._aside(x_TD))
        if self.training:
            self.gauges.record(placement, done.arrived, num_sequences)
        out_TD = through(self.dispatcher.join(done.home), "combine", "rest")
        if (identity_T := placement.routing.identity_T) is not None:
            out_TD = out_TD + (identity_T.unsqueeze(1) * x_TD).to(x_TD.dtype)
        if self.shared is not None:
            assert done.aside is not None
            out_TD = self.shared.join(out_TD, done.aside)
        return MoEOutput(out_TD, losses)

    def _observe(self, placement: Placement, num_sequences: int, domain_BS: Tensor | None) -> LossTerms:
        """Count, and judge, what was routed."""
        if self.training:
            self.load.record(placement)
            if self.domains is not None:
                self.domains.record(placement.routing, domain_BS)
        return self.balance(placement.routing, num_sequences, self.load.pending_2E[0])

    def _work(self, sent: Dispatched) -> Tensor:
        """The experts' part of a trip."""
        sent = replace(sent, x_CD=self.timeline.through(sent.x_CD, "dispatch", "experts"))
        return self.timeline.through(self.experts(sent), "experts", "combine")

    def _aside(self, x_TD: Tensor) -> Tensor | None:
        """What is done while tokens travel."""
        if self.shared is None:
            return None
        through = self.timeline.through
        return through(self.shared(through(x_TD, "dispatch", "rest")), "rest", "dispatch")

    def _judge(self, routing: Routing) -> None:
        """The first routing of some tokens, once: a router of one's own may break its contract. Raises ValueError."""
        if self._judged or routing.expert_TK.numel() == 0:
            return
        self._judged = True
        if (broken := break_of_contract(routing, self.balance.num_experts)) is not None:
            kind = type(self.router)
            raise ValueError(f"{kind.__module__}.{kind.__qualname__}, router of layer {self._layer}: {broken}")

    def count_domains(self, num_domains: int) -> None:
        """From now on count the load by domain too."""
        device = self.load.pending_2E.device
        self.domains = DomainLoad(num_domains, self.balance.num_experts, device) if num_domains else None

    def commit(self) -> None:
        """Count the micro-batch just done, once."""
        self.load.commit()
        if self.domains is not None:
            self.domains.commit()
        self.gauges.commit()
        if self.router.adapts:
            self.observed.commit(self.router)
