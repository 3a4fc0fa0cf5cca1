"""One folder for all ranks, its name, what it records, and when a start in it is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess

import pytest
from pydantic import ValidationError

from moetrain import config as c
from moetrain.monitor import origin as origin_module
from moetrain.monitor.origin import Origin, origin
from moetrain.monitor.runfolder import RunFolder, config_hash, open_run_folder, rank_log
from moetrain.types import ConfigError
from tests.ranks import run_ranks

UUID = "6f1c2a52-7a3b-4c55-9f0e-2b1b7a8f6c11"


def config(root, **run) -> c.Config:
    return c.Config(
        run=c.RunConfig(root=str(root), **run),
        model=c.ModelConfig(
            dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, ffn_dim=8, expert_dim=8, context=8
        ),
        experts=c.ExpertsConfig(num_experts=2),
        router={"_target_": "some.Router", "top_k": 1},
        capacity=c.CapacityConfig(),
        dispatch={"_target_": "some.Dispatcher"},
        balance=c.BalanceConfig(),
        control=c.ControlConfig(),
        engine=c.EngineConfig(),
        optim=c.OptimConfig(lr=0.1),
        data=c.DataConfig(),
        train=c.TrainConfig(steps=10, global_batch=2, micro_batch=1),
        monitor=c.MonitorConfig(),
        health=c.HealthConfig(),
        machine=c.MachineConfig(),
        debug=c.DebugConfig(),
        recipe=c.RecipeConfig(),
    )


def start(conf: c.Config, launch_id: str | None = None, diff: str = "") -> RunFolder:
    facts = Origin("host", 1, ["train"], launch_id, {"torch": "2"}, None, None, diff)
    return open_run_folder(conf, "steps: 10\n", 0, lambda text: text, facts)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("run_id", "slurm", "torchelastic", "expected"),
    [
        ("mine", "77", "rdzv", "mine"),
        (None, "77", "rdzv", "77"),
        (None, None, "rdzv", "rdzv"),
        (None, None, "none", None),
        (None, None, UUID, None),
        (None, None, None, None),
    ],
)
def test_the_order_of_names(tmp_path, monkeypatch, run_id, slurm, torchelastic, expected):
    for name, value in (("SLURM_JOB_ID", slurm), ("TORCHELASTIC_RUN_ID", torchelastic)):
        if value is not None:
            monkeypatch.setenv(name, value)
    folder = start(config(tmp_path, id=run_id))
    if expected is None:
        assert folder.id.count("-") == 4
        assert folder.id.startswith("20")
    else:
        assert folder.id == expected
    assert folder.config.read_text() == "steps: 10\n"


def test_two_fresh_runs_never_share_a_folder(tmp_path):
    assert len({start(config(tmp_path)).path for _ in range(5)}) == 5


def test_a_restart_by_the_same_torchrun_finds_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", UUID)
    first = start(config(tmp_path), launch_id=UUID)
    assert start(config(tmp_path), launch_id="another").path != first.path
    assert start(config(tmp_path), launch_id=UUID).path == first.path
    assert len(json.loads(first.record.read_text())["starts"]) == 2


@pytest.mark.parametrize("name", ["../up", "a b", "", ".hidden", "x" * 129])
def test_an_id_that_is_no_file_name(tmp_path, monkeypatch, name):
    """One of the user's is refused with the rest of the config; here it comes from the launcher."""
    monkeypatch.setenv("SLURM_JOB_ID", name)
    with pytest.raises(ConfigError, match="plain file name"):
        start(config(tmp_path))
    with pytest.raises(ValidationError, match="string_pattern_mismatch"):
        config(tmp_path, id=name)


def test_a_damaged_record_harms_its_own_run_only(tmp_path):
    broken = start(config(tmp_path, id="broken"), "job-1")
    broken.record.write_text("x")
    assert start(config(tmp_path), "job-2").path != broken.path
    with pytest.raises(ConfigError) as caught:
        start(config(tmp_path, id="broken"))
    assert str(broken.record) in caught.value.problems[0].reason


def test_a_changed_config_is_refused_naming_every_key(tmp_path):
    start(config(tmp_path, id="x"))
    changed = dataclasses.replace(
        config(tmp_path, id="x"),
        router={"_target_": "some.Router", "top_k": 2},
        train=c.TrainConfig(steps=20, global_batch=2, micro_batch=1),
    )
    with pytest.raises(ConfigError) as caught:
        start(changed)
    assert [(p.field, p.value) for p in caught.value.problems] == [("router.top_k", 2), ("train.steps", 20)]
    assert "started with 1" in str(caught.value)
    allowed = dataclasses.replace(changed, run=dataclasses.replace(changed.run, on_config_change="allow"))
    folder = start(allowed)
    assert start(changed).path == folder.path, "what was allowed is now the config of the run"


def test_what_does_not_touch_the_weights_may_change(tmp_path):
    conf = config(tmp_path, id="x")
    start(conf)
    same = dataclasses.replace(
        conf,
        monitor=c.MonitorConfig(log_every=1, wandb="offline"),
        machine=c.MachineConfig(threads=1),
        train=dataclasses.replace(conf.train, checkpoint_every=5, keep_checkpoints=9),
    )
    start(same)
    assert config_hash(same) == config_hash(conf)
    other = dataclasses.replace(conf, run=dataclasses.replace(conf.run, seed=1))
    assert config_hash(other) != config_hash(conf)


def test_resume_never_does_not_write_over_a_run(tmp_path):
    start(config(tmp_path, id="x", resume="never"))
    with pytest.raises(ConfigError, match="already holds a run"):
        start(config(tmp_path, id="x", resume="never"))


def test_a_root_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.root"):
        start(config(tmp_path / "file", id="x"))


def test_every_start_is_recorded_and_its_source_kept(tmp_path):
    folder = start(config(tmp_path, id="x"), diff="- a\n+ b\n")
    start(config(tmp_path, id="x"))
    record = json.loads(folder.record.read_text())
    assert [one["start"] for one in record["starts"]] == [1, 2]
    assert record["config"]["train.steps"] == 10
    assert record["starts"][0]["host"] == "host"
    assert (folder.path / "start-1.diff").read_text() == "- a\n+ b\n"
    assert not (folder.path / "start-2.diff").exists()


def test_the_origin_of_this_process_holds_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    monkeypatch.setattr(
        origin_module.sys, "argv", ["train", "+hub.token=hush-hush", "train.steps=3", "api_key=hush-hush"]
    )
    facts = origin(world_size=2).facts()
    assert "hush" not in json.dumps(facts)
    assert facts["command"] == ["train", "+hub.token=***", "train.steps=3", "api_key=***"]
    assert facts["versions"]["torch"].startswith("2.")
    assert set(facts["versions"]) == {
        "python",
        "moetrain",
        "torch",
        "deepspeed",
        "hydra-core",
        "wandb",
        "datasets",
        "numpy",
    }


def test_git_state_is_that_of_our_own_checkout_only(tmp_path, monkeypatch):
    package = tmp_path / "repo" / "moetrain" / "monitor"
    package.mkdir(parents=True)
    monkeypatch.setattr(origin_module, "__file__", str(package / "origin.py"))

    def git(*words, folder=tmp_path / "repo"):
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    assert origin(1).commit is None
    git("init")
    (tmp_path / "repo" / "a.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = origin(1)
    assert len(clean.commit) == 40
    assert (clean.dirty, clean.diff) == (False, "")
    (tmp_path / "repo" / "a.py").write_text("a = 2\n")
    assert origin(1).dirty
    assert "+a = 2" in origin(1).diff
    inside = tmp_path / "repo" / "venv" / "moetrain" / "monitor"
    inside.mkdir(parents=True)
    monkeypatch.setattr(origin_module, "__file__", str(inside / "origin.py"))
    assert origin(1).commit is None, "an environment inside somebody's repository"


def _on_two_ranks(rank: int, world: int, root: str) -> tuple[str, str]:
    from moetrain.parallel.collectives import broadcast_text

    def broadcast(text: str) -> str:
        import torch.distributed as dist

        return broadcast_text(text, dist.group.WORLD)

    facts = Origin("host", world, [], None, {}, None, None, "")
    folder = open_run_folder(config(root), "a: 1\n", rank, broadcast, facts)
    with rank_log(folder, rank):
        logging.getLogger("moetrain").info("hello from %d", rank)
    named = open_run_folder(config(root, id="x"), "a: 1\n", rank, broadcast, facts)
    other = dataclasses.replace(config(root, id="x"), optim=c.OptimConfig(lr=0.2))
    try:
        open_run_folder(other, "a: 2\n", rank, broadcast, facts)
    except ConfigError as error:
        return folder.id, f"{named.id}: {error}"
    return folder.id, "not refused"


def test_all_ranks_share_one_folder_one_refusal_and_have_a_log_each(tmp_path):
    first, second = run_ranks(2, _on_two_ranks, str(tmp_path))
    assert first == second
    assert "optim.lr = 0.2" in first[1]
    logs = [(tmp_path / first[0] / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert [f"[rank {rank}] INFO moetrain: hello from {rank}" in log for rank, log in enumerate(logs)] == [True, True]
