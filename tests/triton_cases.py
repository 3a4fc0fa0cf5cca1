"""The Triton kernels in Triton's interpreter, against autograd: started by test_triton.py as a program of its own,
since the interpreter is chosen by the environment before Triton is imported. Prints a JSON object, see ``main``.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from moetrain.ops.grouped_swiglu import experts_plain
from moetrain.ops.triton_swiglu import triton_swiglu
from moetrain.types import RowMap
from tests.arrived import arrived

NUM_COPIES, DIM, WIDTH, NUM_EXPERTS = 21, 24, 40, 3
"""None is a multiple of the interpreter's tiles of 16; an expert that gets all has two tiles."""
IN_BF16 = ("random", "padded")


def routed(case: str) -> tuple[RowMap, list[int]]:
    """Rows grouped by expert, and how many each has."""
    top_k, generator = 9 if case == "ragged" else 2, torch.Generator().manual_seed(3)
    if case == "ragged":
        expert_CK = torch.randint(0, NUM_EXPERTS, (NUM_COPIES, top_k), generator=generator)
    else:
        expert_CK = torch.rand(NUM_COPIES, NUM_EXPERTS, generator=generator).argsort(1)[:, :top_k]
    kept_CK = torch.ones(expert_CK.shape, dtype=torch.bool)
    if case == "empty expert":
        kept_CK = expert_CK != 1
    if case == "all to one":
        expert_CK, kept_CK = torch.full_like(expert_CK, 2), torch.arange(top_k).expand(NUM_COPIES, -1) == 1
    if case in ("dropped", "ragged"):
        kept_CK = torch.rand(expert_CK.shape, generator=generator) > 0.7
        kept_CK[4] = False
    if case == "no rows":
        kept_CK = torch.zeros_like(kept_CK)
    assignment_R = kept_CK.flatten().nonzero().flatten()
    assignment_R = assignment_R[expert_CK.flatten()[assignment_R].argsort(stable=True)]
    sizes = torch.bincount(expert_CK.flatten()[assignment_R], minlength=NUM_EXPERTS)
    if case == "padded":
        slots = int(sizes.max()) + 1
        blocks = [
            torch.cat([b, b.new_full((slots - len(b),), kept_CK.numel())]) for b in assignment_R.split(sizes.tolist())
        ]
        assignment_R, sizes = torch.cat(blocks), torch.full_like(sizes, slots)
    row_N = torch.full((kept_CK.numel() + 1,), len(assignment_R))
    row_N[assignment_R] = torch.arange(len(assignment_R))
    row_N[-1] = len(assignment_R)
    return RowMap(assignment_R, row_N[:-1].view(NUM_COPIES, top_k), True), sizes.tolist()


def results(case: str, dtype: torch.dtype, plain: bool) -> dict[str, Tensor]:
    """The output and the gradients."""
    torch.manual_seed(0)
    rows, sizes = routed(case)
    x_CD = torch.randn(rows.row_TK.shape[0], DIM).to(dtype).requires_grad_()
    weight_CK = None if case == "no weights" else torch.rand(rows.row_TK.shape).requires_grad_()
    shapes = ((NUM_EXPERTS, 2 * WIDTH, DIM), (NUM_EXPERTS, DIM, WIDTH))
    gate_up_eFD, down_eDF = ((torch.randn(shape) / 5).to(dtype).requires_grad_() for shape in shapes)
    copies_CD = torch.cat([x_CD, x_CD.new_zeros(1, DIM)]) if plain else x_CD
    experts = experts_plain if plain else triton_swiglu
    out = experts(arrived(copies_CD, sizes, rows, weight_CK), gate_up_eFD, down_eDF)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    given = {"x": x_CD, "weight": weight_CK, "gate_up": gate_up_eFD, "down": down_eDF}
    return {"out": out.detach(), **{name: t.grad for name, t in given.items() if t is not None}}


def main(cases: list[str]) -> None:
    """For each case, dtype and tensor: the error and the norm of the reference."""
    errors = {}
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16) if case in IN_BF16 else (torch.float32,):
            found, plain = results(case, dtype, False), results(case, dtype, True)
            for name, theirs in plain.items():
                ours = found[name]
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                error = (ours.double() - theirs.double()).norm()
                errors[f"{case}, {dtype}, {name}"] = [float(error), float(theirs.double().norm())]
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1:])
