"""A training process that is killed by SIGKILL goes on as if nothing had happened."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from train_cases import ROWS, same_weights, steps

from gistfast.store import GuideStore
from gistfast.training.run_folder import RunFolder, step_of

NUM_KILLS = 3


def start(store: Path, student: Path, out: Path, *options: str) -> "subprocess.Popen[bytes]":
    """A run as a process, with as many threads as its user's, that saves a checkpoint after each step."""
    command = [sys.executable, "-m", "gistfast", "train", store, "--student", student, "--out", out, "--resume"]
    command += ["--max-steps", "16", "--batch-size", "4", "--learning-rate", "1e-3", "--temperature", "0.1"]
    command += ["--save-steps", "1", "--trackers", "none", "--no-picture", "--device", "cpu", *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after_a_checkpoint(process: "subprocess.Popen[bytes]", run: RunFolder, draw: random.Random) -> int:
    """Kill the process some time after it has saved a checkpoint that was not there before; its exit code.

    None of the processes that it made outlives it.
    """
    before = step_of(run.last_checkpoint())
    while step_of(run.last_checkpoint()) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.05))
    made = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    assert psutil.wait_procs(made, timeout=60)[1] == []
    return code


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--workers", "1", "--cached"]], ids=["plain", "workers and cached"])
def test_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    options: list[str], make_store: Callable[..., GuideStore], tiny_student: Path, tmp_path: Path
) -> None:
    store = make_store(ROWS).path
    undisturbed, killed = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "killed")
    # A process too: sums of one thread and of several differ in their last bit.
    assert start(store, tiny_student, undisturbed.path, *options).wait() == 0
    draw = random.Random(0)
    codes = [
        kill_after_a_checkpoint(start(store, tiny_student, killed.path, *options), killed, draw)
        for _ in range(NUM_KILLS)
    ]
    # A quick machine may come to the end before the last kill.
    assert codes[0] == -signal.SIGKILL
    assert start(store, tiny_student, killed.path, *options).wait() == 0
    assert same_weights(undisturbed.path, killed.path)
    losses = [{record["step"]: record["loss"] for record in steps(path)} for path in (undisturbed.path, killed.path)]
    assert losses[0] == losses[1]
