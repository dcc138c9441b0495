"""What the fused loss is measured against: the plain formula, and the loss parts of sentence-transformers.

Every baseline is a function of anchor and positive, (B, D), and guide_anchor and guide_positive, (B, G), to a scalar:
the loss with blocks ap, aa and pp at temperature `TEMPERATURE`.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

TEMPERATURE = 0.01

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(anchor: Tensor, positive: Tensor, guide_anchor: Tensor, guide_positive: Tensor) -> Tensor:
    """The loss by six matrix products and whole score matrices, as one writes it by hand."""
    a, p, ga, gp = (normalize(vectors, dim=-1) for vectors in (anchor, positive, guide_anchor, guide_positive))
    threshold = (ga * gp).sum(-1, keepdim=True)
    same = torch.eye(len(a), dtype=torch.bool, device=a.device)
    logits = [
        (x @ y.T)
        .float()
        .masked_fill(((gx @ gy.T) > threshold) & ~same if own else ((gx @ gy.T) > threshold) | same, -torch.inf)
        for x, y, gx, gy, own in ((a, p, ga, gp, True), (a, a, ga, ga, False), (p, p, gp, gp, False))
    ]
    return cross_entropy(torch.cat(logits, 1) / TEMPERATURE, torch.arange(len(a), device=a.device))


@cache
def compiled() -> LossFunction:
    """`plain` under torch.compile, compiled for each shape."""
    # One compilation a shape and pass; past the limit, PyTorch would run the function uncompiled.
    torch._dynamo.config.recompile_limit = 64
    function: LossFunction = torch.compile(plain, dynamic=False)
    return function


def sentence_transformers_gist(
    anchor: Tensor, positive: Tensor, guide_anchor: Tensor, guide_positive: Tensor
) -> Tensor:
    """`GISTEmbedLoss` of the installed sentence-transformers, from given vectors."""
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    features = [{"student": anchor, "guide": guide_anchor}, {"student": positive, "guide": guide_positive}]
    loss: Tensor = GISTEmbedLoss.forward(_stand_in(GISTEmbedLoss), features, torch.empty(0))
    return loss


def sentence_transformers_cached_gist(
    anchor: Tensor, positive: Tensor, guide_anchor: Tensor, guide_positive: Tensor
) -> Tensor:
    """The loss part of `CachedGISTEmbedLoss`, in its mini-batches of 32."""
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss

    students = [list(anchor.split(32)), list(positive.split(32))]
    guides = [list(guide_anchor.split(32)), list(guide_positive.split(32))]
    loss: Tensor = CachedGISTEmbedLoss.calculate_loss(_stand_in(CachedGISTEmbedLoss), students, guides)
    return loss


def _stand_in(loss_class: Any) -> Any:
    """An object with the loss's default options, whose models return the vectors that they are given."""
    stand_in = SimpleNamespace(
        model=lambda features: {"sentence_embedding": features["student"]},
        guide=lambda features: {"sentence_embedding": features["guide"]},
        must_retokenize=False, temperature=TEMPERATURE, margin=0.0, margin_strategy="absolute", mini_batch_size=32,
        contrast_anchors=True, contrast_positives=True, gather_across_devices=False, show_progress_bar=False,
        similarity_fct=torch.nn.CosineSimilarity(dim=-1), cross_entropy_loss=torch.nn.CrossEntropyLoss(),
    )  # fmt: skip
    stand_in.sim_matrix = lambda left, right: loss_class.sim_matrix(stand_in, left, right)
    return stand_in
