"""Whole runs, started as a user starts them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

import moetrain.checkpoint.store as store
from moetrain.checkpoint.files import Written
from moetrain.cli import main
from moetrain.monitor.events import read_events
from moetrain.monitor.jsonl import read_metrics

REPOSITORY = Path(__file__).parents[1]
STEPS = 40
SMALL = [
    "recipe=quickstart",
    "model=nano",
    "model.context=32",
    "router.noise=gaussian",
    f"train.steps={STEPS}",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.eval_batches=1",
    "train.sample_tokens=8",
    "optim.warmup_steps=2",
    "monitor.log_every=1",
    "machine.device=cpu",
]


def start(folder: Path, *overrides: str, ranks: int = 2, **told: str) -> subprocess.Popen[str]:
    """``torchrun -m moetrain train`` in ``folder``, in a session of its own. told: of the environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*command, "-m", "tests.steady", "train", *SMALL, f"data.cache={folder / 'cache'}", *overrides],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it must have succeeded."""
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, out + errors
    return out


def kill_all_of(folder: Path) -> None:
    """kill -9 torchrun and its workers, which live in sessions of their own; all have the folder on their command
    line.
    """
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Training loss and gradient norm by step."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    return {int(row["train/step"]): (row["train/loss"], row["train/grad_norm"]) for row in rows}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that nothing happened to; its output beside it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    out = finish(start(folder, "run.id=whole", "train.checkpoint_every=20", "train.keep_checkpoints=99"))
    (folder / "out.txt").write_text(out)
    return folder


def test_a_run_says_what_it_did(uninterrupted: Path) -> None:
    out = (uninterrupted / "out.txt").read_text()
    for word in ("bigram entropy", "validation", "Expert load, layer x expert", "Sample", "Memory", "exchange"):
        assert word in out, word
    run = uninterrupted / "outputs" / "whole"
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.txt", "checkpoints/step_00000040/manifest.json"):
        assert (run / name).is_file(), name
    assert str(Path("outputs") / "whole") in out
    versions = json.loads((run / "run.json").read_text())["starts"][0]["versions"]
    assert {"torch", "deepspeed", "python"} <= versions.keys()


def test_metrics_hold_the_balance_of_every_layer(uninterrupted: Path) -> None:
    rows = read_metrics(uninterrupted / "outputs" / "whole" / "metrics.jsonl")
    assert [int(row["train/step"]) for row in rows] == list(range(1, STEPS + 1))
    assert {"balance/drop_fraction", "balance/load_max", "moe/layer_03/load_max"} <= rows[-1].keys()
    assert rows[-1]["train/balance_loss"] >= 0.99
    assert rows[-1]["train/lm_loss"] < rows[0]["train/lm_loss"]


def test_kill_and_resume_is_bit_equal(uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 of everything after the checkpoint of step 3, with router noise, dropping and AdamW at work. It is not
    waited for later than before step 11.
    """
    overrides = ["run.id=killed", "train.checkpoint_every=3", "train.keep_checkpoints=99"]
    process = start(tmp_path, *overrides, HOLD_STEP="10", HOLD_FILE=str(tmp_path / "never"))
    saved = tmp_path / "outputs" / "killed" / "checkpoints" / "step_00000003"
    deadline = time.monotonic() + 200
    while not saved.is_dir():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_all_of(tmp_path)
    process.communicate()
    finish(start(tmp_path, *overrides))
    expected = losses(uninterrupted / "outputs" / "whole")
    assert losses(tmp_path / "outputs" / "killed") == expected
    rows = read_metrics(tmp_path / "outputs" / "killed" / "metrics.jsonl")
    by_step = {int(row["train/step"]): int(row["run/segment"]) for row in rows}
    resumed = sum(segment == 1 for segment in by_step.values())
    assert resumed in (3, 6, 9)
    assert [by_step[step] for step in range(1, STEPS + 1)] == [1] * resumed + [2] * (STEPS - resumed)


LOCAL = (1, ["engine=local", "dispatch=local"])
ALONE = (1, ["engine.zero_stage=3", "engine.dtype=bf16"])
OTHER = ["dispatch=alltoall", "capacity=dropless", "data.mask_documents=true", "experts.num_shared=1"]
DROPLESS = (2, [*OTHER, "engine.dtype=bf16", "engine.zero_stage=2", "engine.recompute=true"])


@pytest.mark.parametrize(("ranks", "overrides"), [LOCAL, ALONE, DROPLESS])
def test_other_engines_dtypes_and_dispatchers(tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    run = ["run.id=other", "train.steps=3", "optim.warmup_steps=1"]
    out = finish(start(tmp_path, *run, *overrides, ranks=ranks))
    assert "Training is done" in out
    first, *_, last = read_metrics(tmp_path / "outputs" / "other" / "metrics.jsonl")
    assert last["train/lm_loss"] < first["train/lm_loss"]
    assert last["train/skipped_steps"] == 0


def test_another_layout_goes_on_from_the_newest_that_is_whole(uninterrupted: Path, tmp_path: Path) -> None:
    """Two ranks under DeepSpeed saved steps 20 and 40, the latter is damaged; one process in plain torch goes on, and
    saves beside training.
    """
    run = Path(shutil.copytree(uninterrupted / "outputs" / "whole", tmp_path / "outputs" / "whole"))
    file = run / "checkpoints" / "step_00000040" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    keep = ["train.keep_checkpoints=1", "train.keep_every=8", "train.eval_every=10", "train.keep_best=true"]
    options = ["run.id=whole", "engine=local", "train.checkpoint_every=5", "train.async_checkpoint=true", *keep]
    finish(start(tmp_path, *options, f"data.cache={uninterrupted / 'cache'}", ranks=1))
    log = (run / "logs" / "rank0.log").read_text()
    assert "step_00000040 is not used" in log
    assert "rank_00001.safetensors is damaged" in log
    assert "saved by 2 ranks on cpu: random generators start anew" in log
    assert "resumed after step 20" in log
    (alarm,) = [event for event in read_events(run / "events.jsonl") if event.kind == "alert"]
    assert alarm.message.startswith("a newer checkpoint can not be used, step_00000040: ")
    rows = read_metrics(run / "metrics.jsonl")
    by_step = {int(row["train/step"]): row for row in rows if "train/loss" in row}
    assert [int(by_step[step]["run/segment"]) for step in range(1, STEPS + 1)] == [1] * 20 + [2] * 20
    before = {int(r["train/step"]): r for r in read_metrics(uninterrupted / "outputs" / "whole" / "metrics.jsonl")}
    for step in range(21, STEPS + 1):  # its own noise, and slots of larger micro-batches
        assert abs(by_step[step]["train/lm_loss"] - before[step]["train/lm_loss"]) < 0.05
    # 40: newest, multiple of 8, lowest validation loss; in 20 it was not known, as nothing was evaluated then
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000040"]
    extra = json.loads((run / "checkpoints" / "step_00000040" / "manifest.json").read_text())["extra"]
    assert extra["validation_loss"] == [row["validation/lm_loss"] for row in rows if "validation/lm_loss" in row][-1]


def disk_full(file: Path, header: bytes, blocks: object) -> Written:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


@pytest.mark.parametrize("broken", [(2,), (2, 4)])
def test_training_outlives_a_full_disk(
    broken: tuple[int, ...],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Saves of steps 1 to 4, of which some fail. If the last one does, the run ends with an error: its work is lost."""
    usual = store.write

    def write(file: Path, header: bytes, blocks: Iterable[memoryview]) -> Written:
        step = int(file.parent.name.removeprefix("step_").removesuffix(".tmp"))
        return disk_full(file, header, blocks) if step in broken else usual(file, header, blocks)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "write", write)
    options = ["run.id=full", "engine=local", "dispatch=local", "train.steps=4", "train.checkpoint_every=1"]
    arguments = [*SMALL, *options, f"data.cache={uninterrupted / 'cache'}", "monitor.progress=false"]
    assert main(["train", *arguments]) == int(4 in broken)
    told = re.findall("moetrain: the run is done, but its last checkpoint .*", capfd.readouterr().err)
    assert all("step_00000004 could not be written: rank 0: [Errno 28] No space left" in line for line in told)
    assert len(told) == int(4 in broken)
    run = tmp_path / "outputs" / "full"
    alarms = [event for event in read_events(run / "events.jsonl") if event.kind == "alert"]
    assert [event.step for event in alarms] == list(broken)
    assert "step_00000002 could not be written: rank 0: [Errno 28] No space left" in alarms[0].message
    kept = [step for step in (1, 2, 3, 4) if step not in broken][-2:]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step_{step:08d}" for step in kept]
    assert len(losses(run)) == 4


def test_a_mistake_is_told_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path, "router.topk=3", "train.global_batch=7")
    out, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert (out + errors).count("moetrain: 2 problems in the configuration") == 1
    assert "router.topk" in errors
    assert "train.global_batch" in errors
    assert not (tmp_path / "outputs").exists()
