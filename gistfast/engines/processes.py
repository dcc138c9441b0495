"""Several worker processes on this machine, one for each GPU, or as many as asked for.

Each loads the guide itself and takes shards by itself; this process counts what they do on one bar, passes on what
they have to say, and notices when one dies.
"""

import gc
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gistfast import errors
from gistfast.engines.job import describe_guide
from gistfast.engines.shards import Part
from gistfast.errors import WorkerError
from gistfast.guides.batch_done import BatchDone, advancing
from gistfast.models.pretrained import pick_device
from gistfast.progress import Bar
from gistfast.store import GuideInfo
from gistfast.store.vectors import VectorShards

logger = logging.getLogger(__name__)

SECONDS_TO_STOP = 30.0

# What a worker says, or None when it has ended.
Said = tuple["_Worker", dict[str, Any] | None]


def local_devices(device: str, processes: int | None) -> list[str]:
    """The device of each process: all GPUs for "auto", else the one that is named.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        processes: How many; one for each device when None. More processes than devices share them.

    Raises:
        ConfigError: When there is no such device.
    """
    import torch

    num_gpus = torch.cuda.device_count() if device == "auto" and torch.cuda.is_available() else 0
    devices = [f"cuda:{number}" for number in range(num_gpus)] if num_gpus > 1 else [pick_device(device)]
    return [devices[number % len(devices)] for number in range(processes or len(devices))]


class LocalProcesses:
    """One process for each of several devices."""

    guide = None

    def __init__(self, settings: Mapping[str, Any], devices: Sequence[str]) -> None:
        """Nothing is started yet.

        Args:
            settings: Of precompute, as JSON knows them.
            devices: Device of each process.
        """
        self._settings = settings
        self._devices = devices

    def guide_info(self) -> GuideInfo:
        """The guide as the first process will have it; it is loaded here for that, and not kept.

        Raises:
            ModelError: When it cannot be loaded.
        """
        import torch

        info = describe_guide({**self._settings, "device": self._devices[0]})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return info

    def embed(self, vectors: VectorShards, part: Part, bar: Bar) -> None:
        """Embed the shards of a part; returns when all processes have ended.

        Raises:
            GistfastError: The first that a process met; the others are stopped.
            WorkerError: When all processes died before the part was done.
        """
        import torch

        num_pending = len(part.of_shards(vectors.pending()))
        devices = self._devices[:num_pending]
        threads = max(torch.get_num_threads() // max(len(devices), 1), 1)
        heard: queue.SimpleQueue[Said] = queue.SimpleQueue()
        workers: list[_Worker] = []
        try:
            for number, device in enumerate(devices):
                given = {**self._settings, "device": device}
                job = {"settings": given, "store": str(vectors.store), "part": part, "threads": threads}
                workers.append(_Worker(number, device, _start(job)))
                threading.Thread(target=_listen, args=(workers[-1], heard), daemon=True).start()
            logger.info("%d processes on %s, %d threads each", len(workers), ", ".join(sorted({*devices})), threads)
            _follow(len(workers), heard, bar)
        finally:
            _stop(workers)
        if left := len(part.of_shards(vectors.pending())):
            raise WorkerError(
                f"all {len(workers)} processes died with {left} shards left: what is committed is kept; "
                "go on with --resume, with fewer --processes where memory was short"
            )


@dataclass(eq=False)
class _Worker:
    number: int
    device: str
    process: "subprocess.Popen[str]"
    # Texts that were counted and whose shard is not committed.
    uncommitted: int = field(default=0)


def _start(job: Mapping[str, Any]) -> "subprocess.Popen[str]":
    """A process of its own session: Ctrl-C reaches this process alone, which lets the others stop in order."""
    threads = str(job["threads"])
    process = subprocess.Popen(
        [sys.executable, "-m", "gistfast.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads},
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    return process


def _listen(worker: _Worker, heard: "queue.SimpleQueue[Said]") -> None:
    assert worker.process.stdout is not None
    for line in worker.process.stdout:
        heard.put((worker, json.loads(line)))
    worker.process.stdout.close()
    worker.process.wait()
    heard.put((worker, None))


def _follow(running: int, heard: "queue.SimpleQueue[Said]", bar: Bar) -> None:
    """Count and tell what the workers report, until the last has ended."""
    show = advancing(bar)
    while running:
        worker, said = heard.get()
        if said is None:
            running -= 1
            if worker.process.returncode:
                bar.advance(-worker.uncommitted)
                logger.warning("%s: %s", _death_of(worker), "others take its shard" if running else "none is left")
        elif "error" in said:
            raise _error(said)
        elif "warning" in said:
            logger.warning("process %d: %s", worker.number, said["warning"])
        else:
            embedded, committed = said.get("texts", 0), said.get("committed", 0)
            worker.uncommitted += embedded - committed
            if embedded:
                show(BatchDone(embedded, said["tokens"], said["padded"]))


def _death_of(worker: _Worker) -> str:
    code = worker.process.returncode
    if code >= 0:
        return f"process {worker.number} on {worker.device} ended with exit code {code}"
    name = signal.Signals(-code).name
    cause = ", as the system does when memory is short" if name == "SIGKILL" else ""
    return f"process {worker.number} on {worker.device} was ended by {name}{cause}"


def _error(said: Mapping[str, Any]) -> errors.GistfastError:
    kind = getattr(errors, said["error"])
    error: errors.GistfastError = kind(said["message"])
    return error


def _stop(workers: Sequence[_Worker]) -> None:
    """Let workers that still run commit what they are writing, and end."""
    for worker in workers:
        assert worker.process.stdin is not None
        with suppress(BrokenPipeError):
            worker.process.stdin.close()
    try:
        for worker in workers:
            worker.process.wait(SECONDS_TO_STOP)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        logger.warning("processes that do not stop are killed; their shards are embedded again by --resume")
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
