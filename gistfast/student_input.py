"""How a student takes its texts: what tokenising gives, and how tokens become the features of one forward pass.

A sentence-transformers model says what it takes by what its `preprocess` gives for a few texts: token ids with a mask,
padded on the right or on the left, or one row of ids with offsets (StaticEmbedding), and values that hold for all texts
of a pass. Tokens in that form are features again without tokenising anew.

Shapes: N texts, F forward passes, T tokens.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from tokenizers import Tokenizer
from torch import Tensor

from gistfast.errors import ModelError

Array = np.ndarray[Any, Any]

# Of different lengths, so that one of them is padded.
_PROBES = ("one", "two words", "a text that is longer than the others")

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

    def features(self, texts: TextSet, first: int, end: int, kind: int) -> dict[str, Any]:
        """The features of the texts from `first` to `end`, as the student takes them."""
        starts, lengths = texts.starts[first:end], texts.lengths[first:end]
        if self.padding == "none":
            ends = lengths.cumsum(0)
            total = int(texts.sizes[first:end].sum())
            places = torch.repeat_interleave(starts - (ends - lengths), lengths, output_size=total)
            ids = texts.tokens[places + torch.arange(total, device=places.device)]
            return {"input_ids": ids.long(), "offsets": ends - lengths, **self.constants[kind]}
        longest = int(texts.sizes[first:end].max())
        columns = torch.arange(longest, device=starts.device).expand(end - first, -1)
        if self.padding == "left":
            columns = columns - (longest - lengths)[:, None]
        inside = (columns >= 0) & (columns < lengths[:, None])
        places = (starts[:, None] + columns).clamp(0, max(len(texts.tokens) - 1, 0))
        ids = torch.where(inside, texts.tokens[places].long(), self.pad_id)
        zeros = {name: torch.zeros_like(ids) for name in self.zeros}
        return {"input_ids": ids, "attention_mask": inside.long(), **zeros, **self.constants[kind]}


def input_form(model: SentenceTransformer, prompts: Sequence[str]) -> InputForm:
    """What the student takes for texts that bear one of the prompts.

    Raises:
        ModelError: When tokens alone do not make its features.
    """
    if isinstance(model[0], Router):
        raise ModelError(f"the student sends its texts by several routes, {_OTHER_WAY}")
    probed = [model.preprocess(list(_PROBES), prompt=prompt or None) for prompt in prompts]
    constants = [_constants(model, features) for features in probed]
    kinds = [constants.index(values) for values in constants]
    tensors = {key: value for key, value in probed[0].items() if torch.is_tensor(value)}
    if tensors.keys() == {"input_ids", "offsets"}:
        form = InputForm("none", 0, (), tuple(constants), tuple(kinds))
    elif {"input_ids", "attention_mask"} <= tensors.keys():
        ids, mask = tensors.pop("input_ids"), tensors.pop("attention_mask")
        padding: Literal["left", "right"] = "right" if bool(mask[:, 0].all()) else "left"
        form = InputForm(padding, int(ids[mask == 0][0]), tuple(tensors), tuple(constants), tuple(kinds))
    else:
        raise ModelError(f"the student takes {', '.join(probed[0])}, not to be made of stored tokens, {_OTHER_WAY}")
    for prompt, kind, features in zip(prompts, kinds, probed, strict=True):
        if not same_features(model, form, kind, prompt, _PROBES, *tokenise(model, _PROBES, prompt)):
            raise ModelError(f"the student takes {', '.join(features)}, not to be made of stored tokens, {_OTHER_WAY}")
    return form


def same_features(
    model: SentenceTransformer,
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


def tokenise(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> tuple[Array, Array]:
    """The student's tokens of some texts (T,), one text after the other, and how many each has (N,), int64."""
    features = model.preprocess(list(texts), prompt=prompt or None)
    ids = features["input_ids"]
    if "attention_mask" in features:
        inside = features["attention_mask"].bool()
        return ids[inside].numpy(), inside.sum(dim=1).numpy()
    bounds = [*features["offsets"].tolist(), len(ids)]
    return ids.numpy(), np.array([end - start for start, end in pairwise(bounds)], np.int64)


def tokenizer_record(model: SentenceTransformer) -> dict[str, Any]:
    """All that decides which tokens a text has, and the largest id that can come up."""
    module: Any = model[0]
    tokenizer: Any = model.tokenizer
    inner = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    digest = xxhash.xxh3_128()
    if isinstance(inner, Tokenizer):
        # How it was used last is part of its state, but not of what it is.
        state = json.loads(inner.to_str()) | {"truncation": None, "padding": None}
        digest.update(json.dumps(state, sort_keys=True).encode())
    else:
        for name, content in _saved_files(tokenizer):
            digest.update(name.encode() + content)
    return {
        "tokenizer": digest.hexdigest(),
        "special_tokens": {key: str(token) for key, token in getattr(tokenizer, "special_tokens_map", {}).items()},
        "sides": [getattr(tokenizer, f"{what}_side", None) for what in ("padding", "truncation")],
        "chat_template": getattr(tokenizer, "chat_template", None),
        "max_length": str(model.max_seq_length),
        "module": [type(module).__name__, module.get_config_dict()],
        "largest_id": max(tokenizer.get_vocab().values()),
    }


def _saved_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            yield path.name, path.read_bytes() if path.is_file() else b""


def _constants(model: SentenceTransformer, features: dict[str, Any]) -> dict[str, Any]:
    """The features that hold for all texts of a pass; the length of the prompt only where pooling leaves it out."""
    values = {key: value for key, value in features.items() if not torch.is_tensor(value)}
    if all(getattr(module, "include_prompt", True) for module in model.modules()):
        values.pop("prompt_length", None)
    return values


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
