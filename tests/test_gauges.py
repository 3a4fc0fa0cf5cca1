"""Gauges: what a layer did besides its load, counted once, and the numbers that are made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moetrain.models.decoder import Decoder
from moetrain.moe.replay import Replay
from moetrain.monitor.vitals import dropped, router_state, vitals
from moetrain.monitor.window import GaugeMeans, Window, sum_together
from moetrain.parallel.mesh import Mesh, mesh_of_world
from tests.ranks import run_ranks
from tests.tiny import VOCAB, alone, ids, moe_layer, part_of, tiny, tokens

CPU = torch.device("cpu")


def means_of(config: object, mesh: Mesh, recompute: bool = False) -> GaugeMeans:
    """Two micro-batches of four sequences over the ranks of the mesh."""
    model, window = Decoder(config, mesh, VOCAB), Window(mesh)  # type: ignore[arg-type]
    for seed in range(2):
        size = 8 // mesh.world_size
        output = model(part_of(tokens(8, 16, seed=seed), mesh.rank * size, (mesh.rank + 1) * size))
        output.loss.backward()
        window.add(output)
        model.commit_load()
    model.eval()(tokens(2, 16))
    window.add_load(model.take_load(), model.take_gauges())
    gauges = window.reduce().gauges
    assert gauges is not None
    return gauges


def test_counts_are_those_of_the_load_and_recompute_counts_once() -> None:
    """2 micro-batches x 8 x 16 tokens x 2 choices in each layer; evaluation leaves no trace."""
    plain = means_of(tiny(capacity__factor_train=0.5, capacity__minimum=1), alone())
    again = means_of(tiny(capacity__factor_train=0.5, capacity__minimum=1, engine__recompute=True), alone())
    assert plain.choice_2LK[0].tolist() == [[256, 256], [256, 256]]
    assert plain.position_2LP[0].tolist() == [[64] * 8] * 2
    assert (plain.choice_2LK.sum(-1) == plain.position_2LP.sum(-1)).all()
    assert (plain.choice_2LK[1] < plain.choice_2LK[0]).any()
    assert plain.received_LW[:, 0].tolist() == plain.choice_2LK[1].sum(-1).tolist()
    for name, value in vars(plain).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)


def test_a_micro_batch_that_was_counted_can_not_be_counted_again() -> None:
    layer, x_TD = moe_layer(tiny(dispatch="local")), torch.ones(12, 16)
    layer(x_TD, ids(x_TD), Replay())
    layer.load.commit()
    with pytest.raises(AssertionError, match="without a training forward"):
        layer.load.commit()
    assert int(layer.load.take()[0].sum()) == 12 * 2


def on_ranks(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    layouts = ((1, "alltoall"), (2, "alltoall"), (2, "dedup"))
    return [vars(means_of(tiny(dispatch=name), mesh_of_world(ep, CPU))) for ep, name in layouts]


def test_ranks_give_what_one_process_gives() -> None:
    """Dropless: the same tokens over two ranks, experts whole or shared out."""
    alone_means = vars(means_of(tiny(), alone()))
    for rank_means in run_ranks(2, on_ranks):
        for ep, found in zip((1, 2, 2), rank_means, strict=True):
            for name in alone_means.keys() - {"received_LW", "travelled_LW"}:
                np.testing.assert_allclose(found[name], alone_means[name], rtol=1e-5, err_msg=f"ep {ep} {name}")
            assert found["received_LW"].shape == (2, 2)
            assert (found["received_LW"].sum(1) == alone_means["received_LW"][:, 0]).all()
        stayed, each_copy, once_a_rank = (found["travelled_LW"] for found in rank_means)
        assert (stayed == 0).all()
        assert (once_a_rank <= each_copy).all()
        assert 0 < once_a_rank.sum() < each_copy.sum() < alone_means["received_LW"].sum()


def test_an_undecided_router_has_full_entropy_and_a_decided_one_none() -> None:
    layer = moe_layer(tiny(dispatch="local"))
    gate = layer.router.get_parameter("gate")
    x_TD = torch.ones(12, 16)
    for scale, entropy, confidence in ((0.0, 1.0, 1 / 8), (1e4, 0.0, 1.0)):
        gate.data.copy_(torch.arange(8.0).unsqueeze(1) * scale)
        layer(x_TD, ids(x_TD), Replay())
        layer.gauges.commit()
        gauges = layer.gauges.take()
        assert gauges.entropy.item() / 12 / math.log(8) == pytest.approx(entropy, abs=1e-6)
        assert gauges.confidence.item() / 12 == pytest.approx(confidence)
        assert gauges.logit_peak.item() == pytest.approx(16 * 7 * scale)


def gauges_with(**changes: np.ndarray) -> GaugeMeans:
    even = {
        "choice_2LK": np.full((2, 1, 2), 40),
        "position_2LP": np.full((2, 1, 8), 10),
        "received_LW": np.full((1, 4), 20),
        "travelled_LW": np.full((1, 4), 15),
        "entropy_L": np.array([0.5]),
        "confidence_L": np.array([0.4]),
        "logit_rms_L": np.array([1.0]),
        "logit_max_L": np.array([3.0]),
        "swing_L": np.array([0.1]),
    }
    return GaugeMeans(**even | changes)  # type: ignore[arg-type]


def test_numbers_of_an_even_window() -> None:
    numbers = vitals(gauges_with(), [3], row_bytes=2**20)
    assert numbers["balance/received_max"] == numbers["moe/layer_03/received_max"] == 1.0
    assert numbers["balance/exchange_mib_max"] == 15.0
    assert {numbers[f"balance/drop_position_{i}"] for i in range(8)} == {0.0}
    assert numbers["balance/late_drop"] == 0.0


def test_late_positions_and_a_hot_rank_are_seen() -> None:
    position = np.full((2, 1, 8), 10)
    position[1, 0, 7] = 2
    received = np.array([[50, 10, 10, 10]])
    numbers = vitals(gauges_with(position_2LP=position, received_LW=received), [0], row_bytes=1)
    assert numbers["balance/drop_position_7"] == numbers["balance/late_drop"] == pytest.approx(0.8)
    assert numbers["balance/received_max"] == pytest.approx(2.5)


def test_the_number_of_keys_does_not_grow_with_choices() -> None:
    many = vitals(gauges_with(choice_2LK=np.full((2, 1, 64), 40)), [0], 1)
    assert len([name for name in many if "drop_choice" in name]) == 8


def test_nothing_assigned_is_not_nothing_dropped() -> None:
    assert np.isnan(dropped(np.zeros((2, 3), dtype=np.int64))).all()


def test_router_state_keeps_layers_apart() -> None:
    numbers = router_state([{"bias_range": 0.1}, {"bias_range": 0.3}], [1, 2])
    assert numbers == {"moe/layer_01/bias_range": 0.1, "moe/layer_02/bias_range": 0.3, "balance/bias_range_max": 0.3}


def test_integers_survive_the_common_sum() -> None:
    counts, numbers = sum_together([torch.tensor([[2**52 + 1]]), torch.tensor([0.5])], None)
    assert int(counts) == 2**52 + 1
    assert numbers.tolist() == [0.5]
