"""The settings of the commands that look after a store; see `gistfast.settings.stages` for all others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gistfast.errors import ConfigError
from gistfast.guides.kinds import refuse_address_alone, refuse_options_of_other_guides
from gistfast.settings.base import Settings, argument, column_names, refuse_unknown_device, setting, vector_places


@dataclass(frozen=True, kw_only=True)
class StoreInfoSettings(Settings):
    """What is in a store."""

    about = "Show what is in the guide store STORE: guides, rows, sizes, index, progress."

    store: str = argument("Folder of the guide store.")
    json: bool = setting(False, "Print JSON, for programs.")


@dataclass(frozen=True, kw_only=True)
class StoreVerifySettings(Settings):
    """Whether a store is what was written."""

    about = "Name every shard of the guide store STORE that is missing or damaged; exit code 1 when there is one."

    store: str = argument("Folder of the guide store.")
    deep: bool = setting(False, "Read every byte: checksums, lengths of vectors, ranges of ids. Else sizes of files.")


@dataclass(frozen=True, kw_only=True)
class StoreRepairSettings(Settings):
    """Bad shards made again."""

    about = "Make what is missing or damaged in the guide store STORE again, and nothing else."
    when_stopped = "stopped: the same command goes on from here"

    store: str = argument("Folder of the guide store.")
    guide: str | None = setting(
        None, "Guide that made the vectors: a folder, hub id, server or file; by its recorded name when left out."
    )
    decode_with: str | None = setting(None, "Student whose tokenizer respelled the texts, where one did.")
    device: str = setting("auto", "Device of the guide: auto, cpu, cuda or cuda:N.")
    tokens_per_batch: int | None = setting(
        None, "Tokens of a forward pass; chosen for the device when left out.", at_least=1
    )
    attention: Literal["auto", "padded", "unpadded"] = setting(
        "auto", "Texts padded to one length or in one row; auto is one row on a GPU where that gives the same vectors."
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the guide. Only for models you trust.")
    api_key_env: str = setting("GISTFAST_API_KEY", "Environment variable with the key of an embedding server.")
    vectors: Mapping[str, str] | None = setting(
        None, "Where ready vectors are, as it was given when the store was made.", parse=vector_places
    )
    source: str | None = setting(None, "Where the rows came from, to read bad texts and rows again.")
    columns: Mapping[str, str] | None = setting(
        None, "Columns of the source, as they were given when it was read.", parse=column_names
    )
    subset: str | None = setting(None, "Subset (configuration) of a hub data set.")
    split: str | None = setting(None, "Split of a data set.")
    revision: str | None = setting(None, "Revision of a hub data set.")

    def check(self) -> None:
        """Refuse options of a source or of a guide that is not given."""
        if self.source is None and (self.columns or self.subset or self.split or self.revision):
            raise ConfigError("--columns, --subset, --split and --revision belong to --source: give it, too")
        if self.guide is not None:
            refuse_address_alone(self.guide)
            refuse_options_of_other_guides(self, self.guide)
        refuse_unknown_device(self.device)


@dataclass(frozen=True, kw_only=True)
class StoreGcSettings(Settings):
    """What interrupted runs left."""

    about = "Remove what interrupted or earlier runs left in the guide store STORE and nobody reads."

    store: str = argument("Folder of the guide store.")
    dry_run: bool = setting(False, "List what would be removed, and remove nothing.")
    now: bool = setting(
        False, "Also remove files younger than an hour that no commit names. Only when no process writes the store."
    )
    unfinished: bool = setting(
        False, "Also give up what is under way: an append, an added guide, or a store that is to replace this one."
    )
