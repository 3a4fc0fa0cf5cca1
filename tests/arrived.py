"""What arrived for experts, made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.experts import one_row_each
from moetrain.types import Dispatched, RowMap


def arrived(x_CD: Tensor, sizes: list[int], rows: RowMap | None = None, weight_CK: Tensor | None = None) -> Dispatched:
    """sizes: the rows of each expert, known to be equal where they are and there are any. Without ``rows`` each copy is
    a row, in order.
    """
    rows_per_expert = sizes[0] if len(set(sizes)) == 1 and sizes[0] else None
    ends_e = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return Dispatched(x_CD, rows or one_row_each(x_CD), weight_CK, ends_e, rows_per_expert, 0)
