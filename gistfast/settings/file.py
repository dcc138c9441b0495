"""Settings from a file: what would stand on the command line, as YAML or JSON."""

import json
import re
from pathlib import Path
from typing import Any

from gistfast.errors import ConfigError, first_line


def read_settings_file(path: Path) -> dict[str, Any]:
    """The settings in a file, by name; dashes in names are underscores.

    The record of a run (`gistfast.json` in its folder) is such a file, too: its settings are taken.

    Args:
        path: A .yaml, .yml or .json file that holds one mapping.

    Raises:
        ConfigError: When it cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {first_line(error)}") from error
    values = _parsed(path, text)
    if isinstance(values, dict) and isinstance(values.get("settings"), dict):
        values = values["settings"]
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"--config {path} holds {type(values).__name__}, expected one mapping of settings by name")
    return {name.replace("-", "_"): value for name, value in values.items()}


def _parsed(path: Path, text: str) -> Any:
    import yaml

    kind = path.suffix.lower()
    if kind not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"--config {path} must be a .yaml, .yml or .json file")

    # Reads 2e-5 as the number that it is in YAML 1.2.
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return json.loads(text) if kind == ".json" else yaml.load(text, loader)
    except (ValueError, yaml.YAMLError) as error:
        # YAML says the place in a later line.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ConfigError(f"--config {path} is not valid {kind[1:].upper()}: {first_line(error)}{where}") from error
