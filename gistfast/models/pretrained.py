"""From a model's folder to a loaded model: what guides and students have in common."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from gistfast.errors import ConfigError, ModelError, first_line
from gistfast.models.adapter import import_peft, merge_adapter, whole_folder
from gistfast.models.folder import ModelFolder

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "cls", "last", "max", "weightedmean", "mean_sqrt_len"]

# What sentence-transformers calls them.
POOLING_MODES: dict[str, str] = {
    "mean": "mean",
    "cls": "cls",
    "last": "lasttoken",
    "max": "max",
    "weightedmean": "weightedmean",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
}

# What the loaders raise for a damaged or strange model folder, beside safetensors' own error.
LOADING_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def load_sentence_transformer(
    folder: ModelFolder,
    *,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    dtype: "torch.dtype | None" = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> "SentenceTransformer":
    """A sentence-transformers model of the folder, in evaluation mode; an adapter is merged into its base.

    Args:
        folder: From `model_folder`.
        pooling: How tokens become one vector. A plain transformers model needs it; in a sentence-transformers
            folder it takes the place of the folder's own.
        max_length: Tokens of a text that the model sees; its own limit when None.
        dtype: Precision of the weights; float32 when None.
        device: As PyTorch names it; the best one there is when None.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        DependencyError: When the folder holds an adapter and peft is not installed.
        ModelError: When it does not load, has no pooling, or cannot see `max_length` tokens.
    """
    from safetensors import SafetensorError

    if folder.base is not None:
        import_peft(f"{folder.name} is a LoRA adapter")

    if not folder.is_sentence_transformer and pooling is None:
        raise ModelError(
            f"{folder.name} is a plain transformers model, which says nothing of its pooling: "
            f"give --pooling {'|'.join(POOLING_MODES)}"
        )
    read = _read_modules if folder.is_sentence_transformer else _read_plain
    try:
        with no_weight_bar(), whole_folder(folder) as whole:
            model = read(whole, pooling, dtype, device, trust_remote_code)
            if folder.base is not None:
                merge_adapter(model, folder)
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise ModelError(f"{folder.name} does not load as a model: {_reason(error)}") from error
    if max_length is not None:
        _limit_tokens(model, max_length, folder.name)
    return model.eval()


def _read_modules(
    folder: ModelFolder, pooling: Pooling | None, dtype: "torch.dtype | None", device: str | None, trust: bool
) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer

    loading = _loading(dtype, trust)
    model = SentenceTransformer(
        str(folder.path),
        device=device,
        local_files_only=True,
        trust_remote_code=trust,
        model_kwargs=loading["model_kwargs"],
        processor_kwargs=loading["processor_kwargs"],
        config_kwargs=loading["config_kwargs"],
    )
    if pooling is not None:
        _replace_pooling(model, pooling, folder.name)
    return model


def _read_plain(
    folder: ModelFolder, pooling: Pooling | None, dtype: "torch.dtype | None", device: str | None, trust: bool
) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    encoder = modules.Transformer(str(folder.path), **_loading(dtype, trust))
    pool = modules.Pooling(encoder.get_embedding_dimension(), POOLING_MODES[pooling or ""])
    return SentenceTransformer(modules=[encoder, pool], device=device)


def _loading(dtype: "torch.dtype | None", trust: bool) -> dict[str, dict[str, Any]]:
    import torch

    trusted = {"trust_remote_code": trust}
    model_kwargs = {**trusted, "dtype": dtype or torch.float32, "use_safetensors": True}
    return {"model_kwargs": model_kwargs, "processor_kwargs": {**trusted}, "config_kwargs": {**trusted}}


def _replace_pooling(model: "SentenceTransformer", pooling: Pooling, name: str) -> None:
    from sentence_transformers.sentence_transformer import modules

    found = [key for key, module in model.named_children() if isinstance(module, modules.Pooling)]
    if not found:
        raise ModelError(f"{name} has no pooling to replace: leave --pooling out")
    old: Any = model.get_submodule(found[0])
    new = modules.Pooling(old.embedding_dimension, POOLING_MODES[pooling], include_prompt=old.include_prompt)
    if new.get_embedding_dimension() != old.get_embedding_dimension():
        raise ModelError(f"{name} joins several poolings in one vector: leave --pooling out")
    if old.pooling_mode != new.pooling_mode:
        logger.info("%s: pooling %s in place of its own, %s", name, new.pooling_mode, old.pooling_mode)
    setattr(model, found[0], new)


def _limit_tokens(model: "SentenceTransformer", max_length: int, name: str) -> None:
    positions = _num_positions(model)
    if positions is not None and positions < max_length:
        raise ModelError(f"--max-length is {max_length}, and {name} sees {positions} tokens: give at most that")
    try:
        model.max_seq_length = max_length
    except AttributeError:
        # Static embeddings take texts of any length.
        raise ModelError(f"{name} has no limit of tokens to set: leave --max-length out") from None


def _num_positions(model: "SentenceTransformer") -> int | None:
    """How many tokens have a learned position; None for models that compute positions of any number."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            # RoBERTa and MPNet begin to count behind the position of padding.
            unused = 0 if module.padding_idx is None else int(module.padding_idx) + 1
            return int(module.num_embeddings) - unused
    return None


@contextmanager
def no_weight_bar() -> Iterator[None]:
    """Keep transformers' bar for reading and writing weights, which takes a second, off the terminal."""
    from transformers.utils import logging

    transformers_logging: Any = logging
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own: read that code, and give --trust-remote-code if you trust it"
    return first_line(error)


def pick_device(name: str) -> str:
    """The device to compute on: `name`, or for "auto" a CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: When there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, found {name!r}") from None
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise ConfigError(f"--device {name}: found {num_cuda} CUDA devices here: use auto or cpu")
    return name
