"""How long an epoch's batches take, and in how much memory: `python -m gistfast.batches.bench`."""

import sys
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np

from gistfast.batches.samplers import ClusterBatchSampler, EvenBatchSampler, LengthBatchSampler, TaskBatchSampler
from gistfast.errors import OneLineParser


def samplers_of(num_rows: int, batch_size: int) -> dict[str, EvenBatchSampler]:
    """A sampler for each way, over rows with lengths, tasks and places drawn at random."""
    draw, rows = np.random.default_rng(0), range(num_rows)
    lengths = draw.lognormal(4.5, 0.8, num_rows).astype(np.int32)
    tasks = draw.integers(0, 300, num_rows, dtype=np.int32)
    places = draw.integers(0, 4096, num_rows, dtype=np.uint16)
    return {
        "random": EvenBatchSampler(rows, batch_size, False),
        "length": LengthBatchSampler(rows, batch_size, False, keys=lengths),
        "task": TaskBatchSampler(rows, batch_size, False, keys=tasks),
        "cluster": ClusterBatchSampler(rows, batch_size, False, keys=places),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print seconds and peak memory for each way; the exit code."""
    parser = OneLineParser(prog="python -m gistfast.batches.bench", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch (default: %(default)s)")
    options = parser.parse_args(argv)
    print(f"{'batching':10} {'first batch, s':>16} {'whole epoch, s':>16} {'peak, bytes/row':>16}")
    for name, sampler in samplers_of(options.rows, options.batch_size).items():
        first_s, all_s = _seconds(sampler)
        print(f"{name:10} {first_s:16.2f} {all_s:16.2f} {_peak_bytes(sampler) / options.rows:16.1f}")
    return 0


def _seconds(sampler: EvenBatchSampler) -> tuple[float, float]:
    """Seconds until the first batch is there, and until the last is."""
    begun_s = time.perf_counter()
    batches = iter(sampler)
    next(batches)
    first_s = time.perf_counter() - begun_s
    for _ in batches:
        pass
    return first_s, time.perf_counter() - begun_s


def _peak_bytes(sampler: EvenBatchSampler) -> int:
    """Most memory that NumPy and Python hold until the first batch is there; the shuffle's is torch's own."""
    tracemalloc.start()
    next(iter(sampler))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    sys.exit(main())
