"""What a large store costs beside the guide: `python -m gistfast.engines.bench`.

Reads a million short rows into a store, writes and checks one shard of vectors, and opens the plan of a store of a
billion texts of which half is embedded, as a worker does that goes on with it.
"""

import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gistfast.engines.claims import claim
from gistfast.errors import OneLineParser
from gistfast.rows.dataset import read_rows
from gistfast.store import StoreWriter
from gistfast.store.bench import GUIDE, vectors_of
from gistfast.store.files import file_checksum
from gistfast.store.manifest import PLAN_NAME, ROWS_PER_SHARD, Manifest
from gistfast.store.shards import COMMITS, commit_path
from gistfast.store.vectors import VectorShards

BILLION_TEXTS = -(-(10**9) // ROWS_PER_SHARD)
REPEATS = 5


def make_rows(path: Path, num_rows: int) -> None:
    """Write a Parquet file of rows whose texts are all distinct, some 70 bytes each."""
    names = ("anchor", "positive")
    with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in names])) as file:
        for start in range(0, num_rows, ROWS_PER_SHARD):
            numbers = range(start, min(start + ROWS_PER_SHARD, num_rows))
            questions = [f"which of the rivers of the north flows past town number {number}?" for number in numbers]
            answers = [
                f"Town number {number} lies where the river leaves the hills, to the north." for number in numbers
            ]
            file.write_table(pa.table([questions, answers], names=names))


def read_in(path: Path, store: Path) -> tuple[VectorShards, float]:
    """The shards that wait for vectors once all rows are in the store, and the seconds that took."""
    source = read_rows(path)
    with StoreWriter.create(store, guide=GUIDE, source=source) as writer:
        begun_s = time.perf_counter()
        for rows in source.batches():
            writer.add_rows(rows)
        writer.finish_rows()
        return writer.vectors, time.perf_counter() - begun_s


def plan_of_a_billion(small: Path, folder: Path) -> Path:
    """A store of a billion texts as far as its plan and commits go: all texts, and every other shard of vectors."""
    plan = Manifest.read(small / PLAN_NAME)
    sizes = (ROWS_PER_SHARD,) * BILLION_TEXTS
    segment = replace(plan.data.segments[0], texts=sizes, rows=sizes)
    plan = replace(plan, data=replace(plan.data, segments=(segment,)))
    (folder / COMMITS).mkdir(parents=True)
    plan.write(folder / PLAN_NAME)
    for kind, step in (("texts", 1), ("rows", 1), (plan.vectors[0], 2)):
        for shard in range(0, BILLION_TEXTS, step):
            commit_path(folder, kind, shard).write_text("{}")
    return folder


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, the median of a few times."""
    taken = []
    for _ in range(REPEATS):
        begun_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun_s)
    return float(np.median(taken))


def claim_and_release(path: Path) -> None:
    """What a worker does before and after a shard."""
    taken = claim(path)
    if taken is not None:
        taken.release(remove=True)


def report(folder: Path, num_rows: int) -> None:
    """Measure in `folder` and print a line for each figure."""
    path = folder / "pairs.parquet"
    make_rows(path, num_rows)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    vectors, read_s = read_in(path, folder / "store")
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    print(f"rows read in: {num_rows / read_s:,.0f} rows/s, {2 * num_rows / read_s:,.0f} texts/s, {grown_mib:,.0f} MiB")
    print(f"texts of one shard read: {seconds(lambda: vectors.texts_of(0)) * 1e3:,.0f} ms")
    array = vectors_of(0)[: vectors.sizes[0]]
    begun_s = time.perf_counter()
    vectors.write(0, array)
    write_s = time.perf_counter() - begun_s
    print(f"one shard of {len(array)} x {array.shape[1]} fp16 written, synced and committed: {write_s:.2f} s")
    shard = next((folder / "store").glob("vectors/*/*.arrow"))
    print(f"checksum: {shard.stat().st_size / seconds(lambda: file_checksum(shard)) / 1e9:.1f} GB/s")
    large = plan_of_a_billion(folder / "store", folder / "large")
    opened = VectorShards.open(large, GUIDE)
    print(f"a billion texts, {BILLION_TEXTS:,} shards, half of them embedded:")
    print(f"  plan opened: {seconds(lambda: VectorShards.open(large, GUIDE)) * 1e3:,.0f} ms")
    print(f"  commits listed: {seconds(opened.pending) * 1e3:,.0f} ms")
    print(f"  shard claimed and released: {seconds(lambda: claim_and_release(opened.lock_path(1))) * 1e3:.2f} ms")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; the exit code."""
    parser = OneLineParser(prog="python -m gistfast.engines.bench", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows to read in (default: %(default)s)")
    parser.add_argument("--folder", help="where the temporary folder is made (default: the system's)")
    options = parser.parse_args(argv)
    print(f"{platform.machine()}, numpy {np.__version__}, pyarrow {pa.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report(Path(folder), options.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
