"""Runs `gistfast.precompute` in processes that are killed at random moments; run by test_precompute_crash.py.

    python kill_precompute.py GUIDE FIRST SECOND FOLDER KILLS

Makes the store FOLDER/undisturbed of FIRST and appends SECOND to it. Then two processes make the same store,
FOLDER/killed-0, and are killed, again and again until it is complete; then two that append to it; and so on with the
next store until so many processes were killed, half of them appending. Prints the stores and the number of kills as
JSON. Processes are forked from one that has loaded everything: a round takes well under a second.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gistfast.store.ingest
from gistfast.guides import open_guide
from gistfast.guides.guide import load_guide
from gistfast.neighbours.index import import_faiss
from gistfast.stages.precompute import precompute
from gistfast.store.plan import is_store, read_plan
from gistfast.store.shards import commit_path

WORKERS = 2
ROWS_PER_SHARD = 2
# So many rounds hit every step of the work; the length of a round is fitted to the machine.
FEWEST_ROUNDS, MOST_ROUNDS = 4, 8
LONGEST_ROUND_S = 0.3

Work = Callable[[Path], object]


def start(work: Work, store: Path) -> int:
    """Fork a process that does the work; its id. It ends with 0, or with 1 and what went wrong on stderr."""
    if child := os.fork():
        return child
    code = 1
    try:
        # Before there are threads: PyTorch makes a new pool of them for the one that the fork left behind.
        torch.set_num_threads(1)
        work(store)
        code = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def finish(work: Work, store: Path) -> None:
    """Let one process do what is left of the work, undisturbed."""
    _, status = os.waitpid(start(work, store), 0)
    if status:
        sys.exit(f"an undisturbed process failed with status {status}")


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def num_killed(work: Work, store: Path, seconds: float) -> int:
    """Let processes work on one store for so long, then kill them; how many were still at work."""
    children = [start(work, store) for _ in range(WORKERS)]
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not all(map(has_ended, children)):
        time.sleep(0.001)
    killed = 0
    for child in children:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status not in (0, signal.SIGKILL):
            sys.exit(f"a process failed with status {status}")
        killed += status == signal.SIGKILL
    return killed


def committed(store: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of the commit of each shard that the store, or what it is becoming, has."""
    if not is_store(store):
        return {}
    plan = read_plan(store)
    commits = [commit_path(store, kind, shard) for kind in plan.kinds for shard in plan.shards_of(kind)]
    stats = {path: path.stat() for path in commits if path.exists()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def kill_until_done(work: Work, store: Path, longest_s: float) -> tuple[int, int]:
    """Kill processes until there is nothing left for them to do; how many, in how many rounds."""
    killed = rounds = 0
    now_killed = WORKERS
    while now_killed and rounds < MOST_ROUNDS:
        before = committed(store)
        now_killed = num_killed(work, store, random.uniform(0, longest_s))
        if lost := [path for path, stat in before.items() if committed(store).get(path) != stat]:
            sys.exit(f"commits were lost or written again: {lost}")
        killed += now_killed
        rounds += 1
    finish(work, store)
    return killed, rounds


def main() -> None:
    guide, first, second, folder = (Path(argument) for argument in sys.argv[1:5])
    kills = int(sys.argv[5])
    torch.set_num_threads(1)
    import_faiss()
    gistfast.store.ingest.ROWS_PER_SHARD = ROWS_PER_SHARD
    # The model is loaded before the processes are forked.
    loaded = load_guide(str(guide))
    open_guide.load_guide = lambda *_, **__: loaded
    works: list[Work] = [
        lambda store: precompute(first, guide=guide, out=store, resume=True, negatives=2),
        lambda store: precompute(second, guide=guide, out=store, append=True, negatives=2),
    ]
    for work in works:
        finish(work, folder / "undisturbed")
    killed, longest_s, stores = [0, 0], [LONGEST_ROUND_S] * 2, []
    while min(killed) < kills / 2:
        stores.append(folder / f"killed-{len(stores)}")
        for number, work in enumerate(works):
            kills_here, rounds = kill_until_done(work, stores[-1], longest_s[number])
            killed[number] += kills_here
            longest_s[number] *= 0.7 if rounds < FEWEST_ROUNDS else 1.4 if rounds == MOST_ROUNDS else 1
    print(json.dumps({"killed": killed, "stores": [str(store) for store in stores]}))


if __name__ == "__main__":
    main()
