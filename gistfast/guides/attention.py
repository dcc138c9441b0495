"""Whether a guide takes its texts padded or in one row: packed passes have to show first that they are right.

Shapes: N texts, G guide width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from gistfast.errors import first_line
from gistfast.guides.directions import Vectors
from gistfast.guides.precision import precision_of
from gistfast.guides.token_batches import PackedRows, Padding, TokenBatch, TokenWindow
from gistfast.models.packed_attention import packing_missing
from gistfast.models.packed_texts import (
    Attention,
    largest_error,
    pack_texts,
    refuse_unpadded,
    say_unpadded,
    unpack_texts,
)

# Texts of every length that are tried, beside one that is sure to be short; tokens of a pass.
_NUM_TRIED = 8
_SHORT_TEXT = "one two three four"
_TOKENS_TRIED = 4096

# Rounding is what padded texts are off by from the same texts alone, each a pass of its own. Packed ones may be off
# from padded ones by so many times as much, in any case by so many units in the last place, or in fp32, where that is
# nothing, by so much of a vector's length; but never by as much as texts that see each other are.
_TIMES_ROUNDING = 3.0
_UNITS = 2.0
_IN_FLOAT32 = 1e-4
_AT_MOST = 0.1


def may_be_unpadded(model: SentenceTransformer, padding: Padding | None, attention: Attention) -> bool:
    """Whether texts in one row are to be tried; what is known to speak against them is logged.

    Args:
        model: On its device.
        padding: From `Padding.of`.
        attention: As the user asked for it.

    Raises:
        ConfigError: When "unpadded" is asked for and cannot be had.
    """
    # On a CPU padded texts are as fast (docs/benchmarks/precompute.md).
    if attention == "padded" or (attention == "auto" and (padding is None or model.device.type == "cpu")):
        return False
    missing = _missing(model, padding)
    if missing is not None:
        refuse_unpadded(attention, missing)
    return missing is None


def tried_texts(texts: Sequence[str]) -> list[str]:
    """Some of the texts, the shortest and the longest among them."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    places = np.unique(np.linspace(0, len(texts) - 1, _NUM_TRIED).astype(int))
    return [_SHORT_TEXT, *(texts[number] for number in order[places])]


def choose_padding(
    model: SentenceTransformer, window: TokenWindow, forward: Callable[[TokenBatch], Vectors], attention: Attention
) -> Padding:
    """What takes the place of the window's padding: one row where that gives the same vectors, else itself.

    Args:
        model: On its device.
        window: `tried_texts` with their padding.
        forward: The vectors of a batch.
        attention: "unpadded" or "auto", where `may_be_unpadded`.

    Raises:
        ConfigError: When "unpadded" is asked for and cannot be had.
    """
    padding = window.padding
    assert padding is not None  # `may_be_unpadded` says no.
    padded, alone = (_embed(window, forward, budget) for budget in (_TOKENS_TRIED, 1))
    rounding = max(_TIMES_ROUNDING * _error(alone, padded), _UNITS * torch.finfo(_precision(model)).eps)
    limit = min(max(rounding, _IN_FLOAT32), _AT_MOST)
    try:
        packed = PackedRows(padding.left, padding.values, padding.masked, first_position=pack_texts(model))
        off = _error(_embed(replace(window, padding=packed), forward, _TOKENS_TRIED), padded)
        differs = f"its vectors are off by {off:.2g} of their length, rounding is up to {limit:.2g}"
        # Not "above": what is not a number is not above either.
        wrong = None if off <= limit else differs
    except Exception as error:  # What was not made for packed passes may raise anything.
        wrong = first_line(error)
    if wrong is None:
        say_unpadded(model.device, gives="vectors")
        return packed
    unpack_texts(model)
    refuse_unpadded(attention, wrong)
    return padding


def _missing(model: SentenceTransformer, padding: Padding | None) -> str | None:
    """What is known to keep packed passes from running."""
    if padding is None or not isinstance(model[0], Transformer):
        return f"the guide's first module, {type(model[0]).__name__}, has no attention"
    return packing_missing(model.device, None if _precision(model).itemsize == 2 else "--dtype bfloat16")


def _precision(model: SentenceTransformer) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, precision_of(model))
    return dtype


def _embed(window: TokenWindow, forward: Callable[[TokenBatch], Vectors], budget: int) -> Vectors:
    """The vectors (N, G) of the window's texts, in one order for every budget."""
    return np.concatenate([forward(batch) for batch in window.batches(budget)])


def _error(found: Vectors, right: Vectors) -> float:
    return largest_error(torch.from_numpy(found), torch.from_numpy(right))
