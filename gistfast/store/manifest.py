"""What store.json says: which guide and data a store was made from, and the plan of its shards."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from gistfast.errors import StoreError
from gistfast.store.files import read_json, write_json

FORMAT_VERSION = 1
ROWS_PER_SHARD = 65_536
MANIFEST_NAME = "store.json"
# Fields that say where guide and data were found, and change nothing else.
_NAMES = ("name", "revision", "description")


@dataclass(frozen=True, kw_only=True)
class GuideInfo:
    """The guide, to the last thing that changes its vectors.

    Attributes:
        name: Folder or hub id that the guide was loaded from.
        revision: Its commit on the hub, or None for a folder.
        weights_hash: Hash of its weights.
        tokenizer_hash: Hash of its tokenizer.
        pooling: How token vectors became one vector, such as "mean", "cls" or "last".
        query_prompt: Put before each anchor.
        document_prompt: Put before each positive and negative.
        max_length: Tokens that the guide saw of a text at most, prompt included; None when it has no limit.
        dtype: Of the stored vectors: "float16" or "float32".
        compute_dtype: In which the guide ran.
        normalised: Whether the stored vectors have length 1.
        width: Numbers in a vector (G).
        decoded_with: Name of the tokenizer that cut and decoded the texts first, or None for whole texts.
    """

    name: str
    revision: str | None
    weights_hash: str
    tokenizer_hash: str
    pooling: str
    query_prompt: str
    document_prompt: str
    max_length: int | None
    dtype: str
    compute_dtype: str
    normalised: bool
    width: int
    decoded_with: str | None


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The rows, as they were read.

    Attributes:
        description: The source in a few words, such as "pairs.parquet".
        columns: Canonical column names: anchor, positive, negative_1, ...
        holdout: Share of the distinct positives that was held out, 0 to 1.
        fingerprint: Hash of the source's contents and of its column mapping.
        num_rows: Rows in the store.
        num_texts: Entries of distinct text (per prompt) in the store.
        skipped: Bad rows that were left out.
    """

    description: str
    columns: tuple[str, ...]
    holdout: float
    fingerprint: str
    num_rows: int
    num_texts: int
    skipped: int


@dataclass(frozen=True)
class Plan:
    """Sizes of the shards, in order.

    Attributes:
        texts: Entries in each shard of texts; vectors are cut alike.
        rows: Rows in each shard of rows; scores are cut alike.
    """

    texts: tuple[int, ...]
    rows: tuple[int, ...]

    def sizes(self, kind: str) -> tuple[int, ...]:
        """Sizes of the shards of `kind`: "texts", "vectors", "rows" or "scores"."""
        return self.texts if kind in ("texts", "vectors") else self.rows


@dataclass(frozen=True)
class Manifest:
    """The contents of store.json.

    Attributes:
        guide: The guide.
        data: The rows.
        plan: The shards that make a complete store.
        format_version: Version of the layout on disk.
    """

    guide: GuideInfo
    data: DataInfo
    plan: Plan
    format_version: int = FORMAT_VERSION

    @cached_property
    def fingerprint(self) -> str:
        """Hash of guide and data, names of folders aside: 32 hex digits that name the store's contents."""
        return fingerprint_of({"guide": _identity(self.guide), "data": _identity(self.data)})

    @cached_property
    def recipe(self) -> str:
        """Hash of what the store was asked to be made of; every shard's commit carries it."""
        return recipe_of(self.guide, self.data.fingerprint, self.data.columns, self.data.holdout)

    def difference(self, other: "Manifest") -> str | None:
        """The first field in which `other` was asked for something else than this store has, in words.

        Returns:
            For example "guide.query_prompt: store has '', asked for 'query: '", or None when nothing differs.
        """
        return _difference(self.guide, other.guide, "guide") or _difference(self.data, other.data, "data")

    def write(self, folder: Path) -> None:
        """Write store.json into `folder`, replacing an earlier one in one step."""
        record = asdict(self)
        write_json(folder / MANIFEST_NAME, {**record, "checksum": fingerprint_of(record)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of the store in `folder`.

        Raises:
            StoreError: When there is no store.json, it is of a newer version, or it was changed by hand.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise StoreError(f"{folder} has no {MANIFEST_NAME}: make a guide store with `gistfast precompute`")
        record = read_json(path)
        version = record.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise StoreError(
                f"{path} has format version {version}, this gistfast reads up to {FORMAT_VERSION}: upgrade gistfast"
            )
        if record.pop("checksum", None) != fingerprint_of(record):
            raise StoreError(f"{path} was changed after it was written: restore it, or make the store anew")
        return cls(
            guide=GuideInfo(**record["guide"]),
            data=DataInfo(**{**record["data"], "columns": tuple(record["data"]["columns"])}),
            plan=Plan(texts=tuple(record["plan"]["texts"]), rows=tuple(record["plan"]["rows"])),
            format_version=version,
        )


def fingerprint_of(record: Mapping[str, Any]) -> str:
    """The xxh3_128 of `record` as JSON with sorted keys, in 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())


def recipe_of(guide: GuideInfo, data_fingerprint: str, columns: tuple[str, ...], holdout: float) -> str:
    """Hash of everything that is asked for before the first row is read."""
    return fingerprint_of({"guide": _identity(guide), "data": data_fingerprint, "columns": columns, "holdout": holdout})


def _identity(info: GuideInfo | DataInfo) -> dict[str, Any]:
    """The fields that change vectors or rows: a folder that moved holds the same guide and the same data."""
    return {name: value for name, value in asdict(info).items() if name not in _NAMES}


def _difference(have: GuideInfo | DataInfo, want: GuideInfo | DataInfo, prefix: str) -> str | None:
    if _identity(have) == _identity(want):
        return None
    pairs = ((field.name, getattr(have, field.name), getattr(want, field.name)) for field in fields(have))
    return next(
        f"{prefix}.{name}: store has {found!r}, asked for {wanted!r}"
        for name, found, wanted in pairs
        if found != wanted
    )
