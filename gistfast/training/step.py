"""The vectors of a set of texts, and the way of the gradient back: with all graphs kept, or by embedding again.

Kept: every forward pass keeps its graph, one loss is taken on all vectors, one backward pass goes through it all.

Replayed (GradCache): the passes keep nothing, the loss and its gradient are taken on the vectors, and then each pass is
made again with a graph to carry its part of the gradient to the weights: one pass is in memory at a time.

A replay may leave out texts that carry little of the gradient (`gistfast.losses.carriers`).

Shapes: N texts, D student width.

Source: GradCache, arXiv:2101.06983.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gistfast.losses.carriers import carriers
from gistfast.students.input import InputForm, TextSet
from gistfast.training.passes import Passes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Replay:
    """How much of the gradient is replayed.

    Attributes:
        tolerance: Relative length of what may be left out; 0 for nothing.
        unbiased: Draw some of the texts that would be left out, and let each stand for more than itself, so that the
            mean over the draws is the whole gradient.
        passes: How the texts that are left are cut anew.
    """

    tolerance: float
    unbiased: bool
    passes: Passes


def embed(model: Any, form: InputForm, texts: TextSet) -> Tensor:
    """The vectors (N, D) of the texts, in their order; every pass keeps its graph where gradients are on."""
    return torch.cat([form.embed(model, texts, *forward) for forward in texts.forwards.tolist()])


def replayed_loss(
    model: Any,
    form: InputForm,
    texts: TextSet,
    loss_of: Callable[[Tensor], Tensor],
    replay: Replay,
    own_weights: Sequence[Tensor] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, whose backward pass embeds texts again, and what of them: "replayed_texts", "replay_left_out".

    With a tolerance the texts are cut into other passes than before, where dropout draws anew; without one every pass
    is repeated as it was.

    Args:
        model: The student.
        form: What it takes.
        texts: The texts.
        loss_of: The loss of their vectors (N, D).
        replay: How much of the gradient goes back.
        own_weights: What the loss is differentiated for beside the vectors.
    """
    states, parts = [], []
    with torch.no_grad():
        for forward in texts.forwards.tolist():
            states.append(RandContext(texts.tokens))
            parts.append(form.embed(model, texts, *forward))
    vectors = torch.cat(parts).requires_grad_()
    loss = loss_of(vectors)
    gradient, *own_gradients = torch.autograd.grad(loss, [vectors, *own_weights])
    left_out = 0.0
    if replay.tolerance:
        found = carriers(gradient, vectors.detach(), texts.sizes, replay.tolerance, unbiased=replay.unbiased)
        texts, states, left_out = part_of(texts, found.places, replay.passes), [], found.left_out
        places, weights = (torch.from_numpy(array).to(gradient.device) for array in (found.places, found.weights))
        gradient = gradient[places] * weights[:, None].to(gradient.dtype)
    loss = loss.detach().requires_grad_()
    hook = partial(_carry_back, model, form, texts, gradient, states)
    loss.register_hook(hook)  # type: ignore[no-untyped-call]  # theirs is untyped
    for weight, own_gradient in zip(own_weights, own_gradients, strict=True):
        # Adds nothing to the loss, and to the weight its gradient.
        loss = loss + ((weight - weight.detach()) * own_gradient).sum()
    counts = {"replayed_texts": float(len(texts)), "replay_left_out": left_out}
    return loss, {name: torch.tensor(count, device=loss.device) for name, count in counts.items()}


def part_of(texts: TextSet, places: Array, passes: Passes) -> TextSet:
    """The texts at some places (n,), ascending, cut into passes of their own."""
    index = torch.from_numpy(places).to(texts.starts.device)
    firsts, ends, kinds = texts.forwards.T
    sizes, kinds = texts.sizes[places], np.repeat(kinds, ends - firsts)[places]
    return TextSet(texts.tokens, texts.starts[index], texts.lengths[index], sizes, passes.cut(sizes, kinds))


def _carry_back(
    model: Any, form: InputForm, texts: TextSet, gradient: Tensor, states: Sequence[RandContext], scale: Tensor
) -> None:
    """Embed each pass again and take its part of the gradient (N, D) to the weights.

    Args:
        model: The student.
        form: What it takes.
        texts: The texts.
        gradient: On their vectors.
        states: Of the random numbers before each pass; none to draw anew.
        scale: Of the gradient, from what follows the loss.
    """
    passes = texts.forwards.tolist()
    for number, (first, end, kind) in enumerate(passes):
        # Processes exchange their gradients once, in the last pass.
        waits = isinstance(model, DistributedDataParallel) and number < len(passes) - 1
        with model.no_sync() if waits else nullcontext():
            with torch.enable_grad(), states[number] if states else nullcontext():
                vectors = form.embed(model, texts, first, end, kind)
            torch.autograd.backward(vectors, (gradient[first:end] * scale).to(vectors.dtype))
