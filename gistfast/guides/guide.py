"""A model as a guide: texts in, vectors out, as fast as the device computes them.

Texts are tokenised in a background thread, a window ahead of the forward passes. On a CPU the passes run side by
side, one thread each, which wastes less than many threads in one pass; on a GPU one follows the other.

# N texts, G guide width
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from gistfast.errors import ModelError
from gistfast.guides.ahead import run_ahead
from gistfast.guides.attention import choose_padding, may_be_unpadded, tried_texts
from gistfast.guides.batch_done import BatchDone, OnBatch
from gistfast.guides.directions import Vectors, shown, unit_vectors
from gistfast.guides.info import describe_guide
from gistfast.guides.packed_linear import can_pack, pack_linears
from gistfast.guides.precision import Precision, choose_precision, pool_in_float32, precision_of
from gistfast.guides.spelling import StudentSpelling
from gistfast.guides.token_batches import CHARS_PER_WINDOW, Padding, TokenBatch, TokenWindow, cut_windows, tokenise
from gistfast.guides.token_budget import TOKENS_PER_CPU_BATCH, TOKENS_PER_GPU_BATCH, measure_budget
from gistfast.models.folder import model_folder
from gistfast.models.packed_texts import Attention
from gistfast.models.pretrained import Pooling, load_sentence_transformer, pick_device
from gistfast.models.prompts import Role
from gistfast.store import GuideInfo

logger = logging.getLogger(__name__)

# A window holds so many characters for each token of the budget: about 16 batches.
WINDOW_CHARS_PER_TOKEN = 64


class Guide(Protocol):
    """Anything that turns texts into vectors and can be told from every other."""

    @property
    def info(self) -> GuideInfo:
        """What the vectors depend on."""

    def embed(self, texts: Sequence[str], role: Role, on_batch: OnBatch | None = None) -> Vectors:
        """The vectors (N, G) of the texts, in their order and of length 1."""


class ModelGuide:
    """A sentence-transformers model as a guide."""

    def __init__(
        self,
        model: SentenceTransformer,
        info: GuideInfo,
        *,
        tokens_per_batch: int | None = None,
        attention: Attention = "auto",
        respell: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        """Take a loaded model; `load_guide` loads and describes one.

        Args:
            model: In evaluation mode, on its device.
            info: From `describe_guide`.
            tokens_per_batch: Tokens of one forward pass; chosen for the device when None.
            attention: Whether texts are padded or stand in one row.
            respell: Called with the texts of a window before they are tokenised.

        Raises:
            ConfigError: When "unpadded" attention is asked for and cannot be had.
        """
        self._model = model
        self._info = info
        self._on_cpu = model.device.type == "cpu"
        self._tokens_per_batch = tokens_per_batch or (TOKENS_PER_CPU_BATCH if self._on_cpu else None)
        self._respell = respell
        self._padding = Padding.of(model)
        self._attention = attention
        self._to_be_tried = may_be_unpadded(model, self._padding, attention)

    @property
    def info(self) -> GuideInfo:
        """What the vectors depend on."""
        return self._info

    def embed(self, texts: Sequence[str], role: Role, on_batch: OnBatch | None = None) -> Vectors:
        """The vectors (N, G) of the texts, in their order, of length 1, fp32.

        Args:
            texts: N texts, without prompts.
            role: Whose prompt stands before each of them.
            on_batch: Called with each batch that is done.

        Raises:
            ConfigError: When "unpadded" attention is asked for and gives other vectors.
            ModelError: When a batch does not fit in the GPU's memory.
            VectorError: When a vector is zero or not finite; its text is named.
        """
        vectors = np.empty((len(texts), self._info.width), np.float32)

        def name_of(number: int) -> str:
            return f"guide {self._info.name}, text {shown(texts[number])}"

        with closing(self._embedded_batches(texts, role)) as batches:
            for batch, part in batches:
                advice = "remove the text, or try --dtype float32"
                vectors[batch.numbers] = unit_vectors(part, batch.numbers, name_of, advice)
                if on_batch is not None:
                    on_batch(BatchDone(len(part), batch.num_tokens, batch.num_padded))
        return vectors

    def _embedded_batches(self, texts: Sequence[str], role: Role) -> Generator[tuple[TokenBatch, Vectors], None, None]:
        """Every batch with its vectors, as they come from the model."""
        if not len(texts):
            return
        if self._to_be_tried:
            self._choose_padding(texts, role)
        budget = self._budget(texts, role)

        def tokenised(numbers: Any) -> TokenWindow:
            return self._tokenise(texts, numbers, role)

        def embedded(batch: TokenBatch) -> tuple[TokenBatch, Vectors]:
            try:
                return batch, self._forward(batch)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"guide {self._info.name}: a batch of {batch.num_padded:,} tokens does not fit in the GPU's "
                    "memory: give a smaller --tokens-per-batch, or --max-length"
                ) from error

        windows = cut_windows(texts, max(CHARS_PER_WINDOW, WINDOW_CHARS_PER_TOKEN * budget))
        num_forwards = torch.get_num_threads() if self._on_cpu else 1
        with ThreadPoolExecutor(1, "gistfast-tokenise") as tokenisers, _forward_threads(num_forwards) as forwards:
            ahead = run_ahead(tokenisers, tokenised, windows, num_ahead=1)
            batches = chain.from_iterable(window.batches(budget) for window in ahead)
            yield from run_ahead(forwards, embedded, batches, num_ahead=2 * num_forwards)

    def _tokenise(self, texts: Sequence[str], numbers: Any, role: Role) -> TokenWindow:
        window = [texts[number] for number in numbers]
        if self._respell is not None:
            window = self._respell(window)
        return tokenise(self._model, window, numbers, self._info.prompt_of(role), self._padding)

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch) -> Vectors:
        output = self._model(batch_to_device(dict(batch.features), self._model.device))
        # Models that say so in their settings keep only the first numbers of a vector.
        vectors: Vectors = output["sentence_embedding"][:, : self._info.width].float().cpu().numpy()
        return vectors

    def _choose_padding(self, texts: Sequence[str], role: Role) -> None:
        """Padding or one row, from what some of the first texts show."""
        tried = tried_texts(texts)
        window = self._tokenise(tried, np.arange(len(tried)), role)
        self._padding = choose_padding(self._model, window, self._forward, self._attention)
        self._to_be_tried = False

    def _budget(self, texts: Sequence[str], role: Role) -> int:
        """Tokens of a batch; on a GPU measured once, on the longest of the first texts that are enough for it."""
        if self._tokens_per_batch is None and self._padding is not None:
            numbers = cut_windows(texts, WINDOW_CHARS_PER_TOKEN * TOKENS_PER_GPU_BATCH)[0]
            self._tokens_per_batch = measure_budget(self._tokenise(texts, numbers, role), self._forward)
        return self._tokens_per_batch or TOKENS_PER_GPU_BATCH


@contextmanager
def _forward_threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which PyTorch computes with one thread."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, "gistfast-forward", initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        # Threads started later would otherwise be given one.
        torch.set_num_threads(before)


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
    attention: Attention = "auto",
    decode_with: str | None = None,
) -> ModelGuide:
    """A guide from a folder or hub id: sentence-transformers, or a plain transformers encoder with `pooling`.

    Args:
        name: Folder or hub id.
        pooling: How a plain encoder's tokens become one vector; else takes the place of the model's own.
        query_prompt: Stands before anchors; the model's own prompt when None, none when empty.
        document_prompt: Stands before positives and negatives, likewise.
        max_length: Tokens of a text that the guide sees; its own limit when None.
        dtype: Precision to compute in. "auto" is bfloat16 where the GPU or the processor multiplies it, else float32.
        revision: Branch, tag or commit of a hub id.
        device: "auto", "cpu", "cuda" or "cuda:N".
        trust_remote_code: Whether code that comes with the model may run.
        tokens_per_batch: Tokens of one forward pass, padding included. When None, 1,024 on a CPU, and on a GPU
            the fastest of a few that are tried on the first texts.
        attention: "padded" texts, or "unpadded" ones in one row; "auto" is one row on a GPU where that runs and gives
            the same vectors.
        decode_with: A student whose tokenizer cuts and respells each text first: a guide that lives in the
            training process is given the student's tokens, decoded.

    Raises:
        ModelError: When the guide or the student cannot be loaded.
        ConfigError: When there is no such device, or "unpadded" attention is asked for and cannot be had.
    """
    folder = model_folder(name, revision=revision, trust_remote_code=trust_remote_code)
    device = pick_device(device)
    model = load_sentence_transformer(
        folder,
        pooling=pooling,
        max_length=max_length,
        dtype=getattr(torch, choose_precision(dtype, device)),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    # What the model has: static embeddings know fp32 only.
    precision = precision_of(model)
    spelling = None if decode_with is None else StudentSpelling(decode_with, trust_remote_code)
    info = describe_guide(
        model,
        folder,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        compute_dtype=precision,
        decoded_with=None if spelling is None else spelling.name,
    )
    chosen = ", which it multiplies fastest" if dtype == "auto" and precision == "bfloat16" else ""
    logger.info("guide on %s in %s%s", device, precision, chosen)
    if precision != "float32":
        pool_in_float32(model)
    if can_pack(model):
        pack_linears(model)
    return ModelGuide(model, info, tokens_per_batch=tokens_per_batch, attention=attention, respell=spelling)
