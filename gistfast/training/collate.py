"""From row numbers to a batch: one set of distinct texts, sorted by length and cut into forward passes.

All columns of a batch are one set of texts. Each distinct text is embedded once, with texts of about its length, so
that hardly any padding is computed; which rows meet is the sampler's affair and does not change. Nothing here loops
over tokens or texts in Python, and guide vectors never pass through lists.

Shapes: B rows, C columns, N distinct texts, T tokens, G guide width.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from gistfast.store import GuideStore
from gistfast.store.export import rows_with_negatives
from gistfast.students.input import text_set
from gistfast.students.tokens import Tokens, joined_pieces
from gistfast.training.passes import Passes

Array = np.ndarray[Any, Any]
Split = Literal["train", "held_out"]


class Batch(TypedDict):
    """What a step is made of.

    Attributes:
        rows: (B,) numbers of the rows in the store.
        identity: (B, C) which text each cell is.
        places: (B, C) number of each cell's text among the distinct ones.
        guide: (N, G) guide vectors of the distinct texts, in the stored dtype.
        texts: The fields of a `gistfast.students.input.TextSet`.
        counts: (5,) what `COUNTS` names.
    """

    rows: Tensor
    identity: Tensor
    places: Tensor
    guide: Tensor
    texts: dict[str, Any]
    counts: Tensor


class MixedBatch(Batch):
    """A batch of one of several stores.

    Attributes:
        store: Number of the store.
    """

    store: int


COUNTS = ("rows", "tokens", "padded_tokens", "texts", "distinct_texts")


class Rows(Dataset[Array]):
    """The rows of a split as a dataset of their numbers, in the order of `store.to_dataset`; a batch is read at once.

    It pickles as its store and split.

    Attributes:
        store: The guide store.
        split: "train" or "held_out".
    """

    def __init__(self, store: GuideStore, split: Split) -> None:
        """Take the rows of a split."""
        self.store = store
        self.split = split

    @cached_property
    def numbers(self) -> Array:
        """Numbers of the rows in the store, (R,), ascending."""
        return np.flatnonzero(self.store.held_out == (self.split == "held_out"))

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "split": self.split}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Array:
        return self.numbers[place]  # type: ignore[no-any-return]

    def __getitems__(self, places: list[int]) -> Array:
        return self.numbers[places]


class MixedRows(ConcatDataset[Array]):
    """The rows of a split of several stores, counted through; a batch, which is of one of them, is read at once.

    Attributes:
        split: "train" or "held_out".
    """

    def __init__(self, stores: Sequence[GuideStore], split: Split) -> None:
        """Take the rows of a split."""
        super().__init__([Rows(store, split) for store in stores])
        self.split = split

    def __getitems__(self, places: list[int]) -> tuple[int, Array]:
        """Number of the store, and numbers of its rows."""
        store = bisect_right(self.cumulative_sizes, places[0])
        rows = cast(Rows, self.datasets[store])
        first = self.cumulative_sizes[store] - len(rows)
        assert first <= min(places) <= max(places) < first + len(rows), "a batch is of one store"
        return store, rows.__getitems__([place - first for place in places])


class Collator:
    """Makes a `Batch` of row numbers; it travels to the workers of a loader."""

    def __init__(
        self,
        store: GuideStore,
        tokens: Sequence[Tokens],
        tokens_of_column: Sequence[int],
        kinds: Sequence[int],
        passes: Passes,
        mined_negatives: int = 0,
    ) -> None:
        """Take where texts, tokens and guide vectors are.

        Args:
            store: The guide store.
            tokens: The student's tokens under each distinct prompt.
            tokens_of_column: Number of the tokens for each column.
            kinds: For each of the tokens the kind of text; texts of two kinds share no forward pass.
            passes: How texts are cut into forward passes.
            mined_negatives: To add to each row; they are tokenised like positives.
        """
        self.store = store
        self.tokens = tokens
        self.tokens_of_column = np.array([*tokens_of_column, *[tokens_of_column[1]] * mined_negatives])
        self.mined_negatives = mined_negatives
        self.kinds = np.array(kinds)
        self.passes = passes

    def __call__(self, rows: Array) -> Batch:
        """The batch of the rows (B,) of the store."""
        entries = rows_with_negatives(self.store, rows, self.mined_negatives)
        keys, places = np.unique(entries * len(self.tokens) + self.tokens_of_column, return_inverse=True)
        distinct, which = np.divmod(keys, len(self.tokens))
        sizes = np.empty(len(keys), np.int64)
        for number, tokens in enumerate(self.tokens):
            mine = which == number
            sizes[mine] = tokens.lengths(distinct[mine])
        kinds = self.kinds[which]
        order = np.lexsort((-sizes, kinds))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        distinct, which, sizes, kinds = distinct[order], which[order], sizes[order], kinds[order]
        forwards = self.passes.cut(sizes, kinds)
        num_padded = self.passes.num_tokens(sizes, forwards)
        ids = torch.from_numpy(distinct)
        return {
            "rows": torch.from_numpy(rows),
            "identity": self.store.identity(torch.from_numpy(entries)),
            "places": torch.from_numpy(rank[places.reshape(entries.shape)]),
            "guide": self.store.gather(ids),
            "texts": vars(text_set(self._gather(distinct, which, sizes), sizes, forwards)),
            "counts": torch.tensor([len(rows), sizes.sum(), num_padded, entries.size, len(keys)], dtype=torch.float32),
        }

    def _gather(self, entries: Array, which: Array, sizes: Array) -> Array:
        """The tokens of the texts, one after the other in their order."""
        if len(self.tokens) == 1:
            return self.tokens[0].gather(entries)
        found = np.empty(sizes.sum(), np.int32)
        starts = np.cumsum(sizes) - sizes
        every = np.arange(len(found))
        for number, tokens in enumerate(self.tokens):
            mine = which == number
            found[joined_pieces(every, starts[mine], sizes[mine])] = tokens.gather(entries[mine])
        return found


class MixedCollator:
    """Makes a `MixedBatch` of what `MixedRows` gives."""

    def __init__(self, of_stores: Sequence[Collator]) -> None:
        """Take the collator of each store."""
        self.of_stores = of_stores

    def __call__(self, chosen: tuple[int, Array]) -> MixedBatch:
        """The batch of rows (B,) of the store with a number."""
        store, rows = chosen
        return {**self.of_stores[store](rows), "store": store}
