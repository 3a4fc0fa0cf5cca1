"""The routing walk in words and tables: Markdown with aligned columns, which reads as plain text too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moetrain.inspect.walk import Walk
from moetrain.moe.routers.scoring import Settings

MAX_COLUMNS = 16
NONE = "."


def walk_text(walk: Walk, title: str) -> str:
    """All steps. title: of which layer of what."""
    steps = (_logits, _noise, _top_k, _weights, _one_hot, _permute, _positions, _slots, _tensor, _back)
    parts = [f"# {title}", _intro(walk)]
    for number, step in enumerate(steps, start=1):
        name, body = step(walk)
        parts += [f"## {number}. {name}", body]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned; the first to the left, the others to the right."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[i]) for row in escaped)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(escaped[0]), line(rule), *(line(row) for row in escaped[1:])])


def _intro(walk: Walk) -> str:
    num_tokens, top_k = walk.expert_TK.shape
    slots = "as many slots as it needs" if walk.dropless else f"{walk.slots} slots"
    return (
        f"{num_tokens} tokens, {walk.logits_TE.shape[1]} experts, {top_k} a token, {slots} an expert. "
        f"The tokens: {' '.join(_code(word) for word in walk.words)}"
    )


def _logits(walk: Walk) -> tuple[str, str]:
    settings = walk.settings
    formula = "x W^T" if not settings.logit_bias else "x W^T + b"
    formula = formula if settings.logit_scale == 1 else f"{settings.logit_scale:g} ({formula})"
    cap = settings.logit_softcap
    formula = formula if cap is None else f"{cap:g} tanh({formula} / {cap:g})"
    says = f"A linear map gives each token a number for each expert: {formula}."
    return "Logits", f"{says}\n\n{_experts_table(walk, walk.logits_TE, _decimals)}"


def _noise(walk: Walk) -> tuple[str, str]:
    kind = walk.settings.noise
    says = "This router adds none in training either." if kind == "none" else f"In training it is {kind}."
    return "Noise", f"Off, as always outside of training. {says}"


def _top_k(walk: Walk) -> tuple[str, str]:
    top_k = walk.settings.top_k
    says = f"Each token chooses the {top_k} experts with the largest {_selected_from(walk.settings)}, best first."
    rows = [[_token(walk, t), *(str(e) for e in row)] for t, row in enumerate(walk.expert_TK.tolist())]
    chosen = table(["token", *(f"choice {k + 1}" for k in range(top_k))], rows)
    if walk.selection_TE.equal(walk.logits_TE):
        return "Top k", f"{says}\n\n{chosen}"
    selection = _experts_table(walk, walk.selection_TE, _decimals)
    return "Top k", f"{says} These are:\n\n{selection}\n\nand the choice is:\n\n{chosen}"


def _selected_from(settings: Settings) -> str:
    word = "logits" if settings.select == "logits" else f"scores ({_score(settings)})"
    word = word if settings.bias == "none" else f"{word} plus the balancing bias"
    groups = f", within its {settings.top_groups} best of {settings.num_groups} groups"
    return word if settings.num_groups == settings.top_groups else f"{word}{groups}"


def _score(settings: Settings) -> str:
    return "softmax over all experts" if settings.score == "softmax" else f"{settings.score} of the logits"


def _weights(walk: Walk) -> tuple[str, str]:
    settings = walk.settings
    made = {
        "scores": f"the scores ({_score(settings)}) of the chosen",
        "chosen_softmax": "a softmax over the logits of the chosen alone",
        "chosen_sigmoid": "a sigmoid of the logits of the chosen",
    }[settings.weights]
    words = [f"The weights are {made}"]
    words += [] if settings.renormalise == "none" else [f"divided by their {settings.renormalise.replace('_', '-')}"]
    words += [] if settings.scale == 1 else [f"times {settings.scale:g}"]
    sums = walk.weight_TK.sum(1).tolist()
    head = ["token", *(f"choice {k + 1}" for k in range(settings.top_k)), "sum"]
    rows = []
    for t, (experts, weights) in enumerate(zip(walk.expert_TK.tolist(), walk.weight_TK.tolist(), strict=True)):
        choices = (f"{weight:.2f} of {e}" for e, weight in zip(experts, weights, strict=True))
        rows.append([_token(walk, t), *choices, f"{sums[t]:.2f}"])
    return "Weights", f"{', '.join(words)}.\n\n{table(head, rows)}"


def _one_hot(walk: Walk) -> tuple[str, str]:
    says = "Each choice as a row with a single 1, in the column of its expert: tokens x choices x experts."
    num_tokens, top_k = walk.expert_TK.shape
    order = [(t, k) for t in range(num_tokens) for k in range(top_k)]
    rows_NE = walk.one_hot_TKE.flatten(0, 1)
    return "One-hot", f"{says}\n\n{_assignment_table(walk, order, rows_NE)}"


def _permute(walk: Walk) -> tuple[str, str]:
    says = (
        "Choices to the front, then flattened: all first choices come before all second ones, so that no token's "
        "second choice takes the slot of another's first."
    )
    return "Permute to choice-major", f"{says}\n\n{_assignment_table(walk, _choice_major(walk), walk.served_ME)}"


def _positions(walk: Walk) -> tuple[str, str]:
    says = (
        "The cumulative sum down each column, less 1, counts who came before: where a row has its 1 stands its "
        "position in that expert's queue (in brackets)."
    )
    cells = [
        [f"[{position}]" if is_one else str(position) for position, is_one in zip(row, ones, strict=True)]
        for row, ones in zip(walk.position_ME.tolist(), walk.served_ME.tolist(), strict=True)
    ]
    return "Cumulative sum", f"{says}\n\n{_assignment_cells(walk, _choice_major(walk), cells)}"


def _slots(walk: Walk) -> tuple[str, str]:
    num_dropped = int((~walk.kept_TK).sum())
    limit = (
        "There is no limit: every position is a slot."
        if walk.dropless
        else (
            f"Positions 0 to {walk.slots - 1} are slots; what comes later is dropped: {num_dropped} of "
            f"{walk.kept_TK.numel()} here. A token whose choices are all dropped passes by on the residual alone."
        )
    )
    if walk.renormalised:
        limit += " A token's weights are scaled up to make good what was dropped."
    top_k = walk.expert_TK.shape[1]
    rows = []
    for t, row in enumerate(zip(walk.expert_TK.tolist(), walk.slot_TK.tolist(), walk.kept_TK.tolist(), strict=True)):
        placed = (f"expert {e}, slot {c}" if kept else f"expert {e}, dropped" for e, c, kept in zip(*row, strict=True))
        rows.append([_token(walk, t), *placed])
    return "Slots", f"{limit}\n\n{table(['token', *(f'choice {k + 1}' for k in range(top_k))], rows)}"


def _tensor(walk: Walk) -> tuple[str, str]:
    weight_TS = walk.weight_TEC.flatten(1)
    columns = [i for i, used in enumerate(weight_TS.ne(0).any(0).tolist()) if used]
    empty = weight_TS.shape[1] - len(columns)
    shown = columns[:MAX_COLUMNS]
    says = (
        "The weights at their places, tokens x (expert.slot); where it is not 0 is the mask by which tokens go out. "
        f"Of {weight_TS.shape[1]} slots {empty} are empty{'' if shown == columns else _left_out(columns)}."
    )
    head = ["token", *(f"{i // walk.slots}.{i % walk.slots}" for i in shown)]
    rows = [
        [_token(walk, t), *(f"{row[i]:.2f}" if row[i] else NONE for i in shown)]
        for t, row in enumerate(weight_TS.tolist())
    ]
    return "Weight tensor", f"{says}\n\n{table(head, rows)}"


def _back(walk: Walk) -> tuple[str, str]:
    where = "given to the expert" if walk.settings.weight_on == "input" else "that the expert gives back"
    says = (
        f"Each slot's row goes to its expert and comes back; a token gets the sum over its slots, the weight being on "
        f"the row {where}. y3.1 is what expert 3 makes of slot 1. The sum, whose length is given, is "
        f"added to the residual."
    )
    norms = walk.out_TD.float().norm(dim=1).tolist()
    rows = [_sum(walk, t, norm) for t, norm in enumerate(norms)]
    return "What comes back", f"{says}\n\n{table(['token', 'sum', 'length'], rows)}"


def _sum(walk: Walk, token: int, norm: float) -> list[str]:
    rows = (walk.expert_TK[token], walk.slot_TK[token], walk.kept_weight_TK[token], walk.kept_TK[token])
    on_input = walk.settings.weight_on == "input"
    terms = [
        f"y{e}.{c}" if on_input else f"{weight:.2f} y{e}.{c}"
        for e, c, weight, kept in zip(*(row.tolist() for row in rows), strict=True)
        if kept
    ]
    return [_token(walk, token), " + ".join(terms) or "nothing", f"{norm:.3f}"]


def _experts_table(walk: Walk, values_TE: Tensor, spelt: Callable[[float], str]) -> str:
    shown, note = _columns(walk)
    rows = [[_token(walk, t), *(spelt(row[e]) for e in shown)] for t, row in enumerate(values_TE.tolist())]
    return table(["token", *(f"expert {e}" for e in shown)], rows) + note


def _assignment_table(walk: Walk, order: Sequence[tuple[int, int]], rows_NE: Tensor) -> str:
    cells = [[str(value) if value else NONE for value in row] for row in rows_NE.tolist()]
    return _assignment_cells(walk, order, cells)


def _assignment_cells(walk: Walk, order: Sequence[tuple[int, int]], cells: Sequence[Sequence[str]]) -> str:
    """cells: a row an assignment (token, choice) of ``order``, a column an expert."""
    shown, note = _columns(walk)
    rows = [
        [f"{_token(walk, t)}, choice {k + 1}", *(row[e] for e in shown)]
        for (t, k), row in zip(order, cells, strict=True)
    ]
    return table(["assignment", *(f"expert {e}" for e in shown)], rows) + note


def _columns(walk: Walk) -> tuple[list[int], str]:
    """The experts to show: all of them, or of many those that somebody chose; and what to say about the others."""
    num_experts = walk.logits_TE.shape[1]
    if num_experts <= MAX_COLUMNS:
        return list(range(num_experts)), ""
    chosen = sorted(set(walk.expert_TK.flatten().tolist()))
    note = f"\n\nOf {num_experts} experts those that were chosen{_left_out(chosen)}."
    return chosen[:MAX_COLUMNS], note


def _left_out(every: Sequence[int]) -> str:
    return "" if len(every) <= MAX_COLUMNS else f" (the first {MAX_COLUMNS} of {len(every)} are shown)"


def _choice_major(walk: Walk) -> list[tuple[int, int]]:
    num_tokens, top_k = walk.expert_TK.shape
    return [(t, k) for k in range(top_k) for t in range(num_tokens)]


def _token(walk: Walk, token: int) -> str:
    return f"{token}: {_code(walk.words[token])}"


def _code(word: str) -> str:
    """Nothing in it is Markdown."""
    return f"`` {word} ``" if "`" in word else f"`{word}`"


def _decimals(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero
