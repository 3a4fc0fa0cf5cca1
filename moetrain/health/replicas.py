"""What ranks hold in common is still the same on all of them, to the bit: else memory or a kernel has lied to one.

Compared are the model's weights as forward sees them and its persistent buffers, dense ones over the whole world,
experts over the ranks that hold the same; and, where every rank keeps them (local engine, ZeRO 0), fp32 masters and
optimiser state. What ZeRO cuts among ranks has no replica: masters and moments from stage 1 on, at stage 3 the weights.

One tensor at a time is hashed, so that nothing is held twice. One small collective tells whether all is well; if it is
not, two more tell where.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from moetrain.canonical import Names, Piece, Stretch, persistent_buffers
from moetrain.config import Config
from moetrain.engine import Engine
from moetrain.parallel.collectives import gather_equal, gather_texts
from moetrain.parallel.mesh import Mesh

log = logging.getLogger(__name__)
NUM_TOLD = 12
Digests = dict[str, bytes]


class Replicas:
    """Every rank has one and asks it alike. Made after the engine."""

    def __init__(self, config: Config, engine: Engine, mesh: Mesh) -> None:
        self._engine, self._mesh, self._every = engine, mesh, config.health.replicas_every
        stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
        self._keeps_masters = stage == 0
        self._names = Names(engine.model, mesh) if stage < 3 else None
        self._experts = engine.model.expert_names() if mesh.ep_size > 1 else frozenset()
        if self._every and mesh.world_size > 1 and not self._keeps_masters:
            what = "masters and optimiser state" if stage < 3 else "weights and optimiser state"
            log.info("replicas: at ZeRO %d each rank has %s of its own, which can not be compared", stage, what)

    def report(self, done: int, saves: bool) -> str:
        """What differs after step ``done``, the same on every rank; "" if nothing does or nothing is due. saves: a
        checkpoint is about to be written. Collective.
        """
        if not self._every or self._mesh.world_group is None or not (saves or done % self._every == 0):
            return ""
        dense, experts = self._digests()
        sums_2X = _rows([_digest(dense.values()), _digest(experts.values())], self._mesh)
        theirs_W2X = gather_equal(sums_2X, self._mesh.world_group).cpu()
        world_size, ep_size = self._mesh.world_size, self._mesh.ep_size
        peers = [theirs_W2X[:, 0], *(theirs_W2X[first:world_size:ep_size, 1] for first in range(ep_size))]
        if all(bool((rows_X == rows_X[0]).all()) for rows_X in peers):
            return ""
        return f"after step {done} ranks do not hold the same of\n{self._told(dense, experts)}"

    def _digests(self) -> tuple[Digests, Digests]:
        """By name, of what all ranks hold, and of what this rank's expert-DP group holds. In fp32 the model's weights
        may be the very memory of the masters: they are hashed once.
        """
        dense, experts, known = Digests(), Digests(), set()
        for piece in self._pieces():
            found = experts if self._experts.intersection(piece.key.split("/")) else dense
            place = (piece.values_X.data_ptr(), piece.values_X.nbytes)
            if place not in known and piece.key not in found:
                known.add(place)
                found[piece.key] = _digest([_bytes(piece.values_X)])
        return dense, experts

    def _pieces(self) -> Iterator[Piece]:
        if self._keeps_masters:
            yield from self._engine.state().held
        else:
            for name, buffer in persistent_buffers(self._engine.model).items():
                yield Piece(f"buffer/{name}", 0, buffer.view(-1))
        if self._names is not None:
            for name, param in self._engine.model.named_parameters():
                for s in self._names.cut(Stretch(name, 0, param.numel(), param.detach().view(-1), 0)):
                    yield Piece(f"model/{s.name}", s.start, s.master[s.at : s.at + s.size])

    def _told(self, dense: Digests, experts: Digests) -> str:
        """One line for each name: rank 0 tells of what is dense, each rank of the first EP group of its experts."""
        rank, world_size = self._mesh.rank, self._mesh.world_size
        digests_WNX = gather_equal(_rows([*dense.values(), *experts.values()], self._mesh), self._mesh.world_group)
        by_rank, lines = digests_WNX.tolist(), []
        for index, name in enumerate([*dense, *experts]):
            is_dense = index < len(dense)
            step = 1 if is_dense else self._mesh.ep_size
            if rank < step:
                said = verdict({r: tuple(by_rank[r][index]) for r in range(rank, world_size, step)})
                lines += [f"  {name}: {said}"] if said else []
        texts = gather_texts("\n".join(lines), self._mesh.world_group)
        every = [line for text in texts for line in text.splitlines()]
        more = [f"  and {len(every) - NUM_TOLD} more"] if len(every) > NUM_TOLD else []
        return "\n".join([*every[:NUM_TOLD], *more])


def verdict(digests: Mapping[int, tuple[int, ...]]) -> str:
    """Who of these ranks is wrong: the minority, where there is a majority. "" if all agree."""
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank, digest in digests.items():
        holders.setdefault(digest, []).append(rank)
    if len(holders) == 1:
        return ""
    most = max(holders.values(), key=len)
    if 2 * len(most) > len(digests):
        wrong = [rank for rank in digests if rank not in most]
        return f"ranks {wrong} are wrong, {len(most)} others agree"
    return " against ".join(f"ranks {ranks}" for ranks in holders.values()) + ", no majority tells who is wrong"


def _digest(parts: Iterable[bytes | memoryview]) -> bytes:
    content = xxhash.xxh3_128()
    for part in parts:
        content.update(part)
    return content.digest()


def _bytes(values_X: Tensor) -> memoryview:
    return memoryview(values_X.detach().cpu().contiguous().view(torch.uint8).numpy())


def _rows(digests: list[bytes], mesh: Mesh) -> Tensor:
    """int64 [len(digests), 2], on the mesh's device."""
    flat_Y = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)
    return flat_Y.view(len(digests), 2).to(mesh.device)
