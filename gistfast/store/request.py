"""What is asked of a store, held against what is there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gistfast.errors import StoreError
from gistfast.rows.dataset import RowSource
from gistfast.store.info import DataInfo, GuideInfo, GuideScore, Segment
from gistfast.store.manifest import Manifest
from gistfast.store.plan import has_lost_its_name, is_store, no_store, read_plan

Mode = Literal["new", "resume", "overwrite", "append", "add_guide"]


@dataclass(frozen=True)
class Request:
    """A guide and rows that a store is to have.

    Attributes:
        guide: The guide whose vectors will be written.
        source: The rows.
        holdout: Share of the distinct positives to hold out, 0 to 1; None for what the store has.
        split_roles: Whether a text is to have one entry for each role, whatever the guide reads.
    """

    guide: GuideInfo
    source: RowSource
    holdout: float | None
    split_roles: bool = False

    @property
    def segment(self) -> Segment:
        """The segment of the rows before the first one is read."""
        return Segment(description=self.source.description, fingerprint=self.source.fingerprint)

    def new_store(self) -> Manifest:
        """The plan of a new store before the first row is read."""
        data = DataInfo(
            columns=self.source.columns,
            holdout=self.holdout or 0.0,
            one_role=self.guide.has_one_prompt and not self.split_roles,
            tasks=(),
            segments=(self.segment,),
        )
        return Manifest((self.guide,), data)

    def made(self, path: Path) -> bool:
        """Whether the store at `path`, if one is there that can be read, is a new one that was asked for so."""
        try:
            plan = read_plan(path)
        except StoreError:
            return False
        holdout = self.holdout or 0.0
        same = plan.difference(self.guide, self.source.columns, holdout) is None
        same = same and not (self.split_roles and plan.data.one_role)
        return same and [segment.fingerprint for segment in plan.data.segments] == [self.source.fingerprint]

    def with_guide(self, path: Path, plan: Manifest, weight: float, guide_score: GuideScore) -> Manifest:
        """The plan of a store that has the guide, too.

        Raises:
            StoreError: When the store cannot hold this guide's vectors, or has other rows.
        """
        if plan.data.one_role and not self.guide.has_one_prompt:
            raise StoreError(
                f"{path} has one vector for a text in whichever column it stands, and this guide reads "
                "anchors under a prompt of their own: make the store anew with --split-roles, then add the guide"
            )
        self.refuse_other_rows(path, plan)
        return plan.with_guide(self.guide, weight, guide_score)

    def has_rows_in(self, plan: Manifest) -> bool:
        """Whether the rows came into the store already."""
        return self.source.fingerprint in [segment.fingerprint for segment in plan.data.segments]

    def refuse_difference(self, path: Path, plan: Manifest) -> None:
        """Refuse a store with another guide, other columns, another share held out, or one entry for both roles.

        Raises:
            StoreError: Naming the first field that differs.
        """
        holdout = plan.data.holdout if self.holdout is None else self.holdout
        if difference := plan.difference(self.guide, self.source.columns, holdout):
            raise StoreError(
                f"{path} was made from something else: {difference}: "
                "give the same settings, or --overwrite, or another --out"
            )
        if self.split_roles and plan.data.one_role:
            raise StoreError(
                f"{path} has one vector for a text in whichever column it stands, asked for one a role: leave "
                "--split-roles out, or make the store anew with --overwrite"
            )

    def refuse_other_rows(self, path: Path, plan: Manifest) -> None:
        """Refuse a store that these rows did not come into.

        Raises:
            StoreError: Naming the rows that it has.
        """
        if not self.has_rows_in(plan):
            raise StoreError(
                f"{path} was made from something else: data.fingerprint: store has {plan.data.description} "
                f"({plan.data.fingerprint}), asked for {self.source.description} ({self.source.fingerprint}): "
                "give the same rows, or --append, --overwrite or another --out"
            )


def refuse_unless_free(path: Path, mode: Mode) -> None:
    """Refuse to touch what is at `path` in this mode.

    Raises:
        StoreError: Saying what is there.
    """
    if is_store(path):
        if mode == "new":
            raise StoreError(
                f"{path} exists: go on with --resume, add rows with --append, make it anew with --overwrite, "
                "or choose another --out"
            )
    elif has_lost_its_name(path):
        raise StoreError(no_store(path))
    elif above := next((folder for folder in path.parents if folder.is_file()), None):
        raise StoreError(f"{above} is a file, expected a folder to write {path} in: choose another --out")
    elif path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise StoreError(f"{path} exists and is not a guide store: choose another --out")
    elif mode == "add_guide":
        raise StoreError(f"{path} is not a guide store: make one without --add-guide first")
