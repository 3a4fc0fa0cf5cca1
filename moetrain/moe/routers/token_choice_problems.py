"""Settings of the token-choice router that can't work, each with its reason and what to set instead."""

from __future__ import annotations

from moetrain.moe.noise import Noise
from moetrain.moe.routers.scoring import Settings
from moetrain.problems import typed
from moetrain.types import Problem

GROUP_SCORE, BIAS_RATE, BIAS_CENTRED = "max", 1e-3, True
"""The defaults of ``TokenChoiceRouter``: what a key may be although it plays no part."""


def settings_problems(num_experts: int, settings: Settings) -> list[Problem]:
    """All of them at once. That ``top_k`` lies between 1 and the number of experts is a rule of its own."""
    if not 1 <= settings.top_k <= num_experts:
        return []
    problems = _weight_problems(settings) + _number_problems(settings) + _group_problems(num_experts, settings)
    problems += _bias_problems(num_experts, settings) + _zero_problems(settings)
    return problems + Noise.problems(settings.noise, settings.noise_scale, settings.noise_steps)


def _weight_problems(settings: Settings) -> list[Problem]:
    problems = []
    weights, one = settings.weights, settings.top_k == 1
    if one and weights == "chosen_softmax":
        reason = "softmax over one chosen logit is always 1, so the router would get no gradient from the model"
        problems.append(Problem("router.weights", weights, reason, "set router.weights=scores, or router.top_k=2"))
    elif weights == "chosen_softmax" and settings.score != "softmax":
        reason = f"the balance loss would look at router.score={settings.score}, which the weights know nothing of"
        problems.append(
            Problem("router.weights", weights, reason, "set router.score=softmax, or router.weights=scores")
        )
    elif weights == "chosen_sigmoid" and settings.score == "sqrtsoftplus":
        reason = "sigmoids of the chosen logits belong to no score of router.score=sqrtsoftplus"
        problems.append(
            Problem("router.weights", weights, reason, "set router.score=sigmoid, or router.weights=scores")
        )
    renormalise = settings.renormalise
    if renormalise != "none" and one:
        reason = "one weight divided by itself is always 1, so the router would get no gradient from the model"
        problems.append(Problem("router.renormalise", renormalise, reason, "set router.renormalise=none"))
    elif renormalise == "sum" and weights == "chosen_softmax":
        reason = "a softmax over the chosen sums to 1 already"
        problems.append(Problem("router.renormalise", renormalise, reason, "set router.renormalise=none"))
    if settings.second == "random" and settings.top_k != 2:
        reason = f"draws whether the second of two experts is used, not of {settings.top_k}"
        problems.append(Problem("router.second", "random", reason, "set router.top_k=2, or router.second=always"))
    return problems


def _number_problems(settings: Settings) -> list[Problem]:
    positive = {"renorm_p": settings.renorm_p, "scale": settings.scale, "logit_scale": settings.logit_scale}
    positive |= {} if settings.logit_softcap is None else {"logit_softcap": settings.logit_softcap}
    problems = [
        Problem(f"router.{name}", value, "must be greater than 0", f"set router.{name}=1.0, say")
        for name, value in positive.items()
        if value <= 0
    ]
    for name, value in (("renorm_eps", settings.renorm_eps), ("renorm_min", settings.renorm_min)):
        if value < 0:
            problems.append(Problem(f"router.{name}", value, "must not be negative", f"set router.{name}=0.0"))
        elif value > 0 and settings.renormalise == "none":
            reason = "has no part in router.renormalise=none"
            fix = f"set router.{name}=0.0, or router.renormalise=sum"
            problems.append(Problem(f"router.{name}", value, reason, fix))
    if settings.renorm_p != 1.0 and settings.renormalise != "p_norm":
        reason = f"has no part in router.renormalise={settings.renormalise}"
        fix = "set router.renorm_p=1.0, or router.renormalise=p_norm"
        problems.append(Problem("router.renorm_p", settings.renorm_p, reason, fix))
    return problems


def _group_problems(num_experts: int, settings: Settings) -> list[Problem]:
    groups, top_groups, by = settings.num_groups, settings.top_groups, settings.group_score
    if groups < 1 or num_experts % groups:
        divisors = " | ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        reason = f"must divide experts.num_experts = {num_experts} into equal groups"
        return [Problem("router.num_groups", groups, reason, f"set router.num_groups={divisors}")]
    if groups == 1 and top_groups > 1:
        fix = f"set router.num_groups={_split(num_experts, top_groups)} too, say, or router.top_groups=1"
        return [Problem("router.top_groups", top_groups, "router.num_groups = 1, so there is one group", fix)]
    if not 1 <= top_groups <= groups:
        reason = f"a token keeps at least one of router.num_groups = {groups} groups and at most all"
        return [Problem("router.top_groups", top_groups, reason, f"set router.top_groups=1 to {groups}")]
    size = num_experts // groups
    problems = []
    if top_groups * size < settings.top_k:
        enough = -(-settings.top_k // size)
        reason = f"{top_groups * size} experts are left for a token that chooses router.top_k = {settings.top_k}"
        problems.append(Problem("router.top_groups", top_groups, reason, f"set router.top_groups={enough} or more"))
    if by != GROUP_SCORE and groups == top_groups:
        reason = f"has no part in it, since a token keeps all router.num_groups = {groups}"
        problems.append(Problem("router.group_score", by, reason, f"set router.group_score={GROUP_SCORE}"))
    elif by == "top2_sum" and size < 2:
        reason = "needs two experts in a group, and groups have one"
        problems.append(Problem("router.group_score", by, reason, "set router.group_score=max"))
    if by == "max" and settings.top_k <= top_groups < groups:
        reason = f"limits nothing: the best router.top_k = {settings.top_k} experts lie in the {top_groups} best groups"
        most = settings.top_k - 1
        fewer = f"router.top_groups={most}{' or less' if most > 1 else ''}, " if most else ""
        fix = f"set {fewer}router.top_k={top_groups + 1} or more, or router.group_score=top2_sum"
        problems.append(Problem("router.top_groups", top_groups, reason, fix))
    return problems


def _split(num_experts: int, top_groups: int) -> int:
    """The smallest number of equal groups of which ``top_groups`` are not all; all experts if there is none."""
    return next((n for n in range(top_groups + 1, num_experts + 1) if num_experts % n == 0), num_experts)


def _bias_problems(num_experts: int, settings: Settings) -> list[Problem]:
    bias, rate, centred = settings.bias, settings.bias_rate, settings.bias_centred
    problems: list[Problem] = []
    highest = 1.0 if bias == "quantile" else float("inf")
    if bias not in ("none", "frozen") and not 0 < rate <= highest:
        allowed = "must be greater than 0" + (" and at most 1: it is a share" if bias == "quantile" else "")
        usual = 0.1 if bias == "quantile" else 0.001
        problems.append(Problem("router.bias_rate", rate, allowed, f"set router.bias_rate={usual}, say"))
    if bias in ("none", "frozen"):
        problems += [
            Problem(f"router.{name}", value, f"has no part in router.bias={bias}", f"set router.{name}={typed(usual)}")
            for name, value, usual in (("bias_rate", rate, BIAS_RATE), ("bias_centred", centred, BIAS_CENTRED))
            if value != usual
        ]
    if bias != "quantile":
        return problems
    reason = ""
    if num_experts <= settings.top_k:
        reason = f"looks at the expert after the last chosen, and all {num_experts} are chosen"
    elif settings.num_groups > settings.top_groups:
        reason = "looks at the best expert that was left, which groups may have forbidden"
    elif settings.zero_experts:
        reason = "gives every expert its even share of a token's choices, of which zero experts would take some"
    if reason:
        problems.append(Problem("router.bias", bias, reason, "set router.bias=sign, say"))
    return problems


def _zero_problems(settings: Settings) -> list[Problem]:
    num = settings.zero_experts
    if num < 0:
        return [Problem("router.zero_experts", num, "is a number of experts", "set router.zero_experts=0")]
    if num == 0:
        return []
    problems = []
    if settings.weight_on == "input":
        reason = "an expert that gives its input back has no input of its own to put the weight on"
        problems.append(Problem("router.weight_on", "input", reason, "set router.weight_on=output"))
    if settings.num_groups > 1:
        reason = "zero experts belong to no group"
        fix = "set router.num_groups=1 and router.top_groups=1, or router.zero_experts=0"
        problems.append(Problem("router.num_groups", settings.num_groups, reason, fix))
    if settings.bias in ("sign", "proportional") and settings.bias_centred:
        reason = "zero experts have no bias, so the mean of the others is what their share is set by"
        problems.append(Problem("router.bias_centred", True, reason, "set router.bias_centred=false"))
    return problems
