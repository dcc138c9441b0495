"""The scripts of docs/examples, with less data and fewer steps."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def example(name: str) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Runs the example of the trainer in one folder: the second run finds the store of the first."""
    folder = tmp_path_factory.mktemp("example")
    main = example("sentence_transformers_trainer").main

    def run(**options: Any) -> tuple[Any, Path]:
        return main(folder, num_pairs=48, max_steps=2, **options), folder / "student"

    return run


# The script leaves the trainer's default, which says on a machine without a GPU that it has none.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("cached", [False, True])
def test_example_trains_evaluates_saves_and_resumes_a_student(
    run: Callable[..., tuple[Any, Path]], cached: bool
) -> None:
    trainer, folder = run(cached=cached)
    assert type(trainer.loss.loss).__name__ == ("CachedGISTLoss" if cached else "GISTLoss")
    assert {name: rows.column_names for name, rows in trainer.train_dataset.items()} == {
        "pairs": ["anchor", "positive", "label"],
        "mined": ["anchor", "positive", "negative_1", "negative_2", "label"],
    }
    losses, held_out = logged(trainer, "loss"), logged(trainer, "eval_loss")
    assert len(losses) == len(held_out) == 2
    assert all(loss > 0 for loss in losses + held_out)
    vectors = SentenceTransformer(str(folder), device="cpu").encode(["car", "automobile"], convert_to_tensor=True)
    assert vectors.shape == (2, 384)
    assert torch.cosine_similarity(*vectors, dim=0) > 0.5
    # As if it had been stopped after the first step.
    shutil.rmtree(folder.parent / "checkpoints" / "checkpoint-2")
    resumed, _ = run(cached=cached, resume=True)
    assert logged(resumed, "loss") == losses
    assert logged(resumed, "eval_loss") == held_out


def logged(trainer: Any, name: str) -> list[float]:
    """The values of a name in the trainer's log."""
    return [float(record[name]) for record in trainer.state.log_history if name in record]
