"""Writes a store with processes that are killed at random, until it is complete; run by test_store_crash.py.

    python kill_writers.py SOURCE STORE WORKERS KILLS [overwrite]

Workers are forked from a process that has loaded everything: a round takes milliseconds. Each appends the
number of a shard to STORE.log before it writes it.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import gistfast.store.ingest
from gistfast.rows.dataset import read_rows
from gistfast.store import GuideInfo, StoreWriter

ROWS_PER_SHARD = 2
WIDTH = 8
LONGEST_WRITE_S = 0.015


def guide(name: str) -> GuideInfo:
    return replace(GuideInfo.of_vectors(name, "lengths", width=WIDTH, vectors_hash=name), normalised=False)


def write_store(source: Path, store: Path, *, name: str, overwrite: bool) -> None:
    """What a worker does: start the store or go on with it."""
    gistfast.store.ingest.ROWS_PER_SHARD = ROWS_PER_SHARD
    rows = read_rows(source)
    with StoreWriter.create(
        store, guide=guide(name), source=rows, mode="overwrite" if overwrite else "resume"
    ) as writer:
        if writer.needs_rows:
            for batch in rows.batches(3):
                writer.add_rows(batch)
            writer.finish_rows()
        log = os.open(store.with_suffix(".log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for shard in writer.vectors.pending():
            os.write(log, f"{shard}\n".encode())
            lengths = [[len(name), len(text), *text.encode()[-6:]] for text in writer.vectors.texts_of(shard)]
            writer.vectors.write(shard, np.array(lengths, dtype=np.float32))
        writer.publish()


def start(source: Path, store: Path, *, name: str, overwrite: bool) -> int:
    """Fork a worker; its process id."""
    child = os.fork()
    if child:
        return child
    write_store(source, store, name=name, overwrite=overwrite)
    os._exit(0)


def let_work(children: list[int], log: Path, shards: int) -> None:
    """Return while a worker writes the shard that comes `shards` later, or right at its start for 0."""
    size = log.stat().st_size if log.exists() else 0
    while shards and not all(map(has_ended, children)):
        if log.exists() and log.read_bytes()[size:].count(b"\n") >= shards:
            break
        time.sleep(0.001)
    time.sleep(random.uniform(0, LONGEST_WRITE_S))


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def committed(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every commit and of the file that it names."""
    paths = [*store.glob("commits/*.json"), *store.glob("*/*.arrow")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path.is_file()}


def main() -> None:
    source, store, workers, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    overwrite = "overwrite" in sys.argv
    name = "second" if overwrite else "first"
    if overwrite:
        write_store(source, store, name="first", overwrite=False)
    for _ in range(kills // workers):
        before = committed(store) if not overwrite else {}
        children = [start(source, store, name=name, overwrite=overwrite) for _ in range(workers)]
        let_work(children, store.with_suffix(".log"), shards=random.choice([0, 1, 2, 3]))
        for child in children:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if status not in (0, signal.SIGKILL):
                sys.exit(f"a worker failed with status {status}")
        if overwrite and not (store / "store.json").is_file():
            sys.exit("the old store was gone before the new one took its place")
        after = committed(store)
        if lost := [path for path in before if "commits/" in path and before[path] != after.get(path)]:
            sys.exit(f"commits were lost or written again: {lost}")
    write_store(source, store, name=name, overwrite=overwrite)


if __name__ == "__main__":
    main()
