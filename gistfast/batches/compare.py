"""What each way to batch does to a store's negatives, without training: `python -m gistfast.batches.compare STORE`.

Shapes: B rows of a batch, G guide width.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from gistfast.batches.choice import Batching, StoreBatches
from gistfast.batches.orders import Array
from gistfast.errors import GistfastError, OneLineParser
from gistfast.store import GuideStore


@dataclass(frozen=True, kw_only=True)
class Meetings:
    """What anchors meet, mean over the rows of some batches.

    Attributes:
        batches: Batches in an epoch.
        rows: Rows of a batch.
        dropped: Share of the candidates, the other rows' positives, that the guide drops at margin 0, 0 to 1.
        dropped_per_row: The same as a number.
        hardest: Guide score of the hardest negative that is left; rows that have none are left out.
        padding: Share of the characters that padding adds when a column is as long as its longest text, 0 to 1.
    """

    batches: int
    rows: float
    dropped: float
    dropped_per_row: float
    hardest: float
    padding: float


def compare(
    store: GuideStore, *, batch_size: int, num_batches: int, clusters: int | None = None, seed: int = 0
) -> Iterator[tuple[str, Meetings]]:
    """The name of each way that the store admits, and what anchors meet in the first batches of its first epoch.

    Args:
        store: The guide store.
        batch_size: Rows of a batch at most.
        num_batches: Batches to look at.
        clusters: How many, for "cluster"; chosen from rows and batch size when None.
        seed: Decides the batches.
    """
    rows = np.asarray(store.rows[~store.held_out])
    lengths = store.texts.num_characters()
    for batching in get_args(Batching):
        if batching == "task" and not store.tasks:
            continue
        made = StoreBatches(store, batching, clusters=clusters)
        sampler = made(range(len(rows)), batch_size, False, seed=seed)
        batches = [rows[batch] for batch in islice(sampler, num_batches)]
        yield batching, _mean(store, batches, lengths, len(sampler))


def _mean(store: GuideStore, batches: Sequence[Array], lengths: Array, in_epoch: int) -> Meetings:
    dropped, hardest = (torch.cat(parts) for parts in zip(*(_judged(store, ids) for ids in batches), strict=True))
    candidates = torch.cat([torch.full((len(ids),), len(ids) - 1.0) for ids in batches])
    padded = sum(len(ids) * int(lengths[ids].max(axis=0).sum()) for ids in batches)
    return Meetings(
        batches=in_epoch,
        rows=float(np.mean([len(ids) for ids in batches])),
        dropped=float(dropped.sum() / candidates.sum()),
        dropped_per_row=float(dropped.mean()),
        hardest=float(hardest[hardest.isfinite()].mean()),
        padding=1 - sum(int(lengths[ids].sum()) for ids in batches) / padded,
    )


def _judged(store: GuideStore, ids: Array) -> tuple[Tensor, Tensor]:
    """Candidates dropped, and the score of the hardest one kept (-inf when none is), (B,) fp32 each.

    Args:
        store: Gives the guide's vectors.
        ids: Of the texts of a batch, (B, C); the first two columns are anchors and positives.
    """
    scores = _scores(store, ids)
    same = store.identity(torch.from_numpy(ids[:, :2]))
    repeated = (same[:, None, 0] == same[None, :, 1]) | (same[:, None, 1] == same[None, :, 1])
    own = torch.eye(len(ids), dtype=torch.bool)
    dropped = ((scores > scores.diagonal()[:, None]) | repeated) & ~own
    kept = scores.masked_fill(dropped | own, -torch.inf)
    return dropped.sum(1).float(), kept.amax(1)


def _scores(store: GuideStore, ids: Array) -> Tensor:
    """Guide score of each anchor with each positive, (B, B) fp32."""
    vectors = store.gather(torch.from_numpy(ids[:, :2])).float()
    # Where the score is the mean of several guides, the store has scaled them: their vectors are one.
    widths = [store.width] if store.guide_score == "mean" else list(store.guide_widths)
    parts = [torch.nn.functional.normalize(part, dim=-1) for part in torch.split(vectors, widths, dim=-1)]
    scores = torch.stack([part[:, 0] @ part[:, 1].T for part in parts])
    return scores.amin(0) if store.guide_score == "min" else scores.amax(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each way; the exit code."""
    parser = OneLineParser(prog="python -m gistfast.batches.compare", description=__doc__)
    parser.add_argument("store", help="folder of the guide store")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=100, help="batches to look at (default: %(default)s)")
    parser.add_argument("--clusters", type=int, help="clusters (default: of eight batches each)")
    options = parser.parse_args(argv)
    names = [field.name for field in fields(Meetings)]
    try:
        store = GuideStore.open(options.store)
        print(f"{'batching':10}", *(f"{name:>16}" for name in names))
        chosen = {"batch_size": options.batch_size, "num_batches": options.batches, "clusters": options.clusters}
        for name, found in compare(store, **chosen):
            print(f"{name:10}", *(f"{_written(getattr(found, column)):>16}" for column in names))
    except GistfastError as error:
        parser.exit(1, f"gistfast: {error}\n")
    return 0


def _written(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
