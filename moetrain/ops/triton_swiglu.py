"""SwiGLU experts on an accelerator by Triton kernels that gather tokens where they are read.

No gathered copy of tokens is ever in memory: the first product reads each row's token, the backward reads the gradient
of each row's token, and the way home is a sum of rows in the order of choices. It keeps the token copies and the first
product, and takes the router's gradient from the gradient of the activation, so that the rows that experts give are not
kept either (the order of SonicMoE, Guo et al. 2025).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from moetrain.types import Dispatched


def has_triton() -> bool:
    """Whether Triton is installed and finds a device to compile for."""
    if find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except RuntimeError:
        return False
    return True


def triton_swiglu(sent: Dispatched, gate_up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
    """What ``experts_plain`` gives, [C, D]; sums are fp32, without atomics: the same bits again in the same process.

    x, gate_up and down: bf16 or fp32, one dtype, which the result has; weight_CK: fp32; ends_e: int32. Rows may be
    empty (``RowMap.has_empty`` is not looked at). ``rows_per_expert`` makes no difference: groups are found on the
    device. The host waits for nothing, but in the first call of a shape, which measures what tiles suit it: another
    process may choose others, and sum in another order.
    """
    from moetrain.ops.triton_backward import Groups, TritonSwiglu  # here, since not every machine has Triton

    assert all(t.is_contiguous() for t in (gate_up_eFD, down_eDF, sent.rows.row_TK))
    assert sent.x_CD.dtype == gate_up_eFD.dtype == down_eDF.dtype
    assert sent.ends_e.dtype == torch.int32
    groups, x_CD = Groups(sent.rows, sent.ends_e), sent.x_CD.contiguous()
    weight_CK = None if sent.weight_CK is None else sent.weight_CK.contiguous()
    out: Tensor = TritonSwiglu.apply(groups, x_CD, weight_CK, gate_up_eFD, down_eDF)
    return out
