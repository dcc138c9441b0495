"""LoRA adapters, merged into the model that they were trained on: as quick as a whole model, and saved as one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gistfast.errors import DependencyError, ModelError
from gistfast.models.folder import ADAPTER_SETTINGS, TOKENIZER_FILES, ModelFolder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def import_peft(why: str) -> ModuleType:
    """The package peft.

    Args:
        why: Half a sentence that says what it is needed for.

    Raises:
        DependencyError: When it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            f"{why}, and peft is not installed: install it with `pip install gistfast[lora]`"
        ) from error
    return peft


@contextmanager
def whole_folder(folder: ModelFolder) -> Iterator[ModelFolder]:
    """A folder that loads without peft: itself, or for an adapter links to its files and its base's weights.

    Args:
        folder: From `model_folder`.
    """
    if folder.base is None:
        yield folder
        return
    with TemporaryDirectory(prefix="gistfast-") as temporary:
        whole, first_module = Path(temporary), folder.module_folders()[0]
        encoder = whole / first_module.relative_to(folder.path)
        encoder.mkdir(exist_ok=True, parents=True)
        weights = ("config.json", "*.safetensors", "*.safetensors.index.json", ADAPTER_SETTINGS)
        _link(folder.base.module_folders()[0], encoder, but=TOKENIZER_FILES if folder.has_tokenizer() else ())
        _link(first_module, encoder, but=weights)
        if encoder != whole:
            _link(folder.path, whole, but=())
        yield replace(folder, path=whole, base=None)


def _link(files_of: Path, into: Path, but: tuple[str, ...]) -> None:
    """Links to all that is in a folder, in place of what has their names."""
    for path in files_of.iterdir():
        link = into / path.name
        if any(path.match(pattern) for pattern in but) or link.is_dir():
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve(), target_is_directory=path.is_dir())


def merge_adapter(model: "SentenceTransformer", folder: ModelFolder) -> None:
    """Merge the folder's adapter into the weights of its base, in place.

    Args:
        model: Loaded from `whole_folder`.
        folder: The adapter's.

    Raises:
        ModelError: When the adapter cannot be merged, or its weights do not belong to this base.
    """
    peft: Any = import_peft(f"{folder.name} is a LoRA adapter")
    encoder: Any = model.transformers_model
    path = folder.module_folders()[0]
    settings = peft.PeftConfig.from_pretrained(str(path))
    if settings.is_prompt_learning:
        raise ModelError(
            f"{folder.name} is an adapter of kind {settings.peft_type}, expected LoRA, which can be merged"
        )
    # Adapters of a model with a head fit its encoder: neither the head nor its way of being called is needed.
    settings.task_type = None
    names = {**getattr(encoder, "_checkpoint_conversion_mapping", {}), rf"^{encoder.base_model_prefix}\.": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(encoder, str(path), config=settings, key_mapping=names)
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise ModelError(
            f"{folder.name} has no weights for the layers of its base that it names: "
            "check adapter_config.json, or save the merged model with merge_and_unload"
        )
    adapted.merge_and_unload(safe_merge=True)
    # peft froze the base, and a student is to be trained.
    encoder.requires_grad_(True)
