"""From texts to a student's tokens, and what decides them.

Shapes: N texts, T tokens.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Tokenise = Callable[[Sequence[str]], tuple[Array, Array]]

# Texts in which ways to tokenise would differ, and of lengths that differ.
PROBES = (
    "one",
    "  Two Words  ",
    "a line\nand\tanother, with [SEP], </s> and <|endoftext|> in it",
    "Å, A\u030a, ﬁ, 銀行 and 🙂",
    "a text longer than any student sees " * 2000,
)


def tokenise(model: "SentenceTransformer", texts: Sequence[str], prompt: str) -> tuple[Array, Array]:
    """The student's tokens of some texts (T,), one text after the other, and how many each has (N,), int64.

    As the student makes them: padded, and taken out of the padding.
    """
    features = model.preprocess(list(texts), prompt=prompt or None)
    ids = features["input_ids"]
    if "attention_mask" in features:
        inside = features["attention_mask"].bool()
        return ids[inside].numpy(), inside.sum(dim=1).numpy()
    bounds = [*features["offsets"].tolist(), len(ids)]
    return ids.numpy(), np.array([end - start for start, end in pairwise(bounds)], np.int64)


def quickest_tokeniser(model: "SentenceTransformer", prompt: str, texts: Sequence[str]) -> Tokenise:
    """What `tokenise` does, for a prompt: by the tokenizer's own core on all processors, where it has one.

    Args:
        model: The student.
        prompt: Stands before each text.
        texts: Some texts, on which both ways must agree for the quick one to be taken.
    """
    core = _core_of(model)
    if core is not None:
        probes = [*PROBES, *texts]
        expected = tokenise(model, probes, prompt)
        # The student has just told it where to cut.
        alone = Tokenizer.from_str(core.to_str())
        alone.no_padding()
        for special_tokens in (True, False):

            def quick(texts: Sequence[str], special_tokens: bool = special_tokens) -> tuple[Array, Array]:
                encoded = alone.encode_batch_fast([prompt + text for text in texts], add_special_tokens=special_tokens)
                ids = [encoding.ids for encoding in encoded]
                lengths = np.fromiter(map(len, ids), np.int64, len(ids))
                return np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum()), lengths

            if all(map(np.array_equal, quick(probes), expected)):
                return quick
    logger.info("the student's tokenizer has no quick way of its own: tokenising takes longer")
    return lambda texts: tokenise(model, texts, prompt)


def tokenizer_record(model: "SentenceTransformer") -> dict[str, Any]:
    """All that decides which tokens a text has, and the largest id that can come up."""
    module: Any = model[0]
    tokenizer: Any = model.tokenizer
    core = _core_of(model)
    digest = xxhash.xxh3_128()
    if core is not None:
        # How it was used last is part of its state, but not of what it is.
        state = json.loads(core.to_str()) | {"truncation": None, "padding": None}
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


def _core_of(model: "SentenceTransformer") -> Tokenizer | None:
    """The part of the tokenizer that is not written in Python, if there is one."""
    tokenizer: Any = model.tokenizer
    core = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    return core if isinstance(core, Tokenizer) else None


def _saved_files(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            yield path.name, path.read_bytes() if path.is_file() else b""
