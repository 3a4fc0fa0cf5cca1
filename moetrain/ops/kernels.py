"""Which implementation of a matrix product this process uses: chosen when a model is built, and handed down.

On an accelerator torch's own kernels are right. On a CPU torch sends fp32 products to MKL, which gives some processors
less than half of their speed; oneDNN, which torch ships too, gives it whole. Which is faster here is found by a short
measurement; where oneDNN is not to be had, torch's own product is used, and ``Kernels.gemm_name`` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from moetrain.ops.grouped_swiglu import grouped_swiglu
from moetrain.ops.loop_swiglu import Gemm, loop_swiglu
from moetrain.ops.triton_swiglu import has_triton, triton_swiglu
from moetrain.types import ConfigError, Dispatched, Problem

GemmName = Literal["torch", "onednn"]
ExpertsName = Literal["loop or grouped_mm", "grouped_mm", "triton"]
PROBE_SIZE, PROBE_ROUNDS, CLEAR_GAIN = 512, 5, 1.15
LEAST_WORK = 12_000_000
"""FLOPs of an expert's forward, on average, below which a loop in Python costs more than a faster product gains."""


@dataclass(frozen=True)
class Kernels:
    """linear: [..., I] x [O, I] -> [..., O]. experts: SwiGLU on what arrived, (sent, gate_up_eFD, down_eDF) -> [C, D],
    as ``experts_plain``; weights multiply what experts give.
    """

    gemm_name: GemmName
    experts_name: ExpertsName
    linear: Callable[[Tensor, Tensor], Tensor]
    experts: Callable[[Dispatched, Tensor, Tensor], Tensor]


def make_kernels(device: torch.device, gemm_name: GemmName, experts: Literal["torch", "triton"] = "torch") -> Kernels:
    """The kernels of a device. On a CPU experts are taken one by one where that pays (``LEAST_WORK``), elsewhere by
    torch's grouped product or, if asked for, by Triton kernels that gather tokens where they are read.
    """
    if experts == "triton":
        if not has_triton():
            reason, fix = "Triton finds no device that it can compile for", "set machine.experts_kernel=torch"
            raise ConfigError([Problem("machine.experts_kernel", experts, reason, fix)])
        return Kernels("torch", "triton", torch.nn.functional.linear, triton_swiglu)
    if device.type != "cpu":
        return torch_kernels()
    gemm, linear = (torch_gemm, torch.nn.functional.linear) if gemm_name == "torch" else (onednn_gemm, onednn_linear)
    return Kernels(gemm_name, "loop or grouped_mm", linear, partial(_loop_or_grouped, gemm))


def torch_kernels() -> Kernels:
    """Torch's own products throughout, experts by its grouped one: those of an accelerator, which work on a CPU too."""
    return Kernels("torch", "grouped_mm", torch.nn.functional.linear, grouped_swiglu)


def _loop_or_grouped(gemm: Gemm, sent: Dispatched, gate_up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
    """One by one, unless there is too little to do for each: by torch's grouped product then. The number of rows that
    have come decides, so that a rank may round one way in one step and the other way in the next.
    """
    work = 6 * sent.rows.assignment_R.shape[0] * down_eDF[0].numel() / down_eDF.shape[0]
    if work >= LEAST_WORK:
        return loop_swiglu(gemm, sent, gate_up_eFD, down_eDF)
    return grouped_swiglu(sent, gate_up_eFD, down_eDF)


def fastest_gemm(device: torch.device) -> GemmName:
    """``onednn`` if it is clearly faster in fp32 than torch's own product on this CPU; a measurement of some 20 ms."""
    if device.type != "cpu" or not has_onednn():
        return "torch"
    x = torch.ones(PROBE_SIZE, PROBE_SIZE)
    gain = _seconds(torch_gemm, x) / _seconds(onednn_gemm, x)
    return "onednn" if gain > CLEAR_GAIN else "torch"


def has_onednn() -> bool:
    """Whether this build of torch has the operator; it is not public, so it may go."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def torch_gemm(a_MK: Tensor, b_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """``a b^T``; either may be a transposed view."""
    return torch.mm(a_MK, b_NK.t(), out=out)


def onednn_gemm(a_MK: Tensor, b_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """The same in exact fp32. Other dtypes go the common way, which is oneDNN already."""
    if a_MK.dtype != torch.float32 or a_MK.numel() == 0 or b_NK.numel() == 0:
        return torch_gemm(a_MK, b_NK, out)
    product_MN = _pointwise(b_NK, a_MK).t() if _is_wide(a_MK, b_NK) else _pointwise(a_MK, b_NK)
    return product_MN if out is None else out.copy_(product_MN)


def _is_wide(a_MK: Tensor, b_NK: Tensor) -> bool:
    """Whether ``b a^T`` turns fewer numbers: a left factor that lies transposed is turned before the product, that
    product after it.
    """
    (rows, depth), columns = a_MK.shape, b_NK.shape[0]
    return a_MK.stride(0) == 1 and columns * (rows + depth) < rows * depth


def _pointwise(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return out


def onednn_linear(x_XI: Tensor, weight_OI: Tensor) -> Tensor:
    """``linear`` with its backward, all three products by ``onednn_gemm``."""
    out: Tensor = _Linear.apply(x_XI.reshape(-1, x_XI.shape[-1]), weight_OI)
    return out.view(*x_XI.shape[:-1], weight_OI.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        return onednn_gemm(x_RI, weight_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_RI, weight_OI = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        return onednn_gemm(grad_RO, weight_OI.t()), onednn_gemm(grad_RO.t(), x_RI.t())


def _seconds(gemm: Gemm, x: Tensor) -> float:
    """The best of some rounds."""
    best = float("inf")
    for _ in range(PROBE_ROUNDS):
        start = perf_counter()
        gemm(x, x)
        best = min(best, perf_counter() - start)
    return best
