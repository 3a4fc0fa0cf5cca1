"""What crosses a floor: frozen dataclasses, and the legend of shape suffixes used everywhere.

Shape legend (a tensor's name ends in its dims, ``x_TD`` is [T, D])::

    B  sequences on this rank in one micro-batch    S  tokens of a sequence      T = B*S tokens on this rank
    D  model width         F  expert width          V  vocabulary                L  MoE layers
    E  experts of a layer  e  experts held by this rank (E / G)                  G  EP ranks
    K  experts per token   N = T*K assignments      R  rows received             C  capacity: slots per expert

Counts are int64 and named ``num_*`` when they are Python ints. A mesh has axes, a tensor has dims.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of this rank.

    tokens_BS, targets_BS: int64, targets already shifted by one. ``document_BS``: int64, equal inside one document;
    None where attention may cross document borders. ``domain_BS``: int64, the number of the domain that a token comes
    from; None where the corpus names none.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    document_BS: Tensor | None = None
    domain_BS: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        document_BS = None if self.document_BS is None else self.document_BS.to(device)
        domain_BS = None if self.domain_BS is None else self.domain_BS.to(device)
        return Batch(self.tokens_BS.to(device), self.targets_BS.to(device), document_BS, domain_BS)


@dataclass(frozen=True)
class RouterInput:
    """What a router sees of one micro-batch. x_TD: any float dtype. tokens_BS: int64, the ids those rows came from."""

    x_TD: Tensor
    tokens_BS: Tensor


@dataclass(frozen=True)
class RouterSite:
    """Where a router stands. layer: the index of its block, from 0."""

    dim: int
    num_experts: int
    vocab_size: int
    layer: int
    device: torch.device


@dataclass(frozen=True)
class RouterTraits:
    """What a router says of itself before it is built.

    experts_per_token: k, or what is expected where it is ragged; zero-compute experts are not counted. causal_train,
    causal_eval: whether a token's choice is untouched by later tokens. ragged: rows of expert_TK may be partly invalid.
    needs_tokens: reads token ids. noise: in training only. balance: what evens the load besides a loss. even: every
    expert gets equally many tokens of a micro-batch in training, where E divides what there is to share out, so that no
    capacity of the fair share or more drops any; where E doesn't, and under slots for each sequence (capacity.scope =
    sequence), some can be dropped. expert_parallel: works where experts are sharded over ranks. moves_bias: by
    ``bias_rate``. per_expert: names of the parameters and buffers whose row e is expert e's, so that an expert can be
    started anew; some of them may be left out by settings; none: it can't.
    """

    experts_per_token: float
    causal_train: bool = True
    causal_eval: bool = True
    ragged: bool = False
    needs_tokens: bool = False
    noise: str = "none"
    balance: str = "none"
    even: bool = False
    expert_parallel: bool = True
    moves_bias: bool = False
    per_expert: tuple[str, ...] = ()


@dataclass(frozen=True)
class Routing:
    """What a router says about T tokens, before any capacity.

    logits_TE: fp32, the logits that the choice was made from (noise included, when there is any).
    probs_TE: fp32, rows sum to 1, over ALL experts: what the balance loss looks at.
    expert_TK: int64, global expert ids in [0, E), distinct within a row, best first.
    weight_TK: fp32, combine weights, differentiable.
    valid_TK: bool, which entries are assignments at all; None: all of them.
    identity_T: fp32, the weight with which the token itself is added to the layer's output (experts that compute
    nothing, a gate against the identity); None: not at all.
    own_loss: scalar with a graph and its coefficient applied, what the method adds to the loss; None: nothing.
    weight_on: whether weights multiply what experts give, or what they are given.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    valid_TK: Tensor | None = None
    identity_T: Tensor | None = None
    own_loss: Tensor | None = None
    weight_on: Literal["output", "input"] = "output"


@dataclass(frozen=True)
class Placement:
    """A routing after capacity: which assignments were kept, and the slot of each in its expert.

    routing: its weights may have been normalised anew over what was kept. kept_TK: bool, never true where an entry is
    no assignment. slot_TK: int64, the position in the expert's queue (under ``rank`` scope of this rank, under
    ``global`` scope of the whole micro-step), also for what was dropped. capacity: slots per expert, None when nothing
    is dropped.
    """

    routing: Routing
    kept_TK: Tensor
    slot_TK: Tensor
    capacity: int | None


@dataclass(frozen=True)
class RowMap:
    """Which token stands in which row, both ways.

    assignment_R: int64, the assignment t*K + k that a row carries, N where the row is empty. row_TK: int64, the row of
    each assignment, R where it has none (it was dropped). The two are inverse to each other. has_empty: whether any row
    may be empty (known without looking).
    """

    assignment_R: Tensor
    row_TK: Tensor
    has_empty: bool

    @property
    def token_R(self) -> Tensor:
        return self.assignment_R // self.row_TK.shape[1]

    @property
    def is_sparse(self) -> bool:
        """Whether most assignments have no row, by shape alone: a token's rows are then looked for among the rows."""
        return self.row_TK.numel() > 2 * self.assignment_R.numel()


@dataclass(frozen=True)
class Dispatched:
    """What arrived for this rank's experts, C copies of tokens, and the experts' rows that they make up.

    x_CD: the copies. rows: from copies to the rows of experts, which are grouped by local expert in ascending order,
    none of them empty. weight_CK: fp32, what multiplies an expert's part in the sum over a copy; None: nothing, where
    each copy has one row.
    ends_e: int32, where each expert's rows end (cumulative). rows_per_expert: R / e where it is the same for all
    experts by construction, else None. num_travelled: copies that other ranks have sent; empty slots count.
    weight_on: whether weights multiply what experts give, or what they are given.
    """

    x_CD: Tensor
    rows: RowMap
    weight_CK: Tensor | None
    ends_e: Tensor
    rows_per_expert: int | None
    num_travelled: int
    weight_on: Literal["output", "input"] = "output"


@dataclass(frozen=True)
class LossTerms:
    """Router losses, as scalars with a graph. All but ``own`` are without their coefficients.

    balance: 1.0 when the load is even. device, communication: the same over groups of experts and over the devices a
    token is sent to (DeepSeek-V2), 1.0 when even. importance: squared coefficient of variation of the experts' summed
    weights, 0 when even. z: mean squared log-partition. own: what the router's method adds, coefficient applied.
    depth: mean over blocks that tokens may pass by (not over MoE layers), the binary cross-entropy of their predictors
    in nats; 0 where there are none.
    """

    balance: Tensor
    device: Tensor
    communication: Tensor
    importance: Tensor
    z: Tensor
    own: Tensor
    depth: Tensor

    @staticmethod
    def zeros(device: torch.device) -> LossTerms:
        return LossTerms(*(torch.zeros((), device=device) for _ in fields(LossTerms)))

    @staticmethod
    def mean(terms: list[LossTerms]) -> LossTerms:
        """The mean over layers, which is what the coefficients multiply."""
        return LossTerms(*(torch.stack([getattr(t, f.name) for t in terms]).mean() for f in fields(LossTerms)))

    def detach(self) -> LossTerms:
        return LossTerms(*(getattr(self, f.name).detach() for f in fields(self)))

    def named(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class MoEOutput:
    """What an MoE layer gives back: hidden_TD and its own router losses."""

    hidden_TD: Tensor
    losses: LossTerms


@dataclass(frozen=True)
class ModelOutput:
    """What a forward of the whole model gives back.

    loss: scalar to differentiate, lm plus the router losses times their coefficients. lm: scalar, mean cross-entropy in
    nats.
    losses: means over the MoE layers that saw tokens (zeros if there are none).
    """

    loss: Tensor
    lm: Tensor
    losses: LossTerms


@dataclass(frozen=True)
class LoadCounts:
    """Expert load of this rank since the last ``take()``: int64. Zero-compute experts are not counted.

    assigned_LE: assignments before dropping. kept_LE: after dropping. domain_LDE: before dropping, by the domain of the
    token; None where the corpus names none.
    """

    assigned_LE: Tensor
    kept_LE: Tensor
    domain_LDE: Tensor | None = None

    def plus(self, other: LoadCounts) -> LoadCounts:
        """Both together."""
        domain_LDE = None
        if self.domain_LDE is not None and other.domain_LDE is not None:
            domain_LDE = self.domain_LDE + other.domain_LDE
        return LoadCounts(self.assigned_LE + other.assigned_LE, self.kept_LE + other.kept_LE, domain_LDE)


@dataclass(frozen=True)
class Gauges:
    """What one layer did on this rank, summed over tokens and micro-batches.

    choice_2K, position_2P: int64, assignments before and after dropping by rank of the choice and by part of the
    sequence. received: int64, rows of this rank's experts (empty slots of a padded exchange included). travelled:
    int64, rows that other ranks sent to this one.
    tokens, entropy (nats, of the full distribution), confidence (the largest probability), logit_square (mean over
    experts): fp64 sums. logit_peak: fp64, the largest absolute logit.
    """

    choice_2K: Tensor
    position_2P: Tensor
    received: Tensor
    travelled: Tensor
    tokens: Tensor
    entropy: Tensor
    confidence: Tensor
    logit_square: Tensor
    logit_peak: Tensor

    def plus(self, other: Gauges) -> Gauges:
        """Both together."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Gauges)}
        return Gauges(**sums | {"logit_peak": torch.maximum(self.logit_peak, other.logit_peak)})


@dataclass(frozen=True)
class Problem:
    """One mistake of the user's: which field, what it was, why it can't be, and what to do."""

    field: str
    value: object
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.reason}. Fix: {self.fix}."


class ConfigError(ValueError):
    """Every problem of a configuration at once; printed once and answered with exit code 2."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in problems))
