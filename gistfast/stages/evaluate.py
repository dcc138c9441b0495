"""Stage 3: what a model is worth, in retrieval, in similarity of sentences, and in MTEB's tasks."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from gistfast.errors import ConfigError, DataError, DependencyError, first_line
from gistfast.evaluation.judged import read_retrieval, read_scored_pairs
from gistfast.evaluation.retrieval import RetrievalTask, held_out_retrieval, retrieval_evaluator, retrieval_scores
from gistfast.evaluation.similarity import similarity_evaluator, spearman
from gistfast.models.folder import model_folder
from gistfast.models.pretrained import load_sentence_transformer, pick_device
from gistfast.progress import console
from gistfast.settings.stages import EvaluateSettings, build
from gistfast.store import GuideStore
from gistfast.store.files import write_json

logger = logging.getLogger(__name__)


def evaluate(model: str | Path, **options: Any) -> dict[str, Any]:
    """The scores of a model, on whatever the options name.

    Args:
        model: A folder or a hub id.
        **options: Fields of `EvaluateSettings`.

    Returns:
        What `out` receives as JSON: "model", and for what was asked for "truncate_dim", "retrieval" (source,
        queries, documents, ndcg@10, mrr@10, recall@1, @10, @100), "sts" (source, pairs, spearman) and "mteb"
        (main score by task). Scores are in [0, 1], correlations in [-1, 1].

    Raises:
        ConfigError: When a setting is bad, the store has no held-out rows, or there is no such task.
        DataError: When a file cannot be read.
        DependencyError: When tasks are asked for and mteb is not installed.
        ModelError: When the model does not load.
        StoreError: When the store does not open, or the results cannot be written.
    """
    settings = build(EvaluateSettings, {"model": model, **options})
    # What can be refused is refused before the model takes its time.
    task = _retrieval_task(settings)
    pairs = None if settings.sts is None else read_scored_pairs(settings.sts)
    tasks = _mteb_tasks(settings.tasks) if settings.tasks else []
    loaded = load_sentence_transformer(
        model_folder(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code),
        device=pick_device(settings.device),
        trust_remote_code=settings.trust_remote_code,
    )
    results: dict[str, Any] = {"model": settings.model}
    if settings.truncate_dim is not None:
        _cut(loaded, settings.truncate_dim)
        results["truncate_dim"] = settings.truncate_dim
    if task is not None:
        results["retrieval"] = _retrieval(loaded, task, settings)
    if pairs is not None:
        by_cosine = similarity_evaluator(pairs, batch_size=settings.batch_size, show_progress=console.is_terminal)
        counts = {"source": pairs.source, "pairs": len(pairs.scores)}
        results["sts"] = counts | {"spearman": spearman(loaded, by_cosine)}
    if tasks:
        results["mteb"] = _mteb_scores(loaded, tasks, settings.batch_size)
    if settings.out is not None:
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(settings.out), results)
        logger.info("wrote %s", settings.out)
    return results


def _cut(model: SentenceTransformer, width: int) -> None:
    """Let the model give the first numbers of its vectors alone.

    Raises:
        ConfigError: When it gives no more than that.
    """
    own = model.get_embedding_dimension()
    if own is not None and width >= own:
        raise ConfigError(f"--truncate-dim {width}: the model's vectors are {own} wide: give less, or leave it out")
    model.truncate_dim = width


def _retrieval_task(settings: EvaluateSettings) -> RetrievalTask | None:
    if settings.store is not None:
        return held_out_retrieval(GuideStore.open(settings.store))
    if settings.queries is None or settings.corpus is None or settings.qrels is None:
        return None
    return read_retrieval(settings.queries, settings.corpus, settings.qrels)


def _retrieval(model: SentenceTransformer, task: RetrievalTask, settings: EvaluateSettings) -> dict[str, Any]:
    evaluator = retrieval_evaluator(
        task,
        batch_size=settings.batch_size,
        query_prompt=settings.query_prompt,
        document_prompt=settings.document_prompt,
        show_progress=console.is_terminal,
    )
    counts = {"source": task.source, "queries": len(task.queries), "documents": len(task.documents)}
    return counts | retrieval_scores(model, evaluator)


def _mteb_tasks(names: Sequence[str]) -> list[Any]:
    try:
        import mteb
    except ImportError:
        raise DependencyError("--tasks needs mteb: run `pip install gistfast[mteb]`") from None
    try:
        return list(mteb.get_tasks(tasks=list(names)))
    except KeyError as error:
        raise ConfigError(f"--tasks {','.join(names)}: mteb has no such task: {error.args[0]}") from None


def _mteb_scores(model: SentenceTransformer, tasks: Sequence[Any], batch_size: int) -> dict[str, float]:
    import mteb

    try:
        # Without mteb's cache: it goes by the model's name, and folders of one name hold many models.
        results = mteb.evaluate(
            model,
            tasks,
            cache=None,
            encode_kwargs={"batch_size": batch_size},
            show_progress_bar=console.is_terminal,
        )
    except OSError as error:
        raise DataError(f"the data of an MTEB task cannot be fetched: {first_line(error)}: try again") from error
    return {result.task_name: float(result.get_score()) for result in results.task_results}
