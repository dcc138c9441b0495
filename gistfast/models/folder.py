"""From a model's name to the folder that holds it.

A name is a folder or a hub id. Either becomes a folder that was looked at before anything is loaded from it:
it is a model, and its weights are safetensors, so that loading runs no code of the model's. A folder may hold a
LoRA adapter alone, which names the model that it was trained on.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from gistfast.errors import ModelError, first_line
from gistfast.models.hub import download

ADAPTER_SETTINGS = "adapter_config.json"
WEIGHT_FILES = ("*.safetensors", "config.json", "modules.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*tokens*.json",
    "sentence_bert_config.json",
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model with safetensors weights.

    Attributes:
        name: The hub id, or the last two parts of a local path.
        path: Where the files are.
        revision: Commit on the hub; None for a local folder.
        base: The model that the folder's LoRA adapter was trained on; None when the folder holds a whole model.
    """

    name: str
    path: Path
    revision: str | None
    base: "ModelFolder | None" = None

    @property
    def is_sentence_transformer(self) -> bool:
        """Whether the folder lists its modules, pooling among them."""
        return (self.path / "modules.json").is_file()

    def module_folders(self) -> list[Path]:
        """The folders that hold a module's weights and configuration, the first one first."""
        if not self.is_sentence_transformer:
            return [self.path]
        modules = json.loads((self.path / "modules.json").read_text(encoding="utf-8"))
        inside = [PurePosixPath(module.get("path", "")) for module in modules]
        if any(path.is_absolute() or ".." in path.parts for path in inside):
            raise ModelError(f"{self.name}: modules.json leads out of the model's folder: use another copy")
        return [self.path / path for path in inside]

    def weights_hash(self) -> str:
        """Hash of the weights and of the configurations that say what is computed with them."""
        own = self._hash_of(self.module_folders(), WEIGHT_FILES)
        if self.base is None:
            return own
        # Where the base was found changes nothing: its weights are hashed.
        settings = {**self.adapter_settings(), "base_model_name_or_path": None, "revision": None}
        record = [own, settings, self.base.weights_hash()]
        return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())

    def tokenizer_hash(self) -> str:
        """Hash of the files that decide how a text is cut into tokens."""
        holder = self.base if self.base is not None and not self.has_tokenizer() else self
        return holder._hash_of(holder.module_folders()[:1], TOKENIZER_FILES)

    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights, as it need not beside an adapter's."""
        return _has(self.module_folders()[0], "tokenizer*")

    def adapter_settings(self) -> dict[str, Any]:
        """What the folder's adapter says of itself.

        Raises:
            ModelError: When it does not name the model that it was trained on.
        """
        path = self.module_folders()[0] / ADAPTER_SETTINGS
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            named = isinstance(settings, dict) and isinstance(settings.get("base_model_name_or_path"), str)
        except ValueError:
            named = False
        if not named:
            raise ModelError(f"{path} does not say which model the adapter was trained on: restore it")
        return dict(settings)

    def _hash_of(self, folders: list[Path], patterns: tuple[str, ...]) -> str:
        found = {path for folder in folders for pattern in patterns for path in folder.glob(pattern)}
        digest = xxhash.xxh3_128()
        for path in sorted(filter(Path.is_file, found)):
            digest.update(f"{path.relative_to(self.path).as_posix()}:{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


def model_folder(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelFolder:
    """The checked folder of a model, downloaded when the name is a hub id.

    Args:
        name: A folder, or a hub id such as "BAAI/bge-small-en-v1.5".
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether to download Python files beside the weights.

    Raises:
        ModelError: When there is no such folder or hub id, the hub cannot be reached, the folder is not a
            model, its weights are pickles only, or all this is so of the model that its adapter was trained on.
    """
    if revision is not None and Path(name).expanduser().is_dir():
        raise ModelError(f"{name} is a folder, which has no revision {revision!r}: leave it out or give a hub id")
    folder = _found_folder(name, revision, trust_remote_code)
    return replace(folder, base=_base_of(folder, trust_remote_code)) if _is_adapter(folder) else folder


def _found_folder(name: str, revision: str | None, trust_remote_code: bool) -> ModelFolder:
    path = Path(name).expanduser()
    if path.is_dir():
        parts = path.resolve().relative_to(path.resolve().anchor).parts
        folder = ModelFolder("/".join(parts[-2:]), path, revision=None)
    elif path.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ModelError(f"{name} is not a folder: give the folder of a model or a hub id")
    else:
        path = download(name, revision=revision, with_code=trust_remote_code)
        folder = ModelFolder(name, path, revision=path.name)
    _check(folder)
    return folder


def _is_adapter(folder: ModelFolder) -> bool:
    return _has(folder.module_folders()[0], ADAPTER_SETTINGS)


def _base_of(folder: ModelFolder, trust_remote_code: bool) -> ModelFolder:
    settings = folder.adapter_settings()
    name = settings["base_model_name_or_path"]
    try:
        base = _found_folder(name, settings.get("revision"), trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{folder.name} is an adapter of {name}, which cannot be had: {error}") from error
    if _is_adapter(base):
        raise ModelError(f"{folder.name} is an adapter of {name}, itself an adapter: merge that one first")
    return base


def _check(folder: ModelFolder) -> None:
    if not any((folder.path / name).is_file() for name in ("modules.json", "config.json", ADAPTER_SETTINGS)):
        raise ModelError(
            f"{folder.path} is not a model: found neither modules.json nor config.json, "
            "expected a sentence-transformers or transformers folder"
        )
    try:
        module_folders = folder.module_folders()
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder.path} has a damaged modules.json: {first_line(error)}") from error
    pickles = ("pytorch_model*.bin", "adapter_model*.bin")
    has_pickles = [path for path in module_folders if any(_has(path, pattern) for pattern in pickles)]
    pickled = [path for path in has_pickles if not _has(path, "*.safetensors")]
    if pickled:
        raise ModelError(
            f"{pickled[0]} has its weights as pickles only, expected safetensors: "
            "load it where you trust it and save it again with save_pretrained"
        )
    if not any(_has(path, "**/*.safetensors") for path in module_folders):
        raise ModelError(f"{folder.path} is not a model: found no *.safetensors, expected weights there")


def _has(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None
