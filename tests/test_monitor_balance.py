"""Balance numbers against counts whose answer is known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moetrain.monitor.balance import flatten, relative_load, summarise
from moetrain.types import LoadCounts


def counts(assigned, kept=None) -> LoadCounts:
    assigned_LE = torch.tensor(assigned, dtype=torch.int64)
    return LoadCounts(assigned_LE, assigned_LE.clone() if kept is None else torch.tensor(kept, dtype=torch.int64))


def test_an_even_load_is_fair_in_every_number():
    balance = summarise(counts([[5] * 8, [7] * 8]), ep_size=2, layers=[0, 1])
    assert balance.load_max == balance.rank_load_max == 1.0
    assert balance.max_vio_mean == balance.max_vio_max == balance.drop_fraction == 0.0
    assert balance.effective_experts_mean == pytest.approx(8.0)
    assert balance.effective_experts_min == pytest.approx(8.0)
    assert balance.dead_experts == 0


@pytest.mark.parametrize("alive", [1, 2, 4])
def test_a_collapse_on_n_experts(alive):
    """ROUTING of all tokens to n of E experts: MaxVio E/n - 1, n effective experts, E - n dead ones."""
    collapsed = [10] * alive + [0] * (8 - alive)
    balance = summarise(counts([[3] * 8, collapsed]), ep_size=4, layers=[1, 5])
    assert balance.load_max == 8 / alive
    assert balance.worst_layer == 5
    assert balance.max_vio_max == 8 / alive - 1
    assert balance.max_vio_mean == (8 / alive - 1) / 2
    assert balance.effective_experts_min == pytest.approx(alive)
    assert balance.effective_experts_mean == pytest.approx((8 + alive) / 2)
    assert balance.dead_experts == 8 - alive
    assert balance.rank_load_max == {1: 4.0, 2: 4.0, 4: 2.0}[alive]


def test_rank_load_adds_up_the_experts_of_a_rank():
    """Experts as uneven as can be, ranks even; and the other way round."""
    uneven_experts = summarise(counts([[4, 0, 4, 0]]), ep_size=2, layers=[0])
    assert (uneven_experts.load_max, uneven_experts.rank_load_max) == (2.0, 1.0)
    uneven_ranks = summarise(counts([[3, 3, 1, 1]]), ep_size=2, layers=[0])
    assert (uneven_ranks.load_max, uneven_ranks.rank_load_max) == (1.5, 1.5)


def test_drops_are_weighed_by_assignments_not_by_layers():
    balance = summarise(counts([[10, 10], [30, 30]], [[5, 5], [30, 30]]), ep_size=1, layers=[0, 1])
    assert balance.drop_fraction == pytest.approx(10 / 80)
    assert [one.drop_fraction for one in balance.layers] == pytest.approx([0.5, 0.0])


def test_load_is_counted_before_dropping():
    balance = summarise(counts([[9, 1]], [[1, 1]]), ep_size=1, layers=[0])
    assert balance.load_max == pytest.approx(1.8)


def test_counts_beyond_float32_stay_exact():
    big = 2**30
    balance = summarise(counts([[big + 1, big - 1]], [[big, big - 1]]), ep_size=1, layers=[0])
    assert balance.max_vio_max == pytest.approx(1 / big, rel=1e-3)
    assert balance.drop_fraction == pytest.approx(1 / (2 * big), rel=1e-3)


def test_a_layer_without_tokens_is_nan_and_not_balanced():
    balance = summarise(counts([[2, 2], [0, 0]]), ep_size=2, layers=[0, 1])
    assert math.isnan(balance.layers[1].load_max)
    assert math.isnan(balance.load_max)
    assert math.isnan(balance.rank_load_max)
    assert math.isnan(balance.effective_experts_min)
    assert balance.dead_experts == 2


def test_names_are_few_and_numbered_by_decoder_layer():
    flat = flatten(summarise(counts([[1, 3], [2, 2]]), ep_size=1, layers=[1, 12]))
    headline = [name for name in flat if name.startswith("balance/")]
    per_layer = [name for name in flat if name.startswith("moe/layer_12/")]
    assert len(headline) + 2 * len(per_layer) == len(flat)
    assert len(headline) <= 12
    assert len(per_layer) <= 6
    assert flat["moe/layer_01/load_max"] == flat["balance/load_max"] == 1.5
    assert flat["balance/worst_layer"] == 1.0
    assert all(isinstance(value, float) for value in flat.values())


def test_relative_load():
    assert relative_load(np.array([[1, 3]])).tolist() == [[0.5, 1.5]]
