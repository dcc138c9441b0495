"""A few texts go through a student before the first step, to show that a way of embedding them is right here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from gistfast.models.encoder import encoder_of
from gistfast.students.input import TextSet
from gistfast.training.collate import Collator

# Rows that are tried, and among how many the longest text is looked for.
_NUM_TRIED = 8
_NUM_SEARCHED = 65_536


def some_texts(model: SentenceTransformer, collator: Collator) -> TextSet:
    """The texts of a few rows, the longest of many among them, on the student's device."""
    entries = collator.store.rows_of(0)[:_NUM_SEARCHED]
    # Mined negatives come last and have no column.
    columns = zip(entries.T, collator.tokens_of_column, strict=False)
    sizes = [collator.tokens[number].lengths(column) for column, number in columns]
    longest = np.stack(sizes).max(axis=0).argmax()
    rows = np.unique([*range(min(_NUM_TRIED, len(entries))), longest])
    return TextSet(**collator(rows)["texts"]).to(model.device)


def early_weights(model: SentenceTransformer) -> Sequence[Tensor]:
    """The first weights that are trained, whose gradient went through all layers; without the table of words."""
    # It is large.
    table: Any = encoder_of(model).get_input_embeddings()
    trained = [weight for weight in model.parameters() if weight.requires_grad and weight is not table.weight]
    # Of an adapter that is new, every other weight has no gradient.
    return trained[:4]


@contextmanager
def as_in_a_run(model: SentenceTransformer, *, training: bool, bf16: bool) -> Iterator[None]:
    """Train or evaluate in the run's precision, and leave modes and random numbers as they were."""
    before = {module: module.training for module in model.modules()}
    device = model.device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
    with torch.random.fork_rng(devices=[model.device] if device == "cuda" else []), autocast:
        model.train(training)
        try:
            yield
        finally:
            for module, mode in before.items():
                module.training = mode
