"""A store's texts as the student's tokens: made once, kept on disk, mapped.

STORE/tokens/FINGERPRINT/
  ids.npy        the tokens of all texts, one text after the other, uint16 or int32
  offsets.npy    where each entry's tokens begin, and where the last one's end, int64
  tokens.json    what they were made from; the fingerprint is its hash

A store that cannot be written to gets them in the folder of the run. They are made anew when the store, the tokenizer,
the prompt or the length changes; nothing is ever changed in place.

Shapes: E entries of the store, N texts, T tokens.
"""

import errno
import json
import logging
import secrets
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from gistfast.errors import StoreError, first_line
from gistfast.progress import Bar, progress
from gistfast.store import GuideStore
from gistfast.store.files import durable_file, write_json
from gistfast.students.tokenising import Tokenise, quickest_tokeniser, tokenizer_record

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

# Texts read at once, and tokenised at once: of about one length, for tokenizers that pad.
_WINDOW = 8192
_BATCH = 1024

# Texts on which the quick way to tokenise has to show that it is right.
_NUM_PROBED = 256

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Tokens:
    """The tokens of a store's entries under one prompt, mapped; it pickles as its path.

    Attributes:
        path: Folder of the files.
    """

    def __init__(self, path: Path) -> None:
        """Use `student_tokens`, which makes them where there are none."""
        self.path = path

    @cached_property
    def offsets(self) -> Array:
        """Where each entry's tokens begin, (E + 1,) int64."""
        return _mapped(self.path / "offsets.npy")

    @cached_property
    def ids(self) -> Array:
        """All tokens, (T,) uint16 or int32."""
        return _mapped(self.path / "ids.npy")

    def lengths(self, entries: Array) -> Array:
        """Tokens of each of the entries (N,), int64; 0 for those that no column with this prompt holds."""
        lengths: Array = self.offsets[entries + 1] - self.offsets[entries]
        return lengths

    def gather(self, entries: Array) -> Array:
        """The tokens of the entries (N,), one text after the other."""
        starts = self.offsets[entries]
        return joined_pieces(self.ids, starts, self.offsets[entries + 1] - starts)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


def joined_pieces(source: Array, starts: Array, lengths: Array) -> Array:
    """The pieces of a flat array, one after the other: `lengths[n]` elements from `starts[n]` on."""
    ends = np.cumsum(lengths)
    places = np.repeat(starts - (ends - lengths), lengths)
    pieces: Array = source[places + np.arange(len(places))]
    return pieces


def student_tokens(
    model: "SentenceTransformer", store: GuideStore, prompt: str, columns: Sequence[int], spare_folder: Path
) -> Tokens:
    """The tokens of the texts in some columns of a store, made where they are not there yet.

    Args:
        model: The student.
        store: The guide store.
        prompt: Stands before each text.
        columns: Numbers of the columns whose texts bear the prompt.
        spare_folder: Takes the tokens when the store's folder cannot be written.

    Raises:
        StoreError: When there is no room for them.
    """
    record = {"store": store.fingerprint, "prompt": prompt, "columns": list(columns), **tokenizer_record(model)}
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True, default=str).encode())
    homes = [folder / "tokens" / fingerprint for folder in (store.path, spare_folder)]
    for home in homes:
        if (home / "tokens.json").is_file():
            return Tokens(home)
    for home in homes:
        try:
            return _make(model, store, prompt, columns, record, home)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE or home is homes[-1]:
                raise StoreError(f"cannot write {home}: {error.strerror}: make room there") from error
            logger.info("%s cannot be written (%s): tokens go to %s", store.path, error.strerror, spare_folder)
    raise AssertionError("one of the two folders is taken or refused")


def _make(
    model: "SentenceTransformer",
    store: GuideStore,
    prompt: str,
    columns: Sequence[int],
    record: dict[str, Any],
    home: Path,
) -> Tokens:
    """Write beside `home` and rename, so that a folder of this name is complete whoever is killed when."""
    temporary = home.with_name(f".{home.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        entries = _entries_of(store, columns)
        dtype = np.dtype(np.uint16 if record["largest_id"] < 1 << 16 else np.int32)
        with progress("tokenising", total=len(entries), unit="texts") as bar:
            tokenise = quickest_tokeniser(model, prompt, store.texts.take(entries[:_NUM_PROBED]))
            lengths = _write_ids(tokenise, store, entries, dtype, temporary / "ids.npy", bar)
        with durable_file(temporary / "offsets.npy") as file:
            np.save(file, np.concatenate([[0], np.cumsum(lengths)]))
        write_json(temporary / "tokens.json", record | {"tokens": int(lengths.sum())})
        # Two runs may make them at once: the first one's are as good.
        if not home.exists():
            temporary.replace(home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("wrote %d tokens of %d texts to %s", lengths.sum(), len(entries), home)
    return Tokens(home)


def _write_ids(
    tokenise: Tokenise, store: GuideStore, entries: Array, dtype: "np.dtype[Any]", path: Path, bar: Bar
) -> Array:
    """Write the tokens of the entries (N,); returns the number of each entry of the store, (E,) int64."""
    lengths = np.zeros(store.num_texts, np.int64)
    with durable_file(path) as file:
        _write_header(file, dtype, 0)
        for first in range(0, len(entries), _WINDOW):
            window = entries[first : first + _WINDOW]
            tokens, lengths[window] = _tokenise_window(tokenise, store.texts.take(window))
            file.write(tokens.astype(dtype).tobytes())
            bar.advance(len(window))
        # NumPy leaves room in the header for the number to grow.
        file.seek(0)
        _write_header(file, dtype, int(lengths.sum()))
    return lengths


def _entries_of(store: GuideStore, columns: Sequence[int]) -> Array:
    """The entries that some columns hold, ascending; all of them for all columns."""
    if len(columns) == len(store.columns):
        return np.arange(store.num_texts)
    held = np.zeros(store.num_texts, bool)
    for shard in range(len(store.manifest.plan.rows)):
        held[store.rows_of(shard)[:, list(columns)]] = True
    return np.flatnonzero(held)


def _tokenise_window(tokenise: Tokenise, texts: list[str]) -> tuple[Array, Array]:
    """The tokens of texts, one after the other in their order, and how many each has."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    batches = [
        tokenise([texts[place] for place in order[first : first + _BATCH]]) for first in range(0, len(order), _BATCH)
    ]
    tokens, lengths = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    starts = np.empty(len(order), np.int64)
    starts[order] = np.cumsum(lengths) - lengths
    in_order = np.empty_like(lengths)
    in_order[order] = lengths
    return joined_pieces(tokens, starts, in_order), in_order


def _mapped(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({first_line(error)}): delete {path.parent}") from error
    return array


def _write_header(file: Any, dtype: Any, length: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
