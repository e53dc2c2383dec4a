"""Runs of several ranks as commands: signals, kills, memory, and resuming on another number of ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import flatten, override
from ngpt.distributed import join
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.training.checkpoint import read_weights
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.load_model import find_checkpoint
from ngpt.training.loop import train
from ngpt.training.run import set_up

ROOT = Path(__file__).parents[3]
PATIENCE = 300.0  # seconds
pytestmark = pytest.mark.timeout(900)


class Command:
    """`python -m ngpt.train` with settings of `tiny` and more."""

    def __init__(self, tiny: TrainConfig, folder: Path) -> None:
        values = {name: value for name, value in flatten(tiny).items() if not name.startswith("tracker.")}
        self._settings = [f"{name}={json.dumps(value)}" for name, value in values.items()]
        self.folder = folder

    def line(self, out: str, *changes: str, ranks: int = 2) -> list[str]:
        settings = [*self._settings, "distributed.strategy=fsdp", "optim.name=muon", *changes]
        return [*self._module, "--ranks", str(ranks), "--out", str(self.folder / out), "--set", *settings]

    def resume(self, out: str, *, ranks: int) -> list[str]:
        return [*self._module, "--ranks", str(ranks), "--resume", str(self.folder / out)]

    _module = (sys.executable, "-m", "ngpt.train")

    def start(self, line: Sequence[str]) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, env=environment, **pipes)

    def run(self, line: Sequence[str]) -> tuple[int, str]:
        """Runs a command to its end; returns its exit code and what it has printed to stderr."""
        process = self.start(line)
        _, err = process.communicate(timeout=PATIENCE)
        return process.returncode, err

    def patched(self, code: str) -> dict[str, str]:
        """The environment of a command whose ranks run `code` when they start."""
        # Python imports this module at its start; the ranks that `--ranks` starts run with the option too.
        start = "import os, sys\nif os.environ.get('RANK') and '--ranks' in sys.orig_argv:\n    import patches\n"
        (self.folder / "sitecustomize.py").write_text(start)
        (self.folder / "patches.py").write_text(code)
        return os.environ | {"PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        return read_weights(find_checkpoint(self.folder / out))

    def until(self, happened: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (value := happened()):
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)
        return value

    def step(self, out: str) -> int:
        """The step that the heartbeat of the first rank shows; 0 without one."""
        try:
            return json.loads((self.folder / out / "heartbeat").read_text())["step"]
        except (OSError, ValueError):
            return 0


@pytest.fixture
def command(tiny: TrainConfig, tmp_path: Path) -> Command:
    return Command(tiny, tmp_path)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, children))


LONG = ("steps=120", "eval_every=60", "checkpoint.every=10", "batch_size=4")


@pytest.fixture(scope="module")
def undisturbed(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a long run that nothing has disturbed."""
    command = Command(tiny, tmp_path_factory.mktemp("ranks"))
    assert command.run(command.line("undisturbed", *LONG))[0] == 0
    return command.weights("undisturbed")


# Kills the second rank in the middle of the save after 60 steps, when it has written its weights but not its moments.
KILLED = """
import os, signal
from pathlib import Path
from ngpt.distributed import shards
from ngpt.training import checkpoint

def write_shards(folder, tensors, ranks, real=shards.write_shards):
    if folder.name == "optimizer" and ranks.index == 1 and (folder.parents[1] / "step_0000050").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return real(folder, tensors, ranks)

checkpoint.write_shards = write_shards
"""


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_at_any_moment_ends_with_the_weights_of_an_undisturbed_one(
    command: Command, undisturbed: dict[str, torch.Tensor]
) -> None:
    draw = random.Random(time.time_ns())
    line, kills = command.line("killed", *LONG), []
    for _ in range(2):
        victim, at = draw.randrange(2), command.step("killed") + draw.randrange(1, 25)
        kills.append((victim, at))
        process = command.start(line)
        command.until(lambda at=at: command.step("killed") >= at)
        os.kill(ranks_of(process)[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + signal.SIGKILL, (kills, err)
        assert f"rank {victim} of 2 was killed by SIGKILL" in err and "Traceback" not in err, (kills, err)
        line = command.resume("killed", ranks=2)
    environment = command.patched(KILLED)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert "rank 1 of 2 was killed by SIGKILL" in done.stderr, (kills, done.stderr)
    saved = find_checkpoint(command.folder / "killed")
    assert saved.step == 50, kills
    code, err = command.run(line)
    assert code == 0 and "continuing" in err, (kills, err)
    assert not list(saved.path.parent.glob(".tmp-*"))
    torch.testing.assert_close(
        command.weights("killed"), undisturbed, atol=0, rtol=0, msg=lambda text: f"{kills} {text}"
    )


# The first rank hangs while it looks for a checkpoint, as on a file system that does not answer.
HUNG = """
import datetime, os, time
from ngpt.distributed import join
from ngpt.training import run

join.TIMEOUT = datetime.timedelta(seconds=20)
if os.environ["RANK"] == "0":
    run.newest_checkpoint = lambda root: time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGINT, 1), pytest.param(signal.SIGUSR1, 4, marks=pytest.mark.long)]
)
def test_all_ranks_stop_at_one_step_and_the_run_goes_on_with_another_number_of_ranks(
    number: signal.Signals, ranks: int, command: Command, undisturbed: dict[str, torch.Tensor]
) -> None:
    process = command.start(command.line("stopped", *LONG))
    command.until(lambda: command.step("stopped") > 5)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, err
    (line,) = (line for line in err.splitlines() if "stopped by" in line)
    assert line.startswith(f"stopped by {number.name} at step") and ", saved; to go on:" in line
    hung, environment = command.resume("stopped", ranks=2), command.patched(HUNG)
    done = subprocess.run(hung, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 75 and "rank 1 has lost another rank" in done.stderr, done.stderr
    code, err = command.run(command.resume("stopped", ranks=ranks))
    assert code == 0, err
    torch.testing.assert_close(command.weights("stopped"), undisturbed, atol=5e-4, rtol=0)


# Makes memory run out on the last rank, at its second step: in the forward pass, or in the exchange of gradients.
HUNGRY = """
import torch
from ngpt.distributed import data_parallel, sharded

Replica = {"ddp": data_parallel.DataParallelReplica, "fsdp": sharded.ShardedReplica}[STRATEGY]
real, calls = Replica.loss, 0

class Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): raise torch.OutOfMemoryError("CUDA out of memory")

def loss(self, idx, targets):
    global calls
    calls += 1
    is_full = self.ranks.index == self.ranks.count - 1 and len(idx) > 1 and calls > 1
    if is_full and STRATEGY == "fsdp":
        raise torch.OutOfMemoryError("CUDA out of memory")
    value = real(self, idx, targets)
    if is_full and MOMENT == "forward":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return Full.apply(value) if is_full else value

Replica.loss = loss
"""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "moment"), [("ddp", "forward"), ("ddp", "backward"), ("fsdp", "forward")])
def test_memory_that_runs_out_on_one_rank_halves_the_micro_batches_of_all(
    strategy: str, moment: str, command: Command
) -> None:
    environment = command.patched(HUNGRY.replace("MOMENT", repr(moment)).replace("STRATEGY", repr(strategy)))
    changes = ("steps=12", "checkpoint.every=2", f"distributed.strategy={strategy}")
    assert command.run(command.line("undisturbed", *changes))[0] == 0
    line = command.line("hungry", *changes)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["micro_batch_size"] == 1
    restarted = "all start again with the micro-batch halved 1 x" in done.stderr
    assert restarted == ((strategy, moment) != ("ddp", "forward"))  # else the ranks can agree before they wait
    torch.testing.assert_close(command.weights("hungry"), command.weights("undisturbed"), atol=1e-4, rtol=0)
    if restarted:
        line = command.line("failing", *changes, "on_oom=fail")
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 1 and "out of memory" in done.stderr and "start again" not in done.stderr


@pytest.mark.slow
def test_the_ranks_end_when_the_command_that_started_them_is_killed(command: Command) -> None:
    process = command.start(command.line("orphans", *LONG, "steps=100000"))
    command.until(lambda: command.step("orphans") > 5)
    ranks = ranks_of(process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    command.until(lambda: not any(Path(f"/proc/{rank}/stat").exists() for rank in ranks))


@pytest.mark.slow
def test_what_ranks_cannot_share_is_refused_in_one_line(command: Command) -> None:
    code, err = command.run(command.line("odd", "batch_size=3"))
    assert (code, err.strip().splitlines()[-1]) == (2, "batch_size: 3 sequences cannot be divided among 2 ranks")
    code, err = command.run(command.line("narrow", "model.n_embd=18", "model.n_head=1", "batch_size=4", ranks=4))
    assert code == 2 and "strategy fsdp: blocks.0.attention.query.weight has 18 vectors" in err, err
    code, err = command.run(command.line("typo", "alpa=1"))
    assert (code, err.strip()) == (2, "alpa: unknown setting, did you mean 'alpha'?")


def test_ranks_that_start_again_for_lack_of_memory_do_what_on_oom_says(tiny: TrainConfig, tmp_path: Path) -> None:
    class Again(Ranks):
        halvings = 1

    for on_oom, batch in (("split", 4), ("halve_batch", 2)):
        config = resolved(override(tiny, {"batch_size": 4, "steps": 2, "eval_every": 2, "on_oom": on_oom}))
        begun = set_up(config, tmp_path / on_oom, resume=None, dataset=None, ranks=Again())
        assert (begun.batch_size, begun.micro_batch_size) == (batch, 2)
        list(train(config, tmp_path / on_oom))  # saves without halvings
        resumed = set_up(config, tmp_path / on_oom, resume="latest", dataset=None, ranks=Again())
        assert (resumed.state.step, resumed.batch_size, resumed.micro_batch_size) == (2, batch, 2)


def test_a_process_is_a_rank_only_if_all_variables_of_torchrun_say_so() -> None:
    variables = {name: "1" for name in join.VARIABLES} | {"WORLD_SIZE": "2"}
    assert join.is_rank(variables)
    assert not join.is_rank(variables | {"WORLD_SIZE": "1"})
    assert not any(join.is_rank({k: v for k, v in variables.items() if k != name}) for name in variables)


def test_a_run_on_one_device_agrees_with_itself() -> None:
    assert ALONE.share(6) == slice(0, 6) and ALONE.gather("x") == ["x"]
    assert ALONE.stops(True) and not ALONE.agree_to_stop(False)
