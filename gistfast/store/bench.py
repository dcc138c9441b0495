"""How fast guide vectors are gathered from a mapped store: `python -m gistfast.store.bench`.

Writes a store of 1 GiB (8 shards of 65,536 vectors of 1024 fp16 numbers) into a temporary folder, checks that
what is gathered is what was written, and times the gathering of 4096 random rows.
"""

import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gistfast.errors import OneLineParser
from gistfast.rows.dataset import read_rows
from gistfast.store import GuideInfo, GuideStore, StoreWriter
from gistfast.store.manifest import ROWS_PER_SHARD

NUM_SHARDS = 8
WIDTH = 1024
NUM_IDS = 4096

GUIDE = replace(GuideInfo.of_vectors("random numbers", "random", width=WIDTH, dtype="float16"), normalised=False)


def make_store(folder: Path) -> GuideStore:
    """A store of random vectors in `folder`."""
    numbers = np.arange(NUM_SHARDS * ROWS_PER_SHARD // 2)
    texts = {
        "anchor": [f"anchor {number}" for number in numbers],
        "positive": [f"positive {number}" for number in numbers],
    }
    pq.write_table(pa.table(texts), folder / "pairs.parquet")
    source = read_rows(folder / "pairs.parquet")
    with StoreWriter.create(folder / "store", guide=GUIDE, source=source) as writer:
        for rows in source.batches():
            writer.add_rows(rows)
        writer.finish_rows()
        for shard in writer.vectors.pending():
            writer.vectors.write(shard, vectors_of(shard))
        return GuideStore.open(writer.publish())


def vectors_of(shard: int) -> np.ndarray[Any, Any]:
    """The vectors of one shard: the same at each call."""
    return np.random.default_rng(shard).random((ROWS_PER_SHARD, WIDTH), dtype=np.float32)


def check(store: GuideStore) -> None:
    """Compare what is gathered with what was written, for ids of every shard.

    Raises:
        SystemExit: When they differ.
    """
    ids = torch.randint(store.num_texts, (NUM_IDS,))
    gathered = store.gather(ids)
    for shard in range(NUM_SHARDS):
        (mine,) = torch.nonzero(ids // ROWS_PER_SHARD == shard, as_tuple=True)
        written = torch.from_numpy(vectors_of(shard)).half()[ids[mine] % ROWS_PER_SHARD]
        if not torch.equal(gathered[mine], written):
            raise SystemExit(f"gathered vectors of shard {shard} are not those written: no figures")


def measure(store: GuideStore, repeats: int) -> list[float]:
    """Seconds of each of `repeats` gathers of other random ids."""
    seconds = []
    for _ in range(repeats):
        ids = torch.randint(store.num_texts, (NUM_IDS,))
        begun_s = time.perf_counter()
        store.gather(ids)
        seconds.append(time.perf_counter() - begun_s)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Print rows per second: median, 20th and 80th percentile; the exit code."""
    parser = OneLineParser(prog="python -m gistfast.store.bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=500, help="gathers to time (default: %(default)s)")
    parser.add_argument("--folder", help="where the temporary folder is made (default: the system's)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = make_store(Path(folder))
        check(store)
        # Touches every page, so that page faults are not timed.
        for shard in range(NUM_SHARDS):
            store.vectors_of(shard).view(torch.int16).max()
        measure(store, 20)
        rates = NUM_IDS / np.array(measure(store, options.repeats)) / 1e6
    low, median, high = np.percentile(rates, [20, 50, 80])
    machine = f"{platform.machine()}, numpy {np.__version__}, pyarrow {pa.__version__}, one thread"
    print(f"{NUM_IDS} random rows of {WIDTH} fp16 from {NUM_SHARDS} mapped shards, 1 GiB ({machine})")
    print(f"{median:.2f} M rows/s, 20th to 80th percentile {low:.2f} to {high:.2f}, {options.repeats} gathers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
