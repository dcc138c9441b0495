"""What an embedding server says: vectors when all is well, else the reason in one line.

# N texts of a request, G guide width
"""

import base64
import json
from typing import Any

import numpy as np

from gistfast.errors import ModelError, first_line
from gistfast.guides.directions import Vectors


def vectors_of(answer: Any, num_texts: int, origin: str) -> Vectors:
    """The vectors (N, G) of an answer, in the order of the texts.

    Args:
        answer: Decoded JSON; vectors are lists of numbers or base64 of little-endian float32.
        num_texts: Texts of the request (N).
        origin: Name of the server, for errors.

    Raises:
        ModelError: When the answer is not that of `/v1/embeddings` to so many texts, or widths differ.
    """
    try:
        items = answer["data"]
        places = [item.get("index", number) for number, item in enumerate(items)]
        vectors = [_numbers(item["embedding"]) for item in items]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{origin} does not answer as /v1/embeddings does ({type(error).__name__}: {first_line(error)}): "
            "check the address and the model"
        ) from error
    if len(vectors) != num_texts or sorted(places) != list(range(num_texts)):
        raise ModelError(
            f"{origin} answered {num_texts} texts with {len(vectors)} vectors, of the texts {sorted(places)[:8]}: "
            "expected one for each, check the server"
        )
    widths = sorted({len(vector) for vector in vectors})
    if len(widths) != 1 or widths == [0]:
        raise ModelError(f"{origin} answered with vectors {widths} wide, expected one width: check the server")
    ordered: Vectors = np.stack(vectors)[np.argsort(places)]
    return ordered


def _numbers(value: Any) -> Vectors:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), "<f4").astype(np.float32)
    # A number beyond float32 shows as an infinite one, which is refused with its text.
    with np.errstate(over="ignore"):
        vector: Vectors = np.array(value, np.float32)
    if vector.ndim != 1:
        raise TypeError(f"a vector has {vector.ndim} dimensions")
    return vector


def is_broken_off(body: bytes) -> bool:
    """Whether a body that is no JSON is the beginning of an answer, if only an empty one; a page, say, is none."""
    begun = body.lstrip()
    return not begun or begun.startswith(b"{")


def message_of(body: bytes) -> str:
    """The first line of what the server says of a failure, in whichever of the usual fields."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        said = text
    while isinstance(said, dict | list) and said:
        said = said[0] if isinstance(said, list) else _field_with_reason(said)
    line = next(iter(str(said or "").strip().splitlines()), "")
    return line if len(line) <= 300 else line[:297] + "..."


def _field_with_reason(record: dict[str, Any]) -> Any:
    names = ("error", "message", "detail", "msg")
    return next((record[name] for name in names if record.get(name)), json.dumps(record))
