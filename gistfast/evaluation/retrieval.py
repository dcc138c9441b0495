"""Retrieval as a measure: what is to be found, and how well a model finds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.model import BaseModel
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from gistfast.errors import ConfigError
from gistfast.evaluation.widths import AT, AtWidths
from gistfast.store import GuideStore

RECALL_AT = (1, 10, 100)
# Stands before the names of the scores on held-out rows in the log of a run.
HELD_OUT = "held_out"
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


def held_out_evaluator(
    stores: Mapping[str, GuideStore], *, batch_size: int, widths: Sequence[int] = ()
) -> BaseEvaluator:
    """The evaluator of the stores' held-out rows; of several each that has any on its own.

    Args:
        stores: By name.
        batch_size: Texts embedded at once.
        widths: To cut the vectors to, beside whole ones.

    Raises:
        ConfigError: When no rows were held out.
    """
    if len(stores) == 1:
        (store,) = stores.values()
        whole = retrieval_evaluator(held_out_retrieval(store), batch_size=batch_size, name=HELD_OUT)
        return AtWidths(whole, widths) if widths else whole
    tasks = {name: held_out_retrieval(store) for name, store in stores.items() if store.held_out.any()}
    evaluators: dict[str, BaseEvaluator] = {
        name: retrieval_evaluator(task, batch_size=batch_size, name=f"{HELD_OUT}/{name}")
        for name, task in tasks.items()
    }
    if widths:
        evaluators = {name: AtWidths(whole, widths) for name, whole in evaluators.items()}
    return MeanOfStores(evaluators)


class MeanOfStores(BaseEvaluator):
    """Evaluates several stores one after the other.

    Each score is the mean of the stores', whatever their sizes; that of a store has "/NAME" behind its name. Of cut
    vectors there is the mean alone.
    """

    def __init__(self, evaluators: Mapping[str, BaseEvaluator]) -> None:
        """Take the evaluator of each store, called `HELD_OUT/NAME`."""
        super().__init__()  # type: ignore[no-untyped-call]  # theirs is untyped
        self.evaluators = evaluators

    def __call__(
        self, model: BaseModel, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The scores by their names."""
        means: dict[str, float] = {}
        found: dict[str, float] = {}
        for name, evaluator in self.evaluators.items():
            scores = cast(dict[str, float], evaluator(model, output_path, epoch, steps))
            for own, value in scores.items():
                score = HELD_OUT + own.removeprefix(f"{HELD_OUT}/{name}")
                means[score] = means.get(score, 0.0) + value / len(self.evaluators)
                if AT not in score:
                    found[f"{score}/{name}"] = value
        return means | found


def retrieval_scores(model: SentenceTransformer, evaluator: InformationRetrievalEvaluator) -> dict[str, float]:
    """The `MEASURES` of the model by its own similarity, in [0, 1]."""
    scores = evaluator(model)
    return {name: float(scores[f"{model.similarity_fn_name}_{name}"]) for name in MEASURES}


def _texts(store: GuideStore, ids: np.ndarray[Any, Any]) -> dict[str, str]:
    return dict(zip(map(str, ids.tolist()), store.texts.take(ids), strict=True))
