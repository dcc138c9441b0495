"""`GISTLoss` for batches larger than memory, in place of sentence-transformers' `CachedGISTEmbedLoss`.

Shapes: B rows, C columns, D student width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from torch import Tensor

from gistfast.errors import ConfigError
from gistfast.losses.gist_loss import GISTLoss
from gistfast.losses.replay_columns import partly_replayed_loss
from gistfast.store import GuideStore


class CachedGISTLoss(CachedLossMixin, GISTLoss):
    """`GISTLoss` for batches larger than the student's activations fit: embedded in mini-batches, twice.

    The vectors of all mini-batches are made without a graph, the loss and its gradient are taken on them, and
    each mini-batch is embedded again to carry its share of the gradient to the weights. With a tolerance only the
    texts that carry the gradient are embedded again, in other mini-batches, where dropout draws anew.

    Attributes:
        last_replay: With a tolerance, of the last batch: "texts" embedded again, and the relative length of the
            gradient that was "left_out", scalar tensors.

    Source: GradCache, arXiv:2101.06983.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        store: GuideStore,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        replay_tolerance: float = 0.0,
        **options: Any,
    ) -> None:
        """Take the options of `GISTLoss`, and how much is embedded at once.

        Args:
            model: The student.
            store: Guide vectors of every text that the dataset holds.
            mini_batch_size: Texts embedded at once.
            mini_batch_num_tokens: Tokens embedded at once, padding not counted; takes the place of
                `mini_batch_size`.
            replay_tolerance: Relative length of the gradient on the vectors that may be left out; 0 for nothing.
            **options: Those of `GISTLoss`.

        Raises:
            ConfigError: When an option is out of its range, or the model cannot embed a part of a batch.
        """
        super().__init__(model, store, **options)
        sizes = {"mini_batch_size": mini_batch_size, "mini_batch_num_tokens": mini_batch_num_tokens}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"{name} is {size}: give a whole number above 0")
        if not 0 <= replay_tolerance < 1:
            raise ConfigError(f"replay_tolerance is {replay_tolerance}: give a share of the gradient, such as 0.05")
        if has_static_embedding_input(model):
            raise ConfigError(
                "the student begins with a StaticEmbedding, whose batches cannot be cut into mini-batches: "
                "take GISTLoss"
            )
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.replay_tolerance = replay_tolerance
        self.last_replay: dict[str, Tensor] = {}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar whose backward pass embeds the mini-batches again."""
        if self.replay_tolerance and torch.is_grad_enabled():
            loss, self.last_replay = partly_replayed_loss(self, sentence_features, labels, self.replay_tolerance)
        else:
            loss = self.forward_cached(sentence_features, labels)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean loss from the vectors of each column's mini-batches.

        Args:
            reps: For each column the vectors of its mini-batches, each (texts, D).
            labels: (B, C) text ids.
            with_backward: Whether to leave their gradients on the vectors, and return the loss detached.
        """
        loss = self._loss([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {
            **super().get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "replay_tolerance": self.replay_tolerance,
        }
