"""The kinds of guides, told apart by what --guide names, and which options each kind takes."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any, Literal

from gistfast.errors import ConfigError
from gistfast.settings.base import Settings, flag_of

GuideKind = Literal["model", "server", "ready"]

# Formats of files with texts whose vectors are ready.
READY_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")

OPTIONS: dict[GuideKind, tuple[str, ...]] = {
    "model": (
        "pooling",
        "max_length",
        "dtype",
        "guide_revision",
        "decode_with",
        "device",
        "tokens_per_batch",
        "attention",
        "trust_remote_code",
    ),
    "server": (
        "guide_model",
        "server_concurrency",
        "server_batch",
        "server_timeout_s",
        "server_retries",
        "api_key_env",
    ),
    "ready": ("vectors",),
}
# HOST:PORT or HOST:PORT/..., which no model on the hub is called.
_ADDRESS = re.compile(r"([\w.-]+|\[[\da-fA-F:]+\]):\d+(/.*)?")
_CALLED: dict[GuideKind, str] = {
    "model": "a model that runs here",
    "server": "a server, which settles that itself",
    "ready": "a file of vectors that are ready",
}


def guide_kind(name: str) -> GuideKind:
    """What a guide's name leads to: a server's address, a file of ready vectors, else a model."""
    if name.startswith(("http://", "https://")):
        return "server"
    return "ready" if PurePath(name).suffix in READY_SUFFIXES else "model"


def refuse_address_alone(guide: str) -> None:
    """Refuse what looks like a server's address without its scheme, and would be taken for a model.

    Raises:
        ConfigError: When it does, and there is no folder of that name.
    """
    if guide_kind(guide) == "model" and _ADDRESS.fullmatch(guide) and not Path(guide).is_dir():
        raise ConfigError(
            f"--guide {guide} is neither a folder nor a hub id: for a server begin with http:// or https://"
        )


def refuse_options_of_other_guides(settings: Settings, guide: str) -> None:
    """Refuse options that would change nothing for this kind of guide.

    Args:
        settings: With the options of all kinds as fields.
        guide: The guide's name.

    Raises:
        ConfigError: When an option of another kind is given.
    """
    kind = guide_kind(guide)
    ignored = {name for other, names in OPTIONS.items() if other != kind for name in names}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name in ignored and value != item.default:
            raise ConfigError(
                f"{flag_of(item)} {_as_typed(value)} does not go with --guide {guide}, {_CALLED[kind]}: leave it out"
            )


def _as_typed(value: Any) -> Any:
    return ",".join(f"{name}={place}" for name, place in value.items()) if isinstance(value, Mapping) else value
