"""Texts to guide vectors: sorted by length, cut into batches by tokens, given back in order.

# N texts, L tokens of a text, G guide width
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from gistfast.errors import VectorError
from gistfast.guide_info import Role, describe_guide
from gistfast.model_folder import model_folder
from gistfast.pretrained import Pooling, load_sentence_transformer, pick_device
from gistfast.store import GuideInfo

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]

# A CPU is fastest when a batch fits its caches; a GPU wants many rows at once.
TOKENS_PER_CPU_BATCH = 1024
TOKENS_PER_GPU_BATCH = 32_768

# Texts tokenised at once: enough to sort by length, few enough to pad to the longest.
WINDOW = 512


class Guide(Protocol):
    """Anything that turns texts into vectors and can be told from every other."""

    @property
    def info(self) -> GuideInfo:
        """What the vectors depend on."""

    def embed(
        self, texts: Sequence[str], role: Role, on_batch: Callable[[int], None] | None = None
    ) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """The vectors (N, G) of the texts, in their order and of length 1."""


class ModelGuide:
    """A sentence-transformers model as a guide."""

    def __init__(
        self,
        model: SentenceTransformer,
        info: GuideInfo,
        *,
        tokens_per_batch: int,
        respell: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        self._model = model
        self._info = info
        self._tokens_per_batch = tokens_per_batch
        self._respell = respell
        self._prompts: dict[Role, str] = {"query": info.query_prompt, "document": info.document_prompt}

    @property
    def info(self) -> GuideInfo:
        """What the vectors depend on."""
        return self._info

    def embed(
        self, texts: Sequence[str], role: Role, on_batch: Callable[[int], None] | None = None
    ) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """The vectors (N, G) of the texts, in their order, of length 1, fp32.

        The longest texts come first: a batch that does not fit in memory fails at once, not after hours.

        Args:
            texts: N texts, without prompts.
            role: Whose prompt stands before each of them.
            on_batch: Called with the number of texts of each batch that is done.

        Raises:
            VectorError: When a vector is zero or not finite; its text is named.
        """
        vectors = np.empty((len(texts), self._info.width), np.float32)
        by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]), reverse=True)
        for start in range(0, len(texts), WINDOW):
            numbers = np.array(by_length[start : start + WINDOW])
            window = [texts[number] for number in numbers]
            for rows, batch in self._embed_window(window, role):
                lengths = _checked_lengths(batch, [window[row] for row in rows], self._info.name)
                vectors[numbers[rows]] = batch / lengths[:, None]
                if on_batch is not None:
                    on_batch(len(rows))
        return vectors

    @torch.inference_mode()
    def _embed_window(
        self, texts: list[str], role: Role
    ) -> Iterator[tuple["np.ndarray[Any, Any]", "np.ndarray[Any, np.dtype[np.float32]]"]]:
        if self._respell is not None:
            texts = self._respell(texts)
        features = self._model.preprocess(texts, prompt=self._prompts[role] or None)
        for rows, batch in token_batches(features, self._tokens_per_batch):
            output = self._model(batch_to_device(batch, self._model.device))
            # Models that say so in their settings keep only the first numbers of a vector.
            vectors = output["sentence_embedding"][:, : self._info.width]
            yield rows.numpy(), vectors.float().cpu().numpy()


def token_batches(features: dict[str, Any], tokens_per_batch: int) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Batches of at most `tokens_per_batch` tokens, padding included: row numbers and their features.

    Rows are sorted by length, longest first, and each batch is cut to its own longest row; a row longer than
    the budget is a batch of its own. Features without an attention mask hold no padding: they are one batch.

    Args:
        features: Of a tokenised window; tensors (N, L), and values that hold for all rows.
        tokens_per_batch: The budget.
    """
    mask = features.get("attention_mask")
    if mask is None:
        yield torch.arange(len(features["offsets"])), features
        return
    lengths, order = mask.sum(dim=1).sort(descending=True, stable=True)
    padded_left = bool(mask[:, -1].all())
    start = 0
    while start < len(order):
        longest = max(int(lengths[start]), 1)
        rows = order[start : start + max(tokens_per_batch // longest, 1)]
        columns = slice(-longest, None) if padded_left else slice(longest)
        yield rows, {key: _cut(value, rows, columns, mask.shape) for key, value in features.items()}
        start += len(rows)


def _cut(value: Any, rows: torch.Tensor, columns: slice, shape: torch.Size) -> Any:
    """The rows and columns of what is given for each token; what holds for all rows, as it is."""
    return value[rows][:, columns] if torch.is_tensor(value) and value.shape == shape else value


def _checked_lengths(
    vectors: "np.ndarray[Any, np.dtype[np.float32]]", texts: list[str], guide: str
) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The lengths of the vectors, each finite and above 0."""
    lengths: np.ndarray[Any, np.dtype[np.float32]] = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        text = texts[bad[0]]
        shown = repr(text if len(text) <= 80 else text[:77] + "...")
        what = "has length 0" if lengths[bad[0]] == 0 else "is not finite"
        raise VectorError(
            f"guide {guide}: the vector of the text {shown} {what}, expected a direction: "
            "remove the text, or try --dtype float32"
        )
    return lengths


def load_guide(
    name: str,
    *,
    pooling: Pooling | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    max_length: int | None = None,
    dtype: Precision = "auto",
    revision: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    tokens_per_batch: int | None = None,
    decode_with: str | None = None,
) -> ModelGuide:
    """A guide from a folder or hub id: sentence-transformers, or a plain transformers encoder with `pooling`.

    Args:
        name: Folder or hub id.
        pooling: How a plain encoder's tokens become one vector; else takes the place of the model's own.
        query_prompt: Stands before anchors; the model's own prompt when None, none when empty.
        document_prompt: Stands before positives and negatives, likewise.
        max_length: Tokens of a text that the guide sees; its own limit when None.
        dtype: Precision to compute in. "auto" is bfloat16 on a GPU that has it, else float32.
        revision: Branch, tag or commit of a hub id.
        device: "auto", "cpu", "cuda" or "cuda:N".
        trust_remote_code: Whether code that comes with the model may run.
        tokens_per_batch: Tokens of one forward pass, padding included; chosen for the device when None.
        decode_with: A student whose tokenizer cuts and respells each text first: a guide that lives in the
            training process is given the student's tokens, decoded.

    Raises:
        ModelError: When the guide or the student cannot be loaded.
        ConfigError: When there is no such device.
    """
    folder = model_folder(name, revision=revision, trust_remote_code=trust_remote_code)
    device = pick_device(device)
    precision = _choose_precision(dtype, device)
    model = load_sentence_transformer(
        folder,
        pooling=pooling,
        max_length=max_length,
        dtype=getattr(torch, precision),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    spelling = None if decode_with is None else StudentSpelling(decode_with, trust_remote_code)
    info = describe_guide(
        model,
        folder,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        compute_dtype=precision,
        decoded_with=None if spelling is None else spelling.name,
    )
    on_cpu = torch.device(device).type == "cpu"
    budget = tokens_per_batch or (TOKENS_PER_CPU_BATCH if on_cpu else TOKENS_PER_GPU_BATCH)
    logger.info("guide on %s in %s, %d tokens a batch", device, precision, budget)
    return ModelGuide(model, info, tokens_per_batch=budget, respell=spelling)


class StudentSpelling:
    """Texts as a student's tokenizer spells them: cut at its limit, tokenised and decoded.

    Attributes:
        name: The student, and the hash of its tokenizer.
    """

    def __init__(self, student: str, trust_remote_code: bool = False) -> None:
        folder = model_folder(student, trust_remote_code=trust_remote_code)
        self.name = f"{folder.name}@{folder.tokenizer_hash()}"
        # Loaded whole, because only the model itself knows where it cuts a text.
        pooling: Pooling | None = None if folder.is_sentence_transformer else "mean"
        model = load_sentence_transformer(folder, pooling=pooling, device="cpu", trust_remote_code=trust_remote_code)
        self._tokenizer = model.tokenizer

    def __call__(self, texts: list[str]) -> list[str]:
        """The texts, respelled."""
        ids = self._tokenizer(texts, truncation=True)["input_ids"]
        respelled: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return respelled


def _choose_precision(dtype: Precision, device: str) -> str:
    if dtype != "auto":
        return dtype
    on_gpu = torch.device(device).type == "cuda"
    return "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
