"""Keys of the environment and of a netrc appear in nothing that a run writes or prints, and in no config."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.compose import compose
from moetrain.redaction import Redacted, redact, redact_source, secrets
from moetrain.types import ConfigError

REPOSITORY = Path(__file__).parents[1]
PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefc0ffee00",
    "HF_TOKEN": "hf_plantedplantedplantedplanted01",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/value=1",
    "MY_PASSWORD": "planted-password-42",
}
NETRC_KEY = "fedcba9876543210fedcba9876543210deadbeef"
RUN = [
    "recipe=quickstart", "model=nano", "model.context=32", "train.steps=2", "train.global_batch=2",
    "train.micro_batch=2", "train.eval_every=0", "train.eval_batches=1", "train.sample_tokens=0",
    "train.checkpoint_every=1", "optim.warmup_steps=1", "engine=local", "dispatch=local", "machine.device=cpu",
    "monitor=wandb_offline", "monitor.log_every=1", "run.id=first-try", "data=text", "data.path=text.txt",
    "data.tokenizer=byte", "data.cache=cache",
]  # fmt: skip


def test_a_run_writes_and_prints_no_secret(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("In the beginning. " * 200)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {NETRC_KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | PLANTED | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    words = [*RUN, f"run.root={tmp_path}/outputs"]
    command = [sys.executable, "-m", "moetrain", "train", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert any(path.name == "manifest.json" for path in written)
    content = {str(path): path.read_bytes() for path in written} | {
        "stdout": done.stdout.encode(), "stderr": done.stderr.encode(),
    }  # fmt: skip
    for secret in (*PLANTED.values(), NETRC_KEY):
        assert [where for where, text in content.items() if secret.encode() in text] == []


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    "word", ["data.cache=${oc.env:WANDB_API_KEY}", "recipe.about=${oc.env:HF_TOKEN}x", "data.split=planted-password-42"]
)
def test_a_config_that_holds_a_secret_is_refused_without_saying_it(word: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([word])
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == (word.partition("=")[0], "***")
    assert cli.main(["check", word, "train.stps=1"]) == 2
    captured = capsys.readouterr()
    assert not any(value in captured.out + captured.err for value in PLANTED.values())


@pytest.mark.usefixtures("planted")
def test_a_mistake_that_quotes_a_secret_is_told_without_it(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check", f"model={PLANTED['HF_TOKEN']}"]) == 2
    assert "***HF_TOKEN***" in capsys.readouterr().err


def test_other_variables_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert compose(["data.cache=${oc.env:SCRATCH}/data"]).data.cache == "/scratch/me/data"


def test_which_variables_hold_secrets() -> None:
    harmless = {"PWD": "/home/somebody", "TOKENIZERS_PARALLELISM": "something", "KEYBOARD": "dvorak-classic"}
    assert secrets(PLANTED | harmless | {"SHORT_KEY": "1234567"}) == PLANTED


@pytest.mark.usefixtures("planted")
def test_logs_are_without_them_tracebacks_too() -> None:
    try:
        raise OSError(f"401 for https://me:hunter22@host/ with {PLANTED['WANDB_API_KEY']}")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "key %s", (PLANTED["MY_PASSWORD"],), sys.exc_info())
    text = Redacted("%(message)s").format(record)
    assert "key ***MY_PASSWORD***" in text
    assert "401 for https://me:***@host/ with ***WANDB_API_KEY***" in text
    assert redact("nothing to hide") == "nothing to hide"


def test_source_is_without_what_looks_like_a_key_and_otherwise_as_it_is() -> None:
    for line in (
        "+num_tokens = len(batch.tokens_BS)",
        "+    key=lambda x: x.step_of_this",
        "rank_token: int = 30000",
    ):
        assert redact_source(line) == line
    for line in (
        f'+API = "{PLANTED["WANDB_API_KEY"]}"',
        "+export WANDB_API_KEY=local-abcdefgh",
        '+os.environ["HF_TOKEN"] = "abcdefgh1"',
        '+password: "abcdefgh1"',
        "+url = https://me:abcdefgh1@host/",
    ):
        assert "***" in redact_source(line), line
        assert "abcdefgh" not in redact_source(line)
