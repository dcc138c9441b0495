"""Whether a student takes its texts padded or in one row: packed passes have to show first that they are right.

Shapes: N texts, D student width.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from gistfast.errors import first_line
from gistfast.models.packed_attention import packing_missing
from gistfast.models.packed_texts import Attention, largest_error, refuse_unpadded, say_unpadded, unpack_texts
from gistfast.students.input import InputForm, TextSet
from gistfast.students.packed import PackedForm, pack
from gistfast.training.collate import Collator
from gistfast.training.passes import PackedPasses, Passes
from gistfast.training.step import embed
from gistfast.training.trial import as_in_a_run, early_weights, some_texts

# Padded passes in the run's precision are off from fp32 by so much; packed ones may be by so many times as much, or, in
# fp32, where that is nothing, by so much of a vector's length. Texts that see each other are off by far more.
_TIMES_PADDED = 3.0
_IN_FLOAT32 = 1e-4


def choose_form(
    model: SentenceTransformer, form: InputForm, collators: Sequence[Collator], *, attention: Attention, bf16: bool
) -> InputForm:
    """What the student takes, padded or in one row; the collators cut their texts into passes of it from then on.

    Args:
        model: The student, on its device.
        form: What it takes of padded texts.
        collators: They make batches of them.
        attention: "auto" for one row where that can be and is right.
        bf16: Whether the run computes in bfloat16.

    Raises:
        ConfigError: When "unpadded" is asked for and cannot be had.
    """
    if attention == "padded" or (attention == "auto" and form.padding == "none"):
        return form
    passes = PackedPasses(collators[0].passes.budget)
    missing = _missing(model, form, bf16)
    packed = _packed(model, form, collators, passes, bf16) if missing is None else missing
    if isinstance(packed, PackedForm):
        say_unpadded(model.device, gives="vectors and gradients")
        for collator in collators:
            collator.passes = passes
        return packed
    refuse_unpadded(attention, packed)
    return form


def _missing(model: SentenceTransformer, form: InputForm, bf16: bool) -> str | None:
    """What is known to keep packed passes from running."""
    if form.padding == "none":
        return "the student has no attention"
    return packing_missing(model.device, None if bf16 else "--bf16")


def _packed(
    model: SentenceTransformer, form: InputForm, collators: Sequence[Collator], passes: Passes, bf16: bool
) -> PackedForm | str:
    """The form of packed passes, or what is wrong with them."""
    packed = None
    try:
        packed = pack(model, form)
        found = (_difference(model, form, packed, some_texts(model, collator), passes, bf16) for collator in collators)
        wrong = next(filter(None, found), None)
    except Exception as error:  # What was not made for packed passes may raise anything.
        wrong = first_line(error)
    if packed is not None and wrong is not None:
        unpack_texts(model)
    return packed if packed is not None and wrong is None else str(wrong)


def _difference(
    model: SentenceTransformer, form: InputForm, packed: PackedForm, texts: TextSet, passes: Passes, bf16: bool
) -> str | None:
    """In what packed passes differ from padded ones by more than rounding; None for nothing."""
    kinds = np.repeat(texts.forwards[:, 2], texts.forwards[:, 1] - texts.forwards[:, 0])
    in_rows = replace(texts, forwards=passes.cut(texts.sizes, kinds))
    with as_in_a_run(model, training=False, bf16=False):
        right = _outcome(model, form, texts)
    with as_in_a_run(model, training=False, bf16=bf16):
        padded, found = _outcome(model, form, texts), _outcome(model, packed, in_rows)
    for name, wanted, usual, other in zip(("vectors", "gradients"), right, padded, found, strict=True):
        limit = max(_TIMES_PADDED * largest_error(usual, wanted), _IN_FLOAT32)
        # Not "above": what is not a number is not above either.
        if not (off := largest_error(other, wanted)) <= limit:
            return f"its {name} are off by {off:.2g} of their length, rounding is up to {limit:.2g}"
    # What draws at random cannot be compared; that it can be computed is to be seen.
    with as_in_a_run(model, training=True, bf16=bf16), torch.no_grad():
        embed(model, packed, in_rows)
    return None


def _outcome(model: SentenceTransformer, form: InputForm, texts: TextSet) -> tuple[Tensor, Tensor]:
    """The vectors (N, D), and the gradient of some weights for a loss on them, as one row."""
    with torch.enable_grad():
        vectors = embed(model, form, texts).float()
        direction = torch.linspace(-1, 1, vectors.numel(), device=vectors.device).view_as(vectors)
        # Of BERT the pooler is trained where nothing else is, and moves no vector.
        given = torch.autograd.grad((vectors * direction).sum(), early_weights(model), allow_unused=True)
    gradients = [gradient.float().flatten() for gradient in given if gradient is not None]
    return vectors.detach(), torch.cat(gradients)[None]
