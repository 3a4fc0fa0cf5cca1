"""What a layer must not do, counted: bytes kept for backward, full-size zeros, and waits of the host for the device."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moetrain.moe.dispatch import merging
from moetrain.moe.layer import MoELayer
from moetrain.moe.replay import Replay
from moetrain.ops.kernels import torch_gemm, torch_kernels
from moetrain.ops.loop_swiglu import loop_swiglu
from moetrain.parallel.exchange import CountsInFlight
from moetrain.parallel.mesh import Mesh, mesh_of_world
from moetrain.types import Dispatched, MoEOutput
from tests.ranks import run_ranks
from tests.tiny import alone, ids, moe_layer, tiny

DIM, WIDTH, TOKENS, EXPERTS, TOP_K = 128, 96, 200, 8, 2
ROWS = TOKENS * TOP_K
INDEX_BYTES, ROUTER_TENSORS = 64, 3
"""What may be kept besides: of an assignment its places in both orders, its expert, its weight; of a token some fp32
numbers for each expert. Together less than one more number of width F for each assignment.
"""
STACKED = {EXPERTS * 2 * WIDTH * DIM * 4: "gate_up", EXPERTS * DIM * WIDTH * 4: "down"}
HOST_READS = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero")
COPIES = ("tolist", "numpy", "cpu")
UNKNOWN_SIZES = ("aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim", "aten.unique_consecutive")
INDEXING = ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_")


class NewBytes(TorchDispatchMode):
    """Every storage that is made while it is on, and the name of the operator that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.zeroed: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if "zero" in name or (name in ("full", "full_like", "fill_") and 0 in args):
                self.zeroed.append((name, tensor.nbytes))
            if storage._cdata not in known:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), name)
        return out

    def alive(self, besides: Iterable[Tensor]) -> dict[str, int]:
        """Bytes that are still there, by operator."""
        others, left = {x.untyped_storage()._cdata for x in besides}, Counter[str]()
        for key, (storage, size, name) in self.made.items():
            if key not in others and not storage.expired():
                left[name] += size
        return left


@contextmanager
def host_waits_seen() -> Iterator[list[str]]:
    """Where the host would wait for an accelerator: it reads numbers, or asks how large a result has become."""
    seen: list[str] = []
    with ExitStack() as stack:
        for name in COPIES:  # on a CPU they pass through no operator
            stack.enter_context(patch.object(Tensor, name, _counted(getattr(Tensor, name), seen)))
        stack.enter_context(_Operators(seen))
        yield seen


def _counted(method: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def inner(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dim() > 0:  # else it is one of the operators
            seen.append(method.__name__)
        return method(tensor, *args, **kwargs)

    return inner


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        by_mask = name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1]))
        repeats = name == "aten.repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in HOST_READS or name in UNKNOWN_SIZES or by_mask or repeats:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def layer_of(dispatch: str, mesh: Mesh, grouped: bool, factor: float | None = None, **other: Any) -> MoELayer:
    """grouped: by the kernels of an accelerator."""
    config = tiny(
        **other,
        dispatch=dispatch,
        model__dim=DIM,
        model__expert_dim=WIDTH,
        experts__num_experts=EXPERTS,
        capacity__factor_train=factor,
    )
    layer = moe_layer(config, mesh)
    kernels = torch_kernels()
    layer.experts.kernels = kernels if grouped else replace(kernels, experts=partial(loop_swiglu, torch_gemm))
    return layer


def given(seed: int) -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def forward(layer: MoELayer, x_TD: Tensor) -> MoEOutput:
    out: MoEOutput = layer(x_TD, ids(x_TD), Replay())
    return out


def backward(out: MoEOutput) -> None:
    (out.hidden_TD.square().sum() + 0.01 * out.losses.balance).backward()


def kept_bytes(layer: MoELayer, allowed: Callable[[], int]) -> tuple[int, dict[str, int]]:
    """What a forward leaves behind for backward, the tokens that it was given among it; and by which operators. gloo's
    threads let go of what they sent a while after it has arrived: so it is waited for, until it is what is allowed.
    """
    x_TD = given(0)
    backward(forward(layer, x_TD))
    with NewBytes() as new:
        out = forward(layer, x_TD)
    deadline = time.monotonic() + 20
    while True:
        left = new.alive(besides=[out.hidden_TD])
        kept = x_TD.nbytes + sum(left.values())
        if kept <= allowed() or time.monotonic() > deadline:
            return kept, left
        time.sleep(0.02)


def allowed_bytes(num_rows: int, num_tokens: int) -> int:
    """(D / k + 2F) fp32 numbers for each assignment, which is D for each token and 2F for each row; and the rest."""
    besides = num_rows * INDEX_BYTES + 4 * ROUTER_TENSORS * TOKENS * EXPERTS
    return 4 * (num_tokens * DIM + num_rows * 2 * WIDTH) + besides


def host_waits(layer: MoELayer, recompute: bool = False) -> list[str]:
    backward(forward(layer, given(0)))
    x_TD = given(1)
    with host_waits_seen() as seen:
        backward(checkpoint(forward, layer, x_TD, use_reentrant=False) if recompute else forward(layer, x_TD))
    return seen


@pytest.mark.parametrize("grouped", [False, True])
def test_for_backward_a_layer_keeps_its_tokens_and_the_first_product(grouped: bool) -> None:
    kept, left = kept_bytes(layer_of("local", alone(), grouped), lambda: allowed_bytes(ROWS, TOKENS))
    assert 4 * (TOKENS * DIM + ROWS * 2 * WIDTH) < kept <= allowed_bytes(ROWS, TOKENS), left


def made_in_backward(layer: MoELayer) -> tuple[Counter[str], list[tuple[str, int]]]:
    """How often something of the size of a stacked weight was made, and what of that size was filled with zeros."""
    out = forward(layer, given(0))
    with NewBytes() as new:
        backward(out)
    made = Counter(STACKED[size] for _, size, _ in new.made.values() if size in STACKED)
    return made, [(name, size) for name, size in new.zeroed if size >= min(STACKED)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dispatch", ["local", "padded"])
def test_gradients_of_stacked_weights_are_made_once_and_never_zeros(dispatch: str, grouped: bool) -> None:
    layer = layer_of(dispatch, alone(), grouped, 1.0 if dispatch == "padded" else None)
    made, zeroed = made_in_backward(layer)
    assert made == {"gate_up": 1, "down": 1}
    assert zeroed == []


def test_a_gradient_for_each_slice_is_counted() -> None:
    """As autograd makes them where somebody indexes a stack."""

    def indexing(sent: Dispatched, first: Tensor, second: Tensor) -> Tensor:
        stacks = torch.stack([first[0], first[1]]), torch.stack([second[0], second[1]])
        return sent.x_CD + 0 * stacks[0].sum() + 0 * stacks[1].sum()

    layer = layer_of("local", alone(), False)
    layer.experts.kernels = replace(torch_kernels(), experts=indexing)
    made, _ = made_in_backward(layer)
    assert min(made["gate_up"], made["down"]) > 1


READS: list[Callable[[Tensor], object]] = [
    lambda x: x.tolist(),
    lambda x: x[0].item(),
    lambda x: int(x[0]),
    lambda x: float(x[0]),
    lambda x: bool(x[0] > 3),
    lambda x: x.nonzero(),
    lambda x: x[x > 3],
    lambda x: torch.repeat_interleave(x, x),
    lambda x: x.cpu(),
    lambda x: x.unique(),
]


@pytest.mark.parametrize("read", READS)
def test_one_more_wait_anywhere_is_counted(read: Callable[[Tensor], object]) -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            read(torch.arange(4))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            read(torch.arange(4))
            return grads[0]

    layer, plain = layer_of("padded", alone(), True, 1.0), MoELayer.forward

    def reading(x_TD: Tensor, *rest: Any) -> MoEOutput:
        return plain(layer, Reads.apply(x_TD), *rest)

    layer.forward = reading  # type: ignore[method-assign]
    assert len(host_waits(layer)) == 2


def _sizes_of(numbers: list[int], _experts: Any, args: tuple[Dispatched]) -> None:
    numbers[:] = args[0].rows.assignment_R.numel(), args[0].x_CD.shape[0]


def waits_beside_counts(mesh: Mesh) -> list[str]:
    """Of a layer with shadows, and when counts set out and are waited for."""
    layer = layer_of("dedup", mesh, True)
    layer.shadows.put((1,))
    backward(forward(layer, given(0)))
    with host_waits_seen() as seen, ExitStack() as stack:
        for where, name in ((merging, "start_counts"), (CountsInFlight, "wait")):
            stack.enter_context(patch.object(where, name, _noted(getattr(where, name), seen)))
        backward(forward(layer, given(1)))
    return seen


def _noted(function: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def inner(*args: Any) -> Any:
        seen.append(function.__name__)
        return function(*args)

    return inner


def _on_two_ranks(rank: int, world: int) -> dict[str, Any]:
    mesh = mesh_of_world(world, torch.device("cpu"))
    found: dict[str, Any] = {"shadows": waits_beside_counts(mesh)}
    for grouped in (False, True):
        layer = layer_of("dedup", mesh, grouped)
        numbers = [0, 0]
        layer.experts.register_forward_pre_hook(partial(_sizes_of, numbers))
        kept, left = kept_bytes(layer, lambda: allowed_bytes(numbers[0], TOKENS + numbers[1]))  # noqa: B023
        found[f"kept {grouped}"] = kept, *numbers, left
    return found


def test_the_same_on_two_ranks() -> None:
    """There a token's row is kept once by its own rank, for the router, and once by each rank that it travels to."""
    for found in run_ranks(2, _on_two_ranks):
        for grouped in (False, True):
            kept, num_rows, num_copies, left = found[f"kept {grouped}"]
            assert TOKENS < num_copies < ROWS
            assert kept <= allowed_bytes(num_rows, TOKENS + num_copies), left
        assert found["shadows"] == ["start_counts", "aten._local_scalar_dense", "wait", "tolist"]
