"""The items of a JSON array one by one, so that an array of any length is read in bounded memory."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK_CHARS = 1 << 20
_LONGEST_ITEM_CHARS = 1 << 26
_SEPARATORS = re.compile(r"[\s,]*")


def array_items(file: TextIO) -> Iterator[Any]:
    """The items of the JSON array that `file` begins with, parsed from a window of it.

    Raises:
        ValueError: When the array is not valid JSON or is not closed.
    """
    decoder = json.JSONDecoder()
    window = file.read(_CHUNK_CHARS)
    place = window.index("[") + 1
    number = 1
    while True:
        place = next(_SEPARATORS.finditer(window, place)).end()
        if window.startswith("]", place):
            return
        try:
            item, place = decoder.raw_decode(window, place)
        except json.JSONDecodeError as error:
            # The window may end within the item: look further, twice as far each time.
            window = window[place:]
            more = file.read(max(_CHUNK_CHARS, len(window))) if len(window) < _LONGEST_ITEM_CHARS else ""
            if not more:
                reason = error.msg if window else "the array is not closed"
                raise ValueError(f"row {number}: {reason}") from error
            window += more
            place = 0
            continue
        number += 1
        yield item
