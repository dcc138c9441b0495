"""Texts to batches of tokens with next to no padding, or none.

Texts of similar length are tokenised together, a window at a time; the texts of a window are sorted by their number
of tokens and cut into batches, each padded to its own longest text only, or put in one row.

# N texts, L tokens of the longest of them
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from gistfast.errors import ModelError, first_line
from gistfast.models.packed_texts import bounds_of_texts

Array = np.ndarray[Any, Any]

# A window this large pads its batches of 1,024 tokens hardly more than one that holds all texts.
CHARS_PER_WINDOW = 262_144
# Every text counts for so many more: the tokens that the tokenizer adds.
CHARS_OF_FRAME = 8

UNPADDED = {"text": {"padding": False}, "common": {"return_tensors": None}}


class TokenBatch(NamedTuple):
    """Texts that go through the model together.

    Attributes:
        numbers: Of the texts, in the order of their vectors.
        features: What the model reads; tensors (N, L) or of one row, and values that hold for all texts.
        num_tokens: Tokens of the texts.
        num_padded: Tokens of the batch, padding included.
    """

    numbers: Array
    features: dict[str, Any]
    num_tokens: int
    num_padded: int


@dataclass(frozen=True)
class Padding:
    """How a model's tokenizer fills rows up.

    Attributes:
        left: Whether padding stands before the tokens.
        values: What stands in the place of a token, for each feature that has one number a token.
        masked: Whether the model must be told that nothing is padding; the models of transformers need not.
    """

    left: bool
    values: Mapping[str, int]
    masked: bool

    @classmethod
    def of(cls, model: SentenceTransformer) -> "Padding | None":
        """What padding two texts of unequal length shows; None for models without padding.

        Raises:
            ModelError: When the tokenizer cannot pad.
        """
        try:
            features = model.preprocess(["", "one two three four"])
        except ValueError as error:
            raise ModelError(f"the guide's tokenizer cannot bring texts to one length: {first_line(error)}") from error
        mask = features.get("attention_mask")
        if mask is None:
            return None
        (row, column), *_ = (mask == 0).nonzero().tolist() or [(0, 0)]
        values = {
            key: int(value[row, column])
            for key, value in features.items()
            if torch.is_tensor(value) and value.shape == mask.shape and key != "attention_mask"
        }
        encoder = type(getattr(model[0], "model", None))
        return cls(bool(mask[row, -1]), values, masked=not encoder.__module__.startswith("transformers.models."))

    def num_fitting(self, lengths: Array, tokens_per_batch: int) -> int:
        """How many texts make one batch, at least 1.

        Args:
            lengths: Tokens of the texts, the longest first.
            tokens_per_batch: Tokens that a batch may have, padding included.
        """
        return min(max(tokens_per_batch // max(int(lengths[0]), 1), 1), len(lengths))

    def features(self, tokens: Mapping[str, Array], lengths: Array) -> tuple[dict[str, Any], int]:
        """What the model reads of one batch, and how many tokens that is, padding included.

        Args:
            tokens: For each feature that has one number a token, the numbers of the texts, one text after another.
            lengths: Tokens of the texts, the longest first.
        """
        columns = np.arange(max(int(lengths[0]), 1))
        sizes = lengths[:, None]
        real = columns >= len(columns) - sizes if self.left else columns < sizes
        features = {}
        for key, filler in self.values.items():
            filled = np.full(real.shape, filler, np.int64)
            filled[real] = tokens[key]
            features[key] = torch.from_numpy(filled)
        if self.masked or not real.all():
            features["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        return features, real.size


@dataclass(frozen=True)
class PackedRows(Padding):
    """Texts in one row in place of padding, for models that `gistfast.models.packed_texts.pack_texts` has prepared.

    Attributes:
        first_position: Number of the position of a text's first token.
    """

    first_position: int

    def num_fitting(self, lengths: Array, tokens_per_batch: int) -> int:
        """How many texts make one batch, at least 1; texts without tokens are batches of padding."""
        ends = np.cumsum(lengths[lengths > 0])
        if not len(ends):
            return super().num_fitting(lengths, tokens_per_batch)
        return max(int(np.searchsorted(ends, tokens_per_batch, side="right")), 1)

    def features(self, tokens: Mapping[str, Array], lengths: Array) -> tuple[dict[str, Any], int]:
        """What the model reads of one batch, and how many tokens that is."""
        longest, num_tokens = int(lengths[0]), int(lengths.sum())
        if not longest:
            return super().features(tokens, lengths)
        rows = {key: torch.from_numpy(tokens[key])[None] for key in self.values}
        bounds = bounds_of_texts(torch.from_numpy(lengths), num_tokens, longest, self.first_position)
        return rows | bounds, num_tokens


@dataclass(frozen=True)
class TokenWindow:
    """Tokenised texts, the longest first, without padding.

    Attributes:
        numbers: Of the texts, (N,).
        lengths: Their tokens, (N,).
        tokens: For each feature that has one number a token, the numbers of all texts, one text after another.
        shared: Features that hold for all texts.
        padding: How rows are filled up, or texts put in one row; None for models without attention.
    """

    numbers: Array
    lengths: Array
    tokens: Mapping[str, Array]
    shared: Mapping[str, Any]
    padding: Padding | None

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return int(self.lengths.sum())

    def batches(self, tokens_per_batch: int) -> Iterator[TokenBatch]:
        """Batches of at most `tokens_per_batch` tokens, padding included, those of the longest texts first.

        A text longer than the budget is a batch of its own; models without padding take the window in one.
        """
        if self.padding is None:
            yield TokenBatch(self.numbers, dict(self.shared), self.num_tokens, self.num_tokens)
            return
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        first = 0
        while first < len(self.numbers):
            last = first + self.padding.num_fitting(self.lengths[first:], tokens_per_batch)
            tokens = {key: values[ends[first] : ends[last]] for key, values in self.tokens.items()}
            lengths = self.lengths[first:last]
            features, num_padded = self.padding.features(tokens, lengths)
            yield TokenBatch(self.numbers[first:last], {**self.shared, **features}, int(lengths.sum()), num_padded)
            first = last


def tokenise(
    model: SentenceTransformer, texts: list[str], numbers: Array, prompt: str, padding: Padding | None
) -> TokenWindow:
    """A window of texts.

    Args:
        model: Whose tokenizer cuts the texts.
        texts: N of them.
        numbers: Of the texts, (N,).
        prompt: Stands before each of them.
        padding: Of the model, from `Padding.of`.
    """
    # Modules of other makers know no such option: what they padded is taken out again.
    options = {"processing_kwargs": UNPADDED} if isinstance(model[0], Transformer) else {}
    features = model.preprocess(texts, prompt=prompt or None, **options)
    if padding is None:
        ends = np.append(np.asarray(features.get("offsets", ()))[1:], len(features.get("input_ids", ())))
        return TokenWindow(numbers, np.diff(ends, prepend=0), {}, features, None)
    mask = features["attention_mask"]
    rows = {key: _unpadded(features[key], mask) for key in padding.values}
    lengths = np.array([len(row) for row in next(iter(rows.values()))], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    tokens = {key: np.concatenate([np.asarray(value[row], np.int64) for row in order]) for key, value in rows.items()}
    shared = {key: value for key, value in features.items() if key not in rows and key != "attention_mask"}
    return TokenWindow(numbers[order], lengths[order], tokens, shared, padding)


def _unpadded(values: Any, mask: Any) -> Sequence[Any]:
    """What is given for each token, as N rows of unequal length."""
    if not torch.is_tensor(values):
        rows: Sequence[Any] = values
        return rows
    return [row[real].numpy() for row, real in zip(values, mask.bool(), strict=True)]


def cut_windows(texts: Sequence[str], chars_per_window: int = CHARS_PER_WINDOW) -> list[Array]:
    """The numbers of the texts of each window, texts of similar length together.

    The window with the longest texts comes first: a batch that does not fit in memory fails at once, not after
    hours. The others come in a random order, the same in each run, so that the rate so far foretells the rest.

    Args:
        texts: All of them.
        chars_per_window: Characters of the texts of a window, about.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    window = np.cumsum(lengths[order] + CHARS_OF_FRAME) // chars_per_window
    first, *others = np.split(order, np.flatnonzero(np.diff(window)) + 1)
    return [first, *(others[number] for number in np.random.default_rng(0).permutation(len(others)))]
