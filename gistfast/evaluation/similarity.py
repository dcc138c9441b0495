"""Similarity of sentences as a measure: how a model's cosines follow the scores that people gave."""

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from gistfast.evaluation.judged import ScoredPairs
from gistfast.evaluation.report import SPEARMAN

# Stands before the names of the correlations in the log of a run.
STS = "sts"


def similarity_evaluator(
    pairs: ScoredPairs, *, batch_size: int, name: str = "", show_progress: bool = False
) -> EmbeddingSimilarityEvaluator:
    """Sentence-transformers' evaluator of the pairs by cosines, with Spearman's and Pearson's correlation.

    Args:
        pairs: The pairs and their scores.
        batch_size: Texts embedded at once.
        name: Stands before the names of the scores.
        show_progress: Whether to draw bars.
    """
    return EmbeddingSimilarityEvaluator(
        pairs.sentences1,
        pairs.sentences2,
        pairs.scores,
        main_similarity="cosine",
        batch_size=batch_size,
        name=name,
        show_progress_bar=show_progress,
        write_csv=False,
    )


def spearman(model: SentenceTransformer, evaluator: EmbeddingSimilarityEvaluator) -> float:
    """Spearman's correlation of the model, in [-1, 1]."""
    return float(evaluator(model)[SPEARMAN])
