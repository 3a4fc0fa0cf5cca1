"""The MoE layer: router -> capacity -> dispatch -> experts -> combine. It assembles; the parts do not know each
other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

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
from moetrain.moe.shadow import Shadows
from moetrain.moe.shared import SharedExperts
from moetrain.ops.init import Draw
from moetrain.ops.kernels import Kernels
from moetrain.ops.timeline import Timeline
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.share import Loan, Stacks, take_loan
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
        self.shadows = Shadows(num_experts, mesh)
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
        departure = set_out(self.dispatcher, through(x_TD, "route", "dispatch"), self.shadows.travels(placement))
        loan = self.shadows.lend(self.experts)
        stays = self.shadows.stays(x_TD, placement)
        self.timeline.mark("route")
        losses = self._observe(placement, num_sequences, domain_BS)
        self.timeline.mark("dispatch")
        work = partial(self._work, None if loan is None else loan.own)
        done = travel(departure, work, lambda: (self._near(stays, loan), self._shared(x_TD)))
        if self.training:
            self.gauges.record(placement, done.arrived if stays is None else [*done.arrived, stays], num_sequences)
        out_TD = through(self.dispatcher.join(done.home), "combine", "rest")
        return MoEOutput(self._whole(out_TD, *done.aside, x_TD, placement.routing.identity_T), losses)

    def _observe(self, placement: Placement, num_sequences: int, domain_BS: Tensor | None) -> LossTerms:
        """Count, and judge, what was routed."""
        if self.training:
            self.load.record(placement)
            if self.domains is not None:
                self.domains.record(placement.routing, domain_BS)
        return self.balance(placement.routing, num_sequences, self.load.pending_2E[0])

    def _work(self, stacks: Stacks | None, sent: Dispatched) -> Tensor:
        """The experts' part of a trip. stacks: their weights, where some of them are lent."""
        sent = replace(sent, x_CD=self.timeline.through(sent.x_CD, "dispatch", "experts"))
        sums_CD = self.experts(sent) if stacks is None else self.experts(sent, stacks)
        return self.timeline.through(sums_CD, "experts", "combine")

    def _near(self, stays: Dispatched | None, loan: Loan | None) -> Tensor | None:
        """What hot experts make of tokens that stay where they are, while others travel."""
        if stays is None or loan is None:
            return None
        stays = replace(stays, x_CD=self.timeline.through(stays.x_CD, "dispatch", "experts"))
        return self.timeline.through(self.experts(stays, take_loan(loan)), "experts", "dispatch")

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        """What shared experts do, while tokens travel."""
        if self.shared is None:
            return None
        through = self.timeline.through
        return through(self.shared(through(x_TD, "dispatch", "rest")), "rest", "dispatch")

    def _whole(
        self, out_TD: Tensor, near_TD: Tensor | None, shared_TD: Tensor | None, x_TD: Tensor, identity_T: Tensor | None
    ) -> Tensor:
        """What came home, and whatever else there is."""
        if near_TD is not None:
            out_TD = out_TD + near_TD
        if identity_T is not None:
            out_TD = out_TD + (identity_T.unsqueeze(1) * x_TD).to(x_TD.dtype)
        if self.shared is not None:
            assert shared_TD is not None
            out_TD = self.shared.join(out_TD, shared_TD)
        return out_TD

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
