"""A guide whose vectors are there already: looked up by text in files.

# N texts, G guide width
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from gistfast.errors import DataError
from gistfast.guides.batch_done import BatchDone, OnBatch
from gistfast.guides.directions import Vectors, shown
from gistfast.guides.ready_texts import TextPlaces, open_vectors, text_at
from gistfast.guides.ready_vectors import JoinedVectors, RowVectors, take_directions
from gistfast.models.prompts import Role
from gistfast.rows.formats import RowFile
from gistfast.rows.sources import find_files
from gistfast.store import GuideInfo

logger = logging.getLogger(__name__)

# Below, two vectors of one text are not what one guide would give it twice.
SAME_COSINE = 0.999
PAIRS_AT_ONCE = 16_384


class ReadyGuide:
    """Vectors in files as a guide."""

    def __init__(self, info: GuideInfo, places: TextPlaces, vectors: RowVectors) -> None:
        """Use `load_ready_guide`, which reads the texts.

        Args:
            info: What the vectors depend on: the files.
            places: Of the texts.
            vectors: By place.
        """
        self._info = info
        self._places = places
        self._vectors = vectors

    @property
    def info(self) -> GuideInfo:
        """What the vectors depend on."""
        return self._info

    def embed(self, texts: Sequence[str], role: Role, on_batch: OnBatch | None = None) -> Vectors:
        """The vectors (N, G) of the texts, in their order, of length 1.

        Args:
            texts: N texts.
            role: Whose prompt stands before each of them in the files.
            on_batch: Called with each part that was read.

        Raises:
            DataError: When a text has no vector, or a row holds none; the text or row is named.
            VectorError: When a vector is zero or not finite; its row is named.
        """
        prompt = self._info.prompt_of(role)
        places = self._places.find([prompt + text for text in texts] if prompt else texts)
        lacking = np.flatnonzero(places < 0)
        if len(lacking):
            raise DataError(
                f"{self._info.name} lacks the vectors of {len(lacking)} of {len(texts)} texts, the first is "
                f"{shown(prompt + texts[lacking[0]])}: add them, or give --query-prompt and --document-prompt "
                "where texts there begin with a prompt"
            )
        on_part = None if on_batch is None else lambda count: on_batch(BatchDone(count))
        return take_directions(self._vectors, places, on_part)


def load_ready_guide(
    source: str, *, vectors: Mapping[str, str] | None = None, query_prompt: str = "", document_prompt: str = ""
) -> ReadyGuide:
    """A guide whose vectors lie in files.

    Args:
        source: A file, folder or glob of texts: .parquet with columns of vectors, or any format with .npy files.
        vectors: For each column of texts the column of its vectors or a .npy file, which is looked for beside the
            texts; None finds them by name.
        query_prompt: With which the texts of anchors begin there.
        document_prompt: With which the texts of positives and negatives begin there.

    Raises:
        DataError: When files or columns are missing or damaged, hold no vectors, hold another number of vectors than
            of texts, or two vectors for one text that differ.
        VectorError: When a vector of a text that stands there twice is zero or not finite.
    """
    files, description = find_files(source, subset=None, split=None, revision=None)
    path = Path(source)
    opened = open_vectors(files, path if path.is_dir() else path.parent, vectors, description)
    places = TextPlaces(files, list(opened))
    for column, own in opened.items():
        if own.num_rows != places.num_rows:
            raise DataError(
                f"{description} has {places.num_rows} texts in {column!r} and {own.num_rows} vectors for them: "
                "expected one for each row: save them again, in the order of the rows"
            )
    joined = JoinedVectors(list(opened.values()))
    _refuse_conflicts(places, joined, files, list(opened))
    info = GuideInfo.of_vectors(
        description,
        "ready",
        width=joined.width,
        vectors_hash=_digest(files, opened),
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )
    logger.info("guide %s: %d vectors, %d wide", info.name, joined.num_rows, info.width)
    return ReadyGuide(info, places, joined)


def _refuse_conflicts(places: TextPlaces, vectors: RowVectors, files: Sequence[RowFile], columns: list[str]) -> None:
    """Refuse vectors of one text that point into different directions."""
    for start in range(0, len(places.repeats), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        rows, firsts = places.repeats[part], places.firsts[part]
        scores = np.einsum("ng,ng->n", take_directions(vectors, rows), take_directions(vectors, firsts))
        if scores.min() < SAME_COSINE:
            worst = int(scores.argmin())
            column, row = divmod(int(rows[worst]), places.num_rows)
            text = text_at(files, columns[column], row)
            raise DataError(
                f"{vectors.name_of(int(firsts[worst]))} and {vectors.name_of(int(rows[worst]))} hold different vectors "
                f"(cosine {scores[worst]:.3f}) for the text {shown(text)}: keep one, or let texts begin with their "
                "prompts and give --query-prompt and --document-prompt"
            )


def _digest(files: Sequence[RowFile], vectors: Mapping[str, RowVectors]) -> str:
    """Hash of texts, vectors and what belongs to what."""
    record = [[file.digest() for file in files], {column: own.digest() for column, own in vectors.items()}]
    return xxhash.xxh3_128_hexdigest(json.dumps(record).encode())
