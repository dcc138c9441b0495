"""Memory of `gistfast precompute`, and how soon a stopped run goes on: `python -m gistfast.stages.memory_bench`.

Writes a file of distinct texts and a small guide (a BERT of one layer, random weights) into a temporary folder, runs
precompute on it, stops it half-way and resumes it. Counts what the process holds beyond what it held once a model
was loaded: memory of its own, and apart from it the pages of files that it has mapped, which the system takes back
when others need them.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gistfast.demo.data import wordnet_pairs
from gistfast.demo.models import demo_guide
from gistfast.errors import OneLineParser
from gistfast.guides.batch_done import BatchDone, OnBatch
from gistfast.guides.directions import Vectors
from gistfast.guides.guide import ModelGuide, load_guide
from gistfast.models.prompts import Role
from gistfast.process_memory import memory_mib
from gistfast.stages.precompute import precompute

WIDTH = 384
WORDS_PER_TEXT = 12
ROWS_AT_ONCE = 10_000


class HalfWayError(Exception):
    """Stops the first run."""


def write_pairs(path: Path, num_texts: int) -> None:
    """Write pairs of distinct texts, `num_texts` in all: random words of WordNet's definitions and a number."""
    words = np.array(
        sorted({word for text in pq.read_table(wordnet_pairs())["positive"].to_pylist() for word in text.split()})
    )
    draw = np.random.default_rng(0)
    schema = pa.schema({"anchor": pa.string(), "positive": pa.string()})
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, num_texts // 2, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, num_texts // 2))
            drawn = words[draw.integers(len(words), size=(2, len(rows), WORDS_PER_TEXT))].tolist()
            columns = [
                [" ".join([*text, str(row)]) for row, text in zip(rows, column, strict=True)] for column in drawn
            ]
            file.write_batch(pa.record_batch(columns, schema=schema))


def write_guide(folder: Path) -> None:
    """Write a BERT of one layer, as wide as all-MiniLM-L6-v2 and with its tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(demo_guide())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=WIDTH,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def held_mib() -> tuple[float, float]:
    """MiB in memory of this process: its own, and of files that it has mapped."""
    return memory_mib("RssAnon"), memory_mib("RssFile")


class Peak:
    """The most that the process held beyond what it held at the beginning, in MiB."""

    def __init__(self) -> None:
        self._begun = held_mib()
        self._done = threading.Event()
        self.own = self.mapped = 0.0

    def look(self) -> None:
        """Look once."""
        own, mapped = held_mib()
        self.own = max(self.own, own - self._begun[0])
        self.mapped = max(self.mapped, mapped - self._begun[1])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look fifty times a second while the block runs."""

        def watch() -> None:
            while not self._done.wait(0.02):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            self._done.clear()


@contextmanager
def batches_seen(see: OnBatch) -> Iterator[None]:
    """Show every batch that a guide embeds to `see`, while the block runs."""
    original = ModelGuide.embed

    def embed(guide: ModelGuide, texts: Sequence[str], role: Role, on_batch: OnBatch | None = None) -> Vectors:
        def both(done: BatchDone) -> None:
            see(done)
            if on_batch is not None:
                on_batch(done)

        return original(guide, texts, role, both)

    with patch.object(ModelGuide, "embed", embed):
        yield


def run_until_half(num_texts: int, **options: Any) -> None:
    """Precompute until half of the texts are embedded."""
    seen = 0

    def stop_half_way(done: BatchDone) -> None:
        nonlocal seen
        seen += done.num_texts
        if seen >= num_texts / 2:
            raise HalfWayError

    with batches_seen(stop_half_way):
        try:
            precompute(**options)
        except HalfWayError:
            return
    raise SystemExit("the first run was not stopped: give more --texts")


def resume(**options: Any) -> float:
    """Go on to the end; seconds from the beginning to the first vectors, loading the model included."""
    begun_s = time.perf_counter()
    first: list[float] = []

    def note_first(_done: BatchDone) -> None:
        if not first:
            first.append(time.perf_counter() - begun_s)

    with batches_seen(note_first):
        precompute(**options, resume=True)
    return first[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Print peaks, time to the first vectors of the resumed run, and the rate; the exit code."""
    parser = OneLineParser(prog="python -m gistfast.stages.memory_bench", description=__doc__)
    parser.add_argument("--texts", type=int, default=200_000, help="distinct texts (default: %(default)s)")
    parser.add_argument("--index", default="none", help="as of precompute (default: %(default)s)")
    parser.add_argument("--folder", help="where the temporary folder is made (default: the system's)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_pairs(folder / "pairs.parquet", options.texts)
        write_guide(folder / "guide")
        load_guide(str(folder / "guide"), pooling="mean").embed(["river", "a stream of water"], "query")
        given: dict[str, Any] = {"source": folder / "pairs.parquet", "guide": folder / "guide", "out": folder / "store"}
        given |= {"pooling": "mean", "index": options.index}
        begun_s, peak = time.perf_counter(), Peak()
        with peak.watched():
            run_until_half(options.texts, **given)
            first_s = resume(**given)
        elapsed_s = time.perf_counter() - begun_s
    print(f"{options.texts:,} distinct texts, {WIDTH} wide, index {options.index}: {elapsed_s:,.0f} s in all")
    print(f"at most {peak.own:,.0f} MiB of its own beyond the loaded model, {peak.mapped:,.0f} MiB of mapped files")
    print(f"first vectors {first_s:.1f} s after the start of the resumed run, loading the guide included")
    return 0


if __name__ == "__main__":
    sys.exit(main())
