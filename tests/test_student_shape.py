import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from train_cases import ROWS, resumes_exactly, same_weights, train_small, weights

from gistfast.errors import ConfigError, ModelError
from gistfast.settings.stages import TrainSettings, build
from gistfast.students.layers import freeze_parts
from gistfast.students.student import load_student
from gistfast.training.ranks import Ranks
from gistfast.training.run_folder import RunFolder
from gistfast.training.setup import make_trainer

TEXTS = ["a dog runs in the park", "rates"]


def lengths(model: SentenceTransformer) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.from_numpy(model.encode(TEXTS)), dim=1)


@pytest.fixture
def run(make_store: Callable[..., Any], tiny_student: Path, tmp_path: Path) -> Callable[..., Any]:
    """Training with small settings."""
    return partial(train_small, store=make_store(ROWS).path, student=tiny_student, out=tmp_path / "student")


# A head.


def test_head_sets_the_width_and_is_saved(tiny_student: Path, tmp_path: Path) -> None:
    student = load_student(str(tiny_student), width=8, device="cpu")
    assert student.encode(TEXTS).shape == (2, 8)
    student.save(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(saved.encode(TEXTS), student.encode(TEXTS))


def test_head_stands_before_the_normalisation(guide_folder: Path) -> None:
    student = load_student(str(guide_folder), width=16, device="cpu")
    torch.testing.assert_close(lengths(student), torch.ones(2))


def test_seed_decides_the_head(tiny_student: Path) -> None:
    one, same, other = (load_student(str(tiny_student), width=8, seed=seed, device="cpu") for seed in (1, 1, 2))
    assert torch.equal(one.head.linear.weight, same.head.linear.weight)
    assert not torch.equal(one.head.linear.weight, other.head.linear.weight)


def test_loading_leaves_the_random_numbers_alone(tiny_student: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_student(str(tiny_student), width=8, device="cpu")
    assert torch.equal(torch.rand(1), expected)


def test_second_head_gets_a_name_of_its_own(tiny_student: Path, tmp_path: Path) -> None:
    load_student(str(tiny_student), width=8, device="cpu").save(str(tmp_path / "narrow"))
    student = load_student(str(tmp_path / "narrow"), width=4, device="cpu")
    assert student.encode(TEXTS).shape == (2, 4)


def test_head_of_the_students_own_width_is_refused(tiny_student: Path) -> None:
    with pytest.raises(ConfigError, match="--dim is 32, and the student's vectors are 32 wide already"):
        load_student(str(tiny_student), width=32, device="cpu")


def test_head_is_trained_and_resumed_to_the_last_bit(run: Callable[..., Any], tmp_path: Path) -> None:
    report, _ = resumes_exactly(run, tmp_path, dim=8)
    trained = next(weight for name, weight in weights(report.path).items() if name.endswith("linear.weight"))
    began = load_student(str(run.keywords["student"]), width=8, seed=42, device="cpu")  # type: ignore[attr-defined]
    assert not torch.equal(trained, began.head.linear.weight)
    assert "with a head to 8 dimensions" in (report.path / "README.md").read_text()


# Normalisation.


@pytest.mark.parametrize(
    ("own", "asked", "ones"), [(0, None, 0), (0, True, 1), (1, None, 1), (1, False, 0), (1, True, 1)]
)
def test_vectors_have_length_one_as_asked_or_as_they_had(
    own: bool, asked: bool | None, ones: bool, tiny_student: Path, tmp_path: Path
) -> None:
    load_student(str(tiny_student), normalize=bool(own), device="cpu").save(str(tmp_path / "own"))
    student = load_student(str(tmp_path / "own"), normalize=asked, device="cpu")
    assert torch.allclose(lengths(student), torch.ones(2)) == bool(ones)
    assert sum(type(module).__name__ == "Normalize" for module in student) == ones


# Freezing.


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (["embeddings"], ("embeddings.",)),
        (["0", "5"], ("encoder.layer.0.", "encoder.layer.5.")),
        (["embeddings", "1"], ("embeddings.", "encoder.layer.1.")),
    ],
    ids=lambda value: ",".join(value),
)
def test_frozen_parts_and_no_others_take_no_gradient(
    parts: list[str], prefixes: tuple[str, ...], guide_folder: Path
) -> None:
    student = load_student(str(guide_folder), freeze=parts, device="cpu")
    for name, weight in student.transformers_model.named_parameters():
        assert weight.requires_grad != name.startswith(prefixes), name


def test_training_leaves_frozen_weights_as_they_are(run: Callable[..., Any], tiny_student: Path) -> None:
    report = run(freeze="embeddings")
    before, after = weights(tiny_student), weights(report.path)
    for name, weight in before.items():
        # Nobody uses the pooler of BERT.
        assert torch.equal(weight, after[name]) == ("embeddings" in name or "pooler" in name), name
    assert "frozen: embeddings" in (report.path / "README.md").read_text()


@pytest.mark.parametrize("part", ["pooler", "6", "-1", "0.5"])
def test_part_that_is_not_there_is_refused(part: str, guide_folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"--freeze knows embeddings and the student's layers, 0 to 5; found {part}"):
        load_student(str(guide_folder), freeze=["0", part], device="cpu")


def test_freezing_all_that_moves_the_vectors_is_refused(tiny_student: Path) -> None:
    # Its pooler is left, whose output no pooling of tokens asks for.
    with pytest.raises(ConfigError, match="--freeze embeddings,0 leaves nothing to train: freeze less"):
        load_student(str(tiny_student), freeze=["embeddings", "0"], device="cpu")
    student = load_student(str(tiny_student), freeze=["embeddings", "0"], width=8, device="cpu")
    assert [name for name, weight in student[-1].named_parameters() if weight.requires_grad] == ["linear.weight"]


def test_head_on_a_frozen_student_trains_without_padding(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "gistfast"):
        run(freeze="embeddings,0", dim=8)
    assert "unpadded attention, text by text" in caplog.text


def test_layers_are_counted_after_the_cut(guide_folder: Path) -> None:
    with pytest.raises(ConfigError, match="0 to 1; found 2"):
        load_student(str(guide_folder), keep_layers=[0, 5], freeze=["2"], device="cpu")


def test_student_without_layers_cannot_be_frozen() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    with pytest.raises(ModelError, match="no transformer layers"):
        freeze_parts(model, ["0"])


# Learning rates.


def test_weights_of_a_rate_of_zero_do_not_move(run: Callable[..., Any], tiny_student: Path) -> None:
    report = run(learning_rates=r"embeddings=0,encoder\.layer=1e-2")
    before, after = weights(tiny_student), weights(report.path)
    still = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert still == {name for name in before if "embeddings" in name or "pooler" in name}
    assert not same_weights(report.path, run(out=report.path.parent / "one-rate").path)


def test_expression_that_finds_nothing_is_refused_before_anything_is_written(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'head' finds none of the weights that are trained, such as model"):
        run(learning_rates={"head": 1e-3})
    assert not (tmp_path / "student").exists()


def test_settings_of_the_shape_stand_in_the_record(run: Callable[..., Any]) -> None:
    report = run(dim=8, normalize=True, freeze="embeddings", learning_rates="head=0.01", max_steps=1)
    kept = json.loads((report.path / "gistfast.json").read_text())["settings"]
    assert (kept["dim"], kept["normalize"], kept["freeze"]) == (8, True, ["embeddings"])
    assert kept["learning_rates"] == {"head": 0.01}


def test_optimizer_is_fused_adamw_whatever_the_rates(tiny_student: Path, make_store: Any, tmp_path: Path) -> None:
    options = {"store": "store", "student": "student", "out": tmp_path / "out", "device": "cpu"}
    settings = build(TrainSettings, {**options, "learning_rates": {"embeddings": 1e-6}})
    student = load_student(str(tiny_student), device="cpu")
    trainer = make_trainer(student, {"store": make_store(ROWS)}, settings, RunFolder(tmp_path / "out"), [], Ranks())
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-6, settings.learning_rate}
    assert all(group["fused"] for group in optimizer.param_groups)
