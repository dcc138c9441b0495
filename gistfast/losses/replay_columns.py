"""A replay of the texts that carry the gradient, for a cached loss of sentence-transformers' trainer.

The same as in `gistfast.training.step`, but on columns that the trainer has padded.

Shapes: B rows, C columns, N = B x C texts, D student width.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gistfast.errors import ConfigError
from gistfast.losses.carriers import carriers

Features = dict[str, Any]


def partly_replayed_loss(
    loss: CachedLossMixin, columns: Iterable[Features], labels: Tensor | None, tolerance: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, whose backward pass embeds again the texts that carry the gradient, and how many they are.

    Args:
        loss: Embeds mini-batches and takes the loss of all vectors.
        columns: Features of each column.
        labels: Of the rows.
        tolerance: Relative length of the gradient that may be left out.

    Raises:
        ConfigError: When the features are not padded.
    """
    columns = list(columns)
    if any("cu_seq_lens_q" in features for features in columns):
        raise ConfigError("replay_tolerance needs padded features: give the student unpad_inputs=False")
    with torch.no_grad():
        embedded = [torch.cat([vectors for vectors, *_ in _embed(loss, features)]) for features in columns]
    leaves = [vectors.requires_grad_() for vectors in embedded]
    value: Tensor = loss.calculate_loss([[vectors] for vectors in leaves], labels, with_backward=True)
    gradients = [cast(Tensor, vectors.grad) for vectors in leaves]
    sizes = torch.cat([features["attention_mask"].sum(dim=1) for features in columns]).cpu().numpy()
    found = carriers(torch.cat(gradients), torch.cat(leaves).detach(), sizes, tolerance)
    starts = np.arange(len(leaves) + 1) * len(leaves[0])
    taken = [
        torch.from_numpy(found.places[first:end] - start).to(value.device)
        for start, (first, end) in zip(starts, pairwise(np.searchsorted(found.places, starts)), strict=False)
    ]
    value = value.detach().requires_grad_()
    hook = partial(_carry_back, loss, columns, taken, gradients)
    value.register_hook(hook)  # type: ignore[no-untyped-call]  # theirs is untyped
    return value, {"texts": torch.tensor(len(found.places)), "left_out": torch.tensor(found.left_out)}


def _embed(loss: CachedLossMixin, features: Features, *, with_grad: bool = False) -> Iterator[tuple[Tensor, Any]]:
    return loss.embed_minibatch_iter(features, with_grad=with_grad, copy_random_state=False)


def _carry_back(
    loss: CachedLossMixin, columns: list[Features], taken: list[Tensor], gradients: list[Tensor], scale: Tensor
) -> None:
    """Embed the rows taken of each column again, the longest first, and take their gradients to the weights."""
    model = loss.model
    in_turn = isinstance(model, DistributedDataParallel)
    with torch.enable_grad():
        with model.no_sync() if in_turn else nullcontext():
            for features, rows, gradient in zip(columns, taken, gradients, strict=True):
                lengths = features["attention_mask"][rows].sum(dim=1)
                ordered = rows[lengths.argsort(descending=True, stable=True)]
                left = gradient[ordered] * scale
                for vectors, *_ in _embed(loss, rows_of(features, ordered), with_grad=True):
                    torch.autograd.backward(vectors, left[: len(vectors)].to(vectors.dtype))
                    left = left[len(vectors) :]
        if in_turn:
            # Nobody knows which mini-batch is the last: processes exchange gradients in one text of none.
            ((vectors, *_),) = _embed(loss, rows_of(columns[0], torch.zeros_like(taken[0][:1])), with_grad=True)
            torch.autograd.backward(vectors, torch.zeros_like(vectors))


def rows_of(features: Features, rows: Tensor) -> Features:
    """The features of some rows of a column."""
    num_rows = len(features["input_ids"])
    return {
        key: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == num_rows else value
        for key, value in features.items()
    }
