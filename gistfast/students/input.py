"""How a student takes its texts: how tokens become the features of one forward pass.

A sentence-transformers model says what it takes by what its `preprocess` gives for a few texts: token ids with a mask,
padded on the right or on the left, or one row of ids with offsets (StaticEmbedding), and values that hold for all texts
of a pass. Tokens in that form are features again without tokenising anew.

Shapes: N texts, F forward passes, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from gistfast.errors import ModelError
from gistfast.students.tokenising import PROBES, tokenise

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Array = np.ndarray[Any, Any]

_OTHER_WAY = "which `gistfast train` cannot do: train it with sentence-transformers' own trainer and gistfast.GISTLoss"


@dataclass(frozen=True)
class TextSet:
    """The distinct texts of a batch in the order in which they are embedded.

    Attributes:
        tokens: (T,) ids, one text after the other.
        starts: (N,) where each text begins in them.
        lengths: (N,) tokens of each text.
        sizes: The lengths again, on the host, where passes are cut.
        forwards: (F, 3) first text, last text + 1 and kind of each forward pass, on the host.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    sizes: Array
    forwards: Array

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device | str) -> "TextSet":
        """The same texts on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "starts", "lengths")}
        return replace(self, **moved)


@dataclass(frozen=True)
class InputForm:
    """What the student takes.

    Attributes:
        padding: Side of the padding; "none" for one row of tokens with offsets.
        pad_id: Token that stands for padding.
        zeros: Names of further features of the shape of the ids, zero everywhere.
        constants: For each kind of text the features that hold for a whole pass. Texts of two kinds never share one.
        kind_of_prompt: Kind of the texts that bear each of the prompts that the form was made for.
    """

    padding: Literal["left", "right", "none"]
    pad_id: int
    zeros: tuple[str, ...]
    constants: tuple[dict[str, Any], ...]
    kind_of_prompt: tuple[int, ...]

    def embed(self, model: Any, texts: TextSet, first: int, end: int, kind: int) -> Tensor:
        """The vectors of the texts from `first` to `end`, by one forward pass of the student."""
        vectors: Tensor = model(self.features(texts, first, end, kind))["sentence_embedding"]
        return vectors

    def features(self, texts: TextSet, first: int, end: int, kind: int) -> dict[str, Any]:
        """The features of the texts from `first` to `end`, as the student takes them."""
        if self.padding == "none":
            ids, offsets = self.one_row(texts, first, end)
            return {"input_ids": ids, "offsets": offsets, **self.constants[kind]}
        starts, lengths = texts.starts[first:end], texts.lengths[first:end]
        longest = int(texts.sizes[first:end].max())
        columns = torch.arange(longest, device=starts.device).expand(end - first, -1)
        if self.padding == "left":
            columns = columns - (longest - lengths)[:, None]
        inside = (columns >= 0) & (columns < lengths[:, None])
        places = (starts[:, None] + columns).clamp(0, max(len(texts.tokens) - 1, 0))
        ids = torch.where(inside, texts.tokens[places].long(), self.pad_id)
        zeros = {name: torch.zeros_like(ids) for name in self.zeros}
        return {"input_ids": ids, "attention_mask": inside.long(), **zeros, **self.constants[kind]}

    @staticmethod
    def one_row(texts: TextSet, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The tokens of the texts from `first` to `end`, one text after the other, and where each begins in them."""
        starts, lengths = texts.starts[first:end], texts.lengths[first:end]
        offsets = lengths.cumsum(0) - lengths
        total = int(texts.sizes[first:end].sum())
        places = torch.repeat_interleave(starts - offsets, lengths, output_size=total)
        return texts.tokens[places + torch.arange(total, device=places.device)].long(), offsets


def input_form(model: "SentenceTransformer", prompts: Sequence[str]) -> InputForm:
    """What the student takes for texts that bear one of the prompts.

    Raises:
        ModelError: When tokens alone do not make its features.
    """
    from sentence_transformers.sentence_transformer.modules import Router

    if isinstance(model[0], Router):
        raise ModelError(f"the student sends its texts by several routes, {_OTHER_WAY}")
    probed = [model.preprocess(list(PROBES), prompt=prompt or None) for prompt in prompts]
    constants = [_constants(model, features) for features in probed]
    kinds = [constants.index(values) for values in constants]
    tensors = {key: value for key, value in probed[0].items() if torch.is_tensor(value)}
    if tensors.keys() == {"input_ids", "offsets"}:
        form = InputForm("none", 0, (), tuple(constants), tuple(kinds))
    elif {"input_ids", "attention_mask"} <= tensors.keys():
        ids, mask = tensors.pop("input_ids"), tensors.pop("attention_mask")
        padding: Literal["left", "right"] = "right" if bool(mask[:, 0].all()) else "left"
        # Cut at three tokens, all texts are of one length and nothing is ever padded.
        pads = [*ids[mask == 0].tolist(), 0]
        form = InputForm(padding, pads[0], tuple(tensors), tuple(constants), tuple(kinds))
    else:
        raise ModelError(f"the student takes {', '.join(probed[0])}, not to be made of stored tokens, {_OTHER_WAY}")
    for prompt, kind, features in zip(prompts, kinds, probed, strict=True):
        if not same_features(model, form, kind, prompt, PROBES, *tokenise(model, PROBES, prompt)):
            raise ModelError(f"the student takes {', '.join(features)}, not to be made of stored tokens, {_OTHER_WAY}")
    return form


def same_features(
    model: "SentenceTransformer",
    form: InputForm,
    kind: int,
    prompt: str,
    texts: Sequence[str],
    tokens: Array,
    lengths: Array,
) -> bool:
    """Whether the features made of tokens (T,) of texts of some lengths (N,) are those that the student makes."""
    own = model.preprocess(list(texts), prompt=prompt or None)
    wanted = {key: value for key, value in own.items() if torch.is_tensor(value) or key in form.constants[kind]}
    found = form.features(text_set(tokens, lengths, np.array([(0, len(texts), kind)])), 0, len(texts), kind)
    return found.keys() == wanted.keys() and all(_equal(found[key], wanted[key]) for key in found)


def text_set(tokens: Array, lengths: Array, forwards: Array) -> TextSet:
    """Texts from their tokens (T,), one after the other, and their lengths (N,)."""
    return TextSet(
        tokens=torch.from_numpy(tokens.astype(np.int32)),
        starts=torch.from_numpy(np.cumsum(lengths) - lengths),
        lengths=torch.from_numpy(lengths),
        sizes=lengths,
        forwards=forwards,
    )


def _constants(model: "SentenceTransformer", features: dict[str, Any]) -> dict[str, Any]:
    """The features that hold for all texts of a pass; the length of the prompt only where pooling leaves it out."""
    values = {key: value for key, value in features.items() if not torch.is_tensor(value)}
    if all(getattr(module, "include_prompt", True) for module in model.modules()):
        values.pop("prompt_length", None)
    return values


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
