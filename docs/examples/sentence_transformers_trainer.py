"""GISTLoss in sentence-transformers' own trainer, where GISTEmbedLoss was.

    pip install "gistfast[demo]"
    python docs/examples/sentence_transformers_trainer.py [FOLDER]

It runs offline, in under a minute on a laptop. Three things differ from a script with GISTEmbedLoss: the
guide embeds the texts once, before training; the dataset comes from the guide store, which adds a `label`
column of text ids; and the loss is given the store instead of the guide.
"""

import sys
from pathlib import Path

from pyarrow import parquet
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from gistfast import CachedGISTLoss, GISTLoss, precompute
from gistfast.demo.data import wordnet_pairs
from gistfast.demo.models import demo_guide
from gistfast.students.student import load_student


def main(
    folder: Path, *, num_pairs: int = 512, max_steps: int = 20, cached: bool = False
) -> SentenceTransformerTrainer:
    """A trainer that has trained and saved a student: the guide's first layers, on words and definitions.

    Args:
        folder: Where pairs, store, checkpoints and student go.
        num_pairs: Pairs of WordNet to use.
        max_steps: Steps to train for.
        cached: Whether to take CachedGISTLoss, whose batch is not limited by memory.
    """
    pairs = folder / "pairs.parquet"
    parquet.write_table(parquet.read_table(wordnet_pairs()).slice(0, num_pairs), pairs)
    store = precompute(pairs, guide=demo_guide(), out=folder / "store", holdout=0.2, index="none", resume=True)

    student = load_student(str(demo_guide()), keep_layers=(0, 1, 2))
    loss = CachedGISTLoss(student, store, mini_batch_size=16) if cached else GISTLoss(student, store)
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder / "checkpoints"),
            per_device_train_batch_size=64 if cached else 32,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            learning_rate=1e-4,
            max_steps=max_steps,
            # Shares of the run.
            logging_steps=0.25,
            eval_strategy="steps",
            eval_steps=0.5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=store.to_dataset("train"),
        eval_dataset=store.to_dataset("held_out"),
        loss=loss,
    )
    trainer.train()
    student.save_pretrained(str(folder / "student"))
    return trainer


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
    out.mkdir(parents=True, exist_ok=True)
    main(out)
