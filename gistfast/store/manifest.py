"""What store.json says: which guides and data a store was made from, and the plan of its shards."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from gistfast.errors import StoreError
from gistfast.store.files import fingerprint_of, read_json, write_json
from gistfast.store.info import DataInfo, GuideInfo, GuideScore, Plan, Segment

FORMAT_VERSION = 2
ROWS_PER_SHARD = 65_536
MANIFEST_NAME = "store.json"
# What the store will be when the shards that it still lacks are there.
PLAN_NAME = "next.json"


@dataclass(frozen=True)
class Manifest:
    """The contents of store.json.

    Attributes:
        guides: The guides, in the order in which they were added.
        data: The rows.
        guide_score: How the scores of several guides become one.
        weights: Weight of each guide in the mean.
        format_version: Version of the layout on disk.
    """

    guides: tuple[GuideInfo, ...]
    data: DataInfo
    guide_score: GuideScore = "mean"
    weights: tuple[float, ...] = (1.0,)
    format_version: int = FORMAT_VERSION

    @property
    def guide(self) -> GuideInfo:
        """The first guide."""
        return self.guides[0]

    @property
    def plan(self) -> Plan:
        """Sizes of all shards of texts and rows."""
        return self.data.plan

    @cached_property
    def fingerprint(self) -> str:
        """Hash of guides and data, names of folders aside: 32 hex digits that name the store's contents."""
        # How the shards are cut and what the sources were called changes nothing.
        unlike = {"description": None, "texts": None, "rows": None}
        segments = [asdict(segment) | unlike for segment in self.data.segments]
        return fingerprint_of({"guides": self._scoring, "asked": self._asked, "segments": segments})

    @property
    def vectors(self) -> tuple[str, ...]:
        """The kind of shard that holds each guide's vectors."""
        return tuple(f"vectors/{guide.key}" for guide in self.guides)

    @cached_property
    def scores(self) -> str:
        """The kind of shard that holds the guides' scores."""
        return f"scores/{fingerprint_of(self._scoring)[:8]}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of shards that make a complete store."""
        return ("texts", "rows", *self.vectors, self.scores)

    def shards_of(self, kind: str) -> range:
        """Numbers of the shards of `kind`."""
        return range(len(self.plan.sizes(kind)))

    def segment_of(self, kind: str, shard: int) -> int:
        """The number of the segment that a shard belongs to."""
        segments = self.data.segments
        ends = accumulate(len(Plan(segment.texts, segment.rows).sizes(kind)) for segment in segments)
        return next(number for number, end in enumerate(ends) if shard < end)

    def recipe(self, kind: str, shard: int) -> str:
        """Hash of all that decides what is in a shard; its commit carries it."""
        return self.recipe_of_segment(kind, self.segment_of(kind, shard))

    def recipe_of_segment(self, kind: str, number: int) -> str:
        """The recipe of all shards of a segment.

        What is in a segment depends on the segments before it, and on none that come later.
        """
        guides = dict(zip(self.vectors, (guide.identity for guide in self.guides), strict=True))
        made_by = self._scoring if kind == self.scores else guides.get(kind)
        sources = [segment.fingerprint for segment in self.data.segments[: number + 1]]
        return fingerprint_of({"kind": kind, "by": made_by, "asked": self._asked, "sources": sources})

    def guide_like(self, guide: GuideInfo) -> int | None:
        """The number of the guide that gives the same vectors; None when the store has no such guide."""
        numbers = (number for number, own in enumerate(self.guides) if own.identity == guide.identity)
        return next(numbers, None)

    def continues(self, earlier: "Manifest") -> bool:
        """Whether this is the store of an earlier manifest, as it was or grown: it has every shard that it had."""
        mine, known = self.data.segments[: len(earlier.data.segments)], earlier.data.segments
        guides = [guide.identity for guide in self.guides[: len(earlier.guides)]]
        return (
            self._asked == earlier._asked
            and [replace(segment, description="") for segment in mine]
            == [replace(segment, description="") for segment in known]
            and guides == [guide.identity for guide in earlier.guides]
        )

    def difference(self, guide: GuideInfo, columns: tuple[str, ...], holdout: float) -> str | None:
        """The first thing that was asked for and that this store does not have, in words.

        Returns:
            For example "guide.query_prompt: store has '', asked for 'query: '", or None when nothing differs.
        """
        asked = (("data.columns", self.data.columns, columns), ("data.holdout", self.data.holdout, holdout))
        for name, found, wanted in asked:
            if found != wanted:
                return f"{name}: store has {found!r}, asked for {wanted!r}"
        if self.guide_like(guide) is not None:
            return None
        same_weights = (own for own in self.guides if own.weights_hash == guide.weights_hash)
        nearest = next(same_weights, self.guide)
        pairs = ((name, own, asdict(guide)[name]) for name, own in asdict(nearest).items())
        return next(f"guide.{name}: store has {own!r}, asked for {new!r}" for name, own, new in pairs if own != new)

    def with_segment(self, segment: Segment) -> "Manifest":
        """The manifest of the store with one segment more."""
        return replace(self, data=replace(self.data, segments=(*self.data.segments, segment)))

    def with_guide(self, guide: GuideInfo, weight: float, guide_score: GuideScore) -> "Manifest":
        """The manifest of the store with one guide more, or with another weight for one that it has."""
        number = self.guide_like(guide)
        if number is None:
            guides, weights = (*self.guides, guide), (*self.weights, weight)
        else:
            guides, weights = self.guides, (*self.weights[:number], weight, *self.weights[number + 1 :])
        return replace(self, guides=guides, weights=weights, guide_score=guide_score)

    def write(self, path: Path) -> None:
        """Write the manifest to `path`, replacing an earlier one in one step."""
        record = asdict(self)
        write_json(path, {**record, "checksum": fingerprint_of(record)})

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """The manifest in the file `path`.

        Raises:
            StoreError: When it is of another version, or it was changed by hand.
        """
        record = read_json(path)
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            advice = "upgrade gistfast" if newer else "make the store anew with --overwrite"
            raise StoreError(f"{path} has format version {version}, this gistfast reads {FORMAT_VERSION}: {advice}")
        if record.pop("checksum", None) != fingerprint_of(record):
            raise StoreError(f"{path} was changed after it was written: restore it, or make the store anew")
        try:
            return cls(
                guides=tuple(GuideInfo(**guide) for guide in record["guides"]),
                data=_data_info(record["data"]),
                guide_score=record["guide_score"],
                weights=tuple(record["weights"]),
            )
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} has other fields than format {FORMAT_VERSION}: restore it") from error

    @property
    def _asked(self) -> dict[str, Any]:
        """What decides which entries rows are made of."""
        data = self.data
        return {"columns": data.columns, "holdout": data.holdout, "one_role": data.one_role}

    @property
    def _scoring(self) -> dict[str, Any]:
        """What decides the score of two texts."""
        guides = [guide.identity for guide in self.guides]
        return {"guides": guides, "weights": self.weights, "guide_score": self.guide_score}


def _data_info(record: Mapping[str, Any]) -> DataInfo:
    segments = (
        Segment(**{**segment, "texts": tuple(segment["texts"]), "rows": tuple(segment["rows"])})
        for segment in record["segments"]
    )
    lists = {name: tuple(record[name]) for name in ("columns", "tasks")}
    return DataInfo(**{**record, **lists, "segments": tuple(segments)})
