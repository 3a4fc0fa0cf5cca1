"""The launch scripts, run with stand-ins for python, torchrun, srun, ip that write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), ROOT / ".ci/run", ROOT / "tests/netns.sh"]
)
WRITE = 'printf "%s" "$(basename "$0")" >>"$CALLS"; printf "|%s" "$@" >>"$CALLS"; echo >>"$CALLS"\n'
# python -m venv makes an environment of stand-ins; moetrain check fails if it is told to.
PYTHON = """
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$STUBS"/python "$STUBS"/torchrun .venv/bin/ ;;
  *"moetrain check"*) exit "${CHECK_STATUS:-0}" ;;
esac
"""
IP = """
[ "${@: -1}" = eth7 ] && echo "2: eth7    inet 10.1.2.3/24 brd 10.1.2.255 scope global eth7"
"""
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
for SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID SLURMD_NODENAME="n$SLURM_NODEID" "$@"; done
"""


class Checkout:
    """A copy of launch/ with nothing else, and stand-ins first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file, stubs = folder / "checkout", folder / "calls", folder / "stubs"
        shutil.copytree(ROOT / "launch", self.folder / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        stubs.mkdir()
        path = f"{stubs}:{os.environ['PATH']}"
        self.env = {"PATH": path, "CALLS": str(self.calls_file), "STUBS": str(stubs), "PYTHON": "python"}
        for name, body in (("python", PYTHON), ("torchrun", ""), ("ip", IP), ("srun", SRUN)):
            self.stub(name, WRITE + body)
        self.stub("scontrol", 'echo "n0"; echo "n1"\n')
        self.gpus(0)

    def stub(self, name: str, body: str) -> None:
        path = Path(self.env["STUBS"]) / name
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)

    def gpus(self, number: int) -> None:
        lines = "".join(f'echo "GPU {i}: Some Device"\n' for i in range(number))
        self.stub("nvidia-smi", lines or "exit 127\n")

    def run(self, script: str, *words: str, status: int = 0, **env: str) -> list[list[str]]:
        """The calls that the script made, each as a list of words."""
        self.calls_file.write_text("")
        command = ["bash", str(self.folder / script), *words]
        self.done = subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, timeout=240, check=False
        )
        assert self.done.returncode == status, self.done.stderr
        return [line.split("|") for line in self.calls_file.read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def only(calls: list[list[str]], program: str) -> list[str]:
    (call,) = [call for call in calls if call[0] == program]
    return call


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_syntax_is_right(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_the_quick_start_makes_the_environment_checks_and_trains_on_two_ranks(checkout):
    calls = checkout.run("launch/quickstart.sh", "train.steps=7", "data.path=a b")
    assert [call[:4] for call in calls] == [
        ["python", "-c", "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))"],
        ["python", "-m", "venv", ".venv"],
        ["python", "-m", "pip", "install"],
        ["python", "-m", "pip", "install"],
        ["python", "-m", "moetrain", "check"],
        ["torchrun", "--standalone", "--nproc-per-node", "2"],
    ]
    assert "https://download.pytorch.org/whl/cpu" in calls[2]
    assert calls[3][-2:] == ["--editable", "."]
    assert calls[4][4:] == ["recipe=quickstart", "train.steps=7", "data.path=a b", "--world", "2"]
    assert calls[5][4:] == ["-m", "moetrain", "train", "recipe=quickstart", "train.steps=7", "data.path=a b"]


def test_an_environment_is_reused_until_pyproject_changes(checkout):
    checkout.run("launch/local.sh", "recipe=nano_moe")
    assert [call[0] for call in checkout.run("launch/local.sh", "recipe=nano_moe")] == ["python", "torchrun"]
    with (checkout.folder / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    again = checkout.run("launch/local.sh", "recipe=nano_moe")
    assert ["pip" in call for call in again] == [True, True, False, False]


def test_an_installation_that_failed_is_tried_again(checkout):
    checkout.stub("python", WRITE + PYTHON + 'case "$*" in *--editable*) exit 1 ;; esac\n')
    checkout.run("launch/local.sh", status=1)
    assert any("--editable" in call for call in checkout.run("launch/local.sh", status=1))


def test_a_mistake_ends_with_code_2_before_any_rank_starts(checkout):
    calls = checkout.run("launch/quickstart.sh", "router.top_k=99", status=2, CHECK_STATUS="2")
    assert calls[-1][:4] == ["python", "-m", "moetrain", "check"]


def test_no_python_that_fits(checkout):
    checkout.stub("python", "exit 1\n")
    checkout.run("launch/quickstart.sh", status=2)
    assert "needs Python 3.10, 3.11 or 3.12" in checkout.done.stderr


@pytest.mark.parametrize(("gpus", "quickstart", "local"), [(0, "2", "2"), (1, "1", "1"), (8, "2", "8")])
def test_ranks_follow_the_gpus(checkout, gpus, quickstart, local):
    checkout.gpus(gpus)
    calls = checkout.run("launch/quickstart.sh")
    assert only(calls, "torchrun")[3] == quickstart
    assert sum("pip" in call for call in calls) == (2 if gpus == 0 else 1), "with a GPU torch comes from PyPI"
    assert only(checkout.run("launch/local.sh"), "torchrun")[3] == local
    assert only(checkout.run("launch/local.sh", NPROC="4"), "torchrun")[3] == "4"


def test_the_tests_are_run_with_the_test_extra(checkout):
    calls = checkout.run("launch/test.sh", "-k", "routing and not slow", "-x")
    assert calls[-2][-2:] == ["--editable", ".[test]"]
    beside = ["--numprocesses", "2", "--dist", "loadfile"]
    assert calls[-1] == ["python", "-m", "pytest", *beside, "-k", "routing and not slow", "-x"]


@pytest.mark.parametrize("node_rank", ["0", "1"])
def test_two_hosts_say_who_they_are(checkout, node_rank):
    checkout.stub("torchrun", WRITE + 'echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME" >&2\n')
    calls = checkout.run("launch/two_hosts.sh", "recipe=x", NODE_RANK=node_rank, MASTER="10.1.2.3", INTERFACE="eth7")
    words = only(calls, "torchrun")
    options = dict(zip(words[1:13:2], words[2:14:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "1",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "10.1.2.3:29400",
        "--rdzv-conf": f"is_host={1 - int(node_rank)}",
        "--local-addr": "10.1.2.3",
    }
    assert words[13:] == ["-m", "moetrain", "train", "recipe=x"]
    assert checkout.done.stderr.splitlines()[-1] == "eth7 eth7"
    assert calls[-2][-2:] == ["--world", "2"]


def test_two_hosts_without_what_they_need(checkout):
    checkout.run("launch/two_hosts.sh", status=2, NODE_RANK="0", INTERFACE="eth7")
    assert checkout.done.stderr.startswith("MASTER is not set.")
    checkout.run("launch/two_hosts.sh", status=2, NODE_RANK="0", MASTER="10.1.2.3", INTERFACE="eth9")
    assert "INTERFACE=eth9 has no IPv4 address" in checkout.done.stderr


SLURM = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_GPUS_ON_NODE": "8"}


def test_slurm_starts_one_torchrun_a_node(checkout):
    calls = checkout.run(
        "launch/slurm/train.sbatch", "recipe=x", "data.path=a b", SLURM_SUBMIT_DIR=str(checkout.folder), **SLURM
    )
    assert calls[0] == ["python", "-m", "moetrain", "check", "recipe=x", "data.path=a b", "--world", "16"]
    agents = [call for call in calls if call[0] == "torchrun"]
    for node, words in enumerate(agents):
        options = dict(zip(words[1:15:2], words[2:16:2], strict=True))
        assert options == {
            "--nnodes": "2",
            "--nproc-per-node": "8",
            "--rdzv-backend": "c10d",
            "--rdzv-endpoint": "n0:23456",
            "--rdzv-id": "123456",
            "--rdzv-conf": f"is_host={int(node == 0)}",
            "--local-addr": f"n{node}",
        }
        assert words[15:] == ["-m", "moetrain", "train", "recipe=x", "data.path=a b"]
    assert len(agents) == 2


def test_slurm_starts_nothing_after_a_mistake(checkout):
    calls = checkout.run(
        "launch/slurm/train.sbatch", status=2, CHECK_STATUS="2", SLURM_SUBMIT_DIR=str(checkout.folder), **SLURM
    )
    assert [call[0] for call in calls] == ["python"]
