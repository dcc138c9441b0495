"""What stands between a store and a student: prompts, tokens, and the collator that makes batches of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sentence_transformers import SentenceTransformer

from gistfast.errors import StoreError
from gistfast.models.prompts import own_prompt
from gistfast.store import GuideStore
from gistfast.students.input import InputForm, input_form, same_features
from gistfast.students.tokens import student_tokens
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
    store: GuideStore,
    prompts: Mapping[str, str],
    *,
    spare_folder: Path,
    tokens_per_forward: int | None = None,
    mined_negatives: int = 0,
    on_cpu: bool,
) -> tuple[InputForm, Collator]:
    """What the student takes, and the collator that makes batches of it; tokens are made where there are none.

    Args:
        model: The student.
        store: The guide store.
        prompts: Of the columns that have one.
        spare_folder: Takes the tokens when the store's folder cannot be written.
        tokens_per_forward: Of a pass at most, padding included; chosen for the device when None.
        mined_negatives: To add to each row.
        on_cpu: Whether the student is on a CPU.

    Raises:
        ModelError: When the student takes more than tokens.
        StoreError: When there is no room for the tokens, or those found there are damaged.
    """
    of_column = [prompts.get(column, "") for column in store.columns]
    distinct = list(dict.fromkeys(of_column))
    form = input_form(model, distinct)
    tokens = []
    for prompt, kind in zip(distinct, form.kind_of_prompt, strict=True):
        columns = [number for number, other in enumerate(of_column) if other == prompt]
        found = student_tokens(model, store, prompt, columns, spare_folder)
        some = store.rows_of(0)[:_NUM_CHECKED, columns[0]]
        texts = store.texts.take(some)
        if not same_features(model, form, kind, prompt, texts, found.gather(some), found.lengths(some)):
            raise StoreError(f"{found.path} does not hold the tokens that the student makes: delete that folder")
        tokens.append(found)
    passes: Passes = _ON_CPU if on_cpu else _ON_GPU
    if tokens_per_forward is not None:
        passes = replace(passes, budget=tokens_per_forward)
    if form.padding == "none":
        logger.info("the student takes texts without padding: one forward pass for all of a batch")
        passes = WholePasses()
    else:
        logger.info("forward passes of up to %d tokens", passes.budget)
    which = [distinct.index(prompt) for prompt in of_column]
    return form, Collator(store, tokens, which, form.kind_of_prompt, passes, mined_negatives)
