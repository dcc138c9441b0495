"""What stands between stores and a student: prompts, tokens, and the collators that make batches of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sentence_transformers import SentenceTransformer

from gistfast.errors import StoreError
from gistfast.models.prompts import own_prompt
from gistfast.store import GuideStore
from gistfast.students.input import InputForm, input_form, same_features
from gistfast.students.tokens import Tokens, student_tokens
from gistfast.training.collate import Collator
from gistfast.training.passes import Passes, WholePasses

logger = logging.getLogger(__name__)

# Tokens of a forward pass, padding included, and what a pass costs beside its tokens, in tokens: measured for a CPU
# (docs/benchmarks/step.md); for a GPU, which small passes leave idle, a guess.
_ON_CPU = Passes(budget=2048, overhead=24)
_ON_GPU = Passes(budget=65_536, overhead=2048)

# Texts whose stored tokens are compared with the student's own at the beginning of a run.
_NUM_CHECKED = 16


def set_prompts(
    model: SentenceTransformer, columns: Sequence[str], query: str | None, document: str | None
) -> dict[str, str]:
    """The prompt of each column that has one; the model keeps them for encode_query and encode_document."""
    own_query, own_document = own_prompt(model, "query"), own_prompt(model, "document")
    query = own_query if query is None else query
    document = own_document if document is None else document
    model.prompts.update(query=query, document=document)
    if query or document:
        logger.info("student's prompts: %r before anchors, %r before other texts", query, document)
    prompts = {column: query if column == "anchor" else document for column in columns}
    return {column: prompt for column, prompt in prompts.items() if prompt}


def feed(
    model: SentenceTransformer,
    stores: Sequence[GuideStore],
    prompts: Mapping[str, str],
    *,
    spare_folder: Path,
    tokens_per_forward: int | None = None,
    mined_negatives: int = 0,
    on_cpu: bool,
) -> tuple[InputForm, list[Collator]]:
    """What the student takes, and for each store the collator that makes batches of it.

    Tokens are made where there are none.

    Args:
        model: The student.
        stores: The guide stores.
        prompts: Of the columns that have one.
        spare_folder: Takes the tokens when a store's folder cannot be written.
        tokens_per_forward: Of a pass at most, padding included; chosen for the device when None.
        mined_negatives: To add to each row.
        on_cpu: Whether the student is on a CPU.

    Raises:
        ModelError: When the student takes more than tokens.
        StoreError: When there is no room for the tokens, or those found there are damaged.
    """
    of_columns = [[prompts.get(column, "") for column in store.columns] for store in stores]
    distinct = list(dict.fromkeys(prompt for of_column in of_columns for prompt in of_column))
    form = input_form(model, distinct)
    kinds = dict(zip(distinct, form.kind_of_prompt, strict=True))
    passes = _passes(form, tokens_per_forward, on_cpu)
    collators = []
    for store, of_column in zip(stores, of_columns, strict=True):
        own = list(dict.fromkeys(of_column))
        tokens = [_tokens(model, store, form, kinds[prompt], prompt, of_column, spare_folder) for prompt in own]
        which = [own.index(prompt) for prompt in of_column]
        collators.append(Collator(store, tokens, which, [kinds[prompt] for prompt in own], passes, mined_negatives))
    return form, collators


def _passes(form: InputForm, budget: int | None, on_cpu: bool) -> Passes:
    """How texts are cut into forward passes."""
    if form.padding == "none":
        logger.info("the student takes texts without padding: one forward pass for all of a batch")
        return WholePasses()
    passes = _ON_CPU if on_cpu else _ON_GPU
    if budget is not None:
        passes = replace(passes, budget=budget)
    logger.info("forward passes of up to %d tokens", passes.budget)
    return passes


def _tokens(
    model: SentenceTransformer,
    store: GuideStore,
    form: InputForm,
    kind: int,
    prompt: str,
    of_column: Sequence[str],
    spare_folder: Path,
) -> Tokens:
    """The tokens of a store's texts under one of the prompts of its columns, a few of them checked."""
    columns = [number for number, other in enumerate(of_column) if other == prompt]
    found = student_tokens(model, store, prompt, columns, spare_folder)
    some = store.rows_of(0)[:_NUM_CHECKED, columns[0]]
    texts = store.texts.take(some)
    if not same_features(model, form, kind, prompt, texts, found.gather(some), found.lengths(some)):
        raise StoreError(f"{found.path} does not hold the tokens that the student makes: delete that folder")
    return found
