"""What a store was made from: the guides, the rows in the order in which they came, the sizes of the shards."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from gistfast.models.prompts import Role
from gistfast.store.files import fingerprint_of

GuideScore = Literal["mean", "min", "max"]


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

    @classmethod
    def of_vectors(
        cls,
        name: str,
        kind: str,
        *,
        width: int,
        vectors_hash: str = "",
        query_prompt: str = "",
        document_prompt: str = "",
        dtype: str = "float32",
    ) -> "GuideInfo":
        """What is recorded where vectors are all that is seen of a guide: no weights, no tokenizer, no precision.

        Args:
            name: How the guide is called.
            kind: Where its vectors come from, such as "server".
            width: Numbers in a vector (G).
            vectors_hash: What tells the vectors from others of this kind.
            query_prompt: Put before each anchor.
            document_prompt: Put before each positive and negative.
            dtype: Of the stored vectors.
        """
        return cls(
            name=name,
            revision=None,
            weights_hash=vectors_hash,
            tokenizer_hash=kind,
            pooling=kind,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            max_length=None,
            dtype=dtype,
            compute_dtype=kind,
            normalised=True,
            width=width,
            decoded_with=None,
        )

    @property
    def has_one_prompt(self) -> bool:
        """Whether anchors and other texts are read alike, so that one vector serves both."""
        return self.query_prompt == self.document_prompt

    def prompt_of(self, role: Role) -> str:
        """What the guide reads before a text of a role."""
        return self.query_prompt if role == "query" else self.document_prompt

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The fields that change vectors: a folder that moved holds the same guide."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "revision")}

    @cached_property
    def key(self) -> str:
        """Eight hex digits that name the guide inside a store: its folder of vectors."""
        return fingerprint_of(self.identity)[:8]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows of one source that came into the store together, and the shards that hold what is new in them.

    Attributes:
        description: The source in a few words, such as "pairs.parquet".
        fingerprint: Hash of the source's contents and of its column mapping.
        num_rows: Rows.
        num_texts: Entries of distinct text (per role) that no earlier segment has.
        skipped: Bad rows that were left out.
        repeated: Rows that earlier segments have, left out.
        texts: Entries in each shard of texts, in order.
        rows: Rows in each shard of rows, in order.
    """

    description: str
    fingerprint: str
    num_rows: int = 0
    num_texts: int = 0
    skipped: int = 0
    repeated: int = 0
    texts: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The rows, as they were read.

    Attributes:
        columns: Canonical column names: anchor, positive, negative_1, ...
        holdout: Share of the distinct positives that was held out, 0 to 1.
        one_role: Whether a text has one entry, whichever column it stands in; else one for each role.
        tasks: Names of the rows' tasks; a row has the number of its own, or -1.
        segments: The sources, in the order in which they came in.
    """

    columns: tuple[str, ...]
    holdout: float
    one_role: bool
    tasks: tuple[str, ...]
    segments: tuple[Segment, ...]

    @property
    def num_rows(self) -> int:
        """Rows in the store."""
        return sum(segment.num_rows for segment in self.segments)

    @property
    def num_texts(self) -> int:
        """Entries of distinct text (per role) in the store."""
        return sum(segment.num_texts for segment in self.segments)

    @property
    def skipped(self) -> int:
        """Bad rows that were left out."""
        return sum(segment.skipped for segment in self.segments)

    @property
    def description(self) -> str:
        """The sources in a few words."""
        return ", ".join(dict.fromkeys(segment.description for segment in self.segments))

    @property
    def fingerprint(self) -> str:
        """Hash of all sources, in their order."""
        fingerprints = [segment.fingerprint for segment in self.segments]
        return fingerprints[0] if len(fingerprints) == 1 else fingerprint_of({"segments": fingerprints})

    @cached_property
    def plan(self) -> "Plan":
        """Sizes of all shards."""
        segments = self.segments
        return Plan(
            texts=tuple(chain.from_iterable(segment.texts for segment in segments)),
            rows=tuple(chain.from_iterable(segment.rows for segment in segments)),
        )


@dataclass(frozen=True)
class Plan:
    """Sizes of the shards, in order.

    Attributes:
        texts: Entries in each shard of texts; vectors are cut alike.
        rows: Rows in each shard of rows; what is known of each row is cut alike.
    """

    texts: tuple[int, ...]
    rows: tuple[int, ...]

    def sizes(self, kind: str) -> tuple[int, ...]:
        """Sizes of the shards of `kind`, such as "texts", "rows", "vectors/3f9a01c2" or "scores/77b0e4d5"."""
        return self.texts if kind.partition("/")[0] in ("texts", "vectors") else self.rows
