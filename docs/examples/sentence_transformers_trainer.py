"""GISTLoss in sentence-transformers' own trainer, where GISTEmbedLoss was.

    pip install "gistfast[demo]"
    python docs/examples/sentence_transformers_trainer.py [FOLDER] [--cached] [--resume]

It runs offline, in about a minute on a laptop. Three things differ from a script with GISTEmbedLoss: the
guide embeds the texts once, before training; the datasets come from the guide store, which adds a `label`
column of text ids; and the loss is given the store instead of the guide. All else is what it was: batches
without duplicates, several datasets, hard negatives, Matryoshka dimensions, evaluation, checkpoints.
"""

import argparse
from pathlib import Path

from datasets import DatasetDict
from pyarrow import parquet
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from gistfast import CachedGISTLoss, GISTLoss, precompute
from gistfast.demo.data import wordnet_pairs
from gistfast.demo.models import demo_guide
from gistfast.students.student import load_student


def main(
    folder: Path, *, num_pairs: int = 512, max_steps: int = 20, cached: bool = False, resume: bool = False
) -> SentenceTransformerTrainer:
    """A trainer that has trained and saved a student: the guide's first layers, on words and definitions.

    Args:
        folder: Where pairs, store, checkpoints and student go.
        num_pairs: Pairs of WordNet to use.
        max_steps: Steps to train for.
        cached: Whether to take CachedGISTLoss, whose batch is not limited by memory.
        resume: Whether to go on from the last checkpoint of a run that was stopped.
    """
    pairs = folder / "pairs.parquet"
    parquet.write_table(parquet.read_table(wordnet_pairs()).slice(0, num_pairs), pairs)
    store = precompute(
        pairs, guide=demo_guide(), out=folder / "store", holdout=0.2, index="none", negatives=2, resume=True
    )

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
            save_strategy="steps",
            save_steps=0.5,
            report_to="none",
        ),
        # Pairs, and pairs with two mined negatives; one loss takes them all.
        train_dataset=DatasetDict(pairs=store.to_dataset("train"), mined=store.to_dataset("train", negatives=2)),
        eval_dataset=store.to_dataset("held_out"),
        loss=MatryoshkaLoss(student, loss, [384, 128, 32]),
    )
    trainer.train(resume_from_checkpoint=resume)
    student.save_pretrained(str(folder / "student"))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("example"))
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    main(options.folder, cached=options.cached, resume=options.resume)
