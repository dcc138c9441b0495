"""Retrieval as a measure: what is to be found, and how well a model finds it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from gistfast.errors import ConfigError
from gistfast.store import GuideStore

RECALL_AT = (1, 10, 100)
MEASURES = ("ndcg@10", "mrr@10", *(f"recall@{k}" for k in RECALL_AT))


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, documents, and which belong together.

    Attributes:
        source: Where they come from, in a few words.
        queries: Text by query id; each has a relevant document.
        documents: Text by document id.
        relevant: Ids of the relevant documents by query id.
    """

    source: str
    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, set[str]]


def held_out_retrieval(store: GuideStore) -> RetrievalTask:
    """The task of the store's held-out rows: each anchor is to find its positives.

    The documents are the distinct positives and negatives of the held-out rows. An anchor with several
    held-out positives is one query, and all of them are relevant.

    Raises:
        ConfigError: When no rows were held out.
    """
    rows = np.asarray(store.rows[store.held_out])
    if len(rows) == 0:
        raise ConfigError(f"{store.path} has no held-out rows: make the store with --holdout 0.05, or give --queries")
    ids = store.identity(torch.from_numpy(rows)).numpy()
    relevant: dict[str, set[str]] = {}
    for anchor, positive in ids[:, :2].tolist():
        relevant.setdefault(str(anchor), set()).add(str(positive))
    return RetrievalTask(
        source=f"{store.path.name}, held-out rows",
        queries=_texts(store, np.unique(ids[:, 0])),
        documents=_texts(store, np.unique(ids[:, 1:])),
        relevant=relevant,
    )


def retrieval_evaluator(
    task: RetrievalTask,
    *,
    batch_size: int,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    name: str = "",
    show_progress: bool = False,
) -> InformationRetrievalEvaluator:
    """Sentence-transformers' evaluator of the task, with nDCG@10, MRR@10 and recall@1, @10 and @100.

    Args:
        task: What is to be found.
        batch_size: Texts embedded at once.
        query_prompt: Put before each query; the model's own when None.
        document_prompt: Put before each document; the model's own when None.
        name: Stands before the names of the scores.
        show_progress: Whether to draw bars.
    """
    return InformationRetrievalEvaluator(
        dict[str, Any](task.queries),
        dict[str, Any](task.documents),
        task.relevant,
        ndcg_at_k=[10],
        mrr_at_k=[10],
        precision_recall_at_k=list(RECALL_AT),
        accuracy_at_k=[1],
        map_at_k=[100],
        batch_size=batch_size,
        query_prompt=query_prompt,
        corpus_prompt=document_prompt,
        name=name,
        show_progress_bar=show_progress,
        write_csv=False,
    )


def retrieval_scores(model: SentenceTransformer, evaluator: InformationRetrievalEvaluator) -> dict[str, float]:
    """The `MEASURES` of the model by its own similarity, in [0, 1]."""
    scores = evaluator(model)
    return {name: float(scores[f"{model.similarity_fn_name}_{name}"]) for name in MEASURES}


def _texts(store: GuideStore, ids: np.ndarray[Any, Any]) -> dict[str, str]:
    return dict(zip(map(str, ids.tolist()), store.texts.take(ids), strict=True))
