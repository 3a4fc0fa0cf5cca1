"""The cable between two hosts is cut while they train: both end in time, and say so."""

from __future__ import annotations

import json
import os
import re
import time
from functools import partial
from pathlib import Path

from moetrain.health.watchdog import GRACE_S, HUNG
from tests.hosts import enter, link, need_namespaces, two_spaces
from tests.started import Started, said

TIMEOUT_S = 10
MARGIN_S = 10.0
OVERRIDES = (
    *("train.steps=100000", "train.checkpoint_every=2", "train.keep_checkpoints=1", "engine=local"),
    f"machine.timeout_s={TIMEOUT_S}",
)


def in_space(spaces: tuple[str, str], rank: int) -> None:
    enter(spaces[rank])
    os.environ.update(MASTER_ADDR="10.79.0.1", GLOO_SOCKET_IFNAME="eth0")


def test_both_hosts_end_and_name_each_other(tmp_path: Path) -> None:
    need_namespaces()
    with two_spaces() as spaces, Started(tmp_path, *OVERRIDES, before=partial(in_space, spaces)) as ranks:
        ranks.wait_for_step(3)
        link(spaces[1], "down")
        began = time.monotonic()
        codes, seconds = ranks.codes(), time.monotonic() - began
    assert codes == [HUNG, HUNG], said(ranks.run)
    assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + GRACE_S + MARGIN_S
    report = (ranks.run / "hang" / "report.txt").read_text()
    assert re.search(r"TRAINING HAS STOPPED at step \d+: ranks \[.*\] have (all|not) come to gloo:", report), report
    dumps = [json.loads((ranks.run / "hang" / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert all(dump["thrown"] for dump in dumps)
    assert said(ranks.run).count("TRAINING HAS STOPPED") == 1
