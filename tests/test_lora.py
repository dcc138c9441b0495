import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from train_cases import ROWS, resumes_exactly, steps, train_small, weights

from gistfast.errors import ConfigError, DependencyError
from gistfast.models.folder import model_folder
from gistfast.models.pretrained import load_sentence_transformer
from gistfast.settings.stages import TrainSettings, build
from gistfast.students.lora import Lora, has_lora, merged
from gistfast.students.student import load_student

peft: Any = pytest.importorskip("peft")

TEXTS = ["a dog runs in the park", "rates"]


@pytest.fixture
def run(make_store: Callable[..., Any], tiny_student: Path, tmp_path: Path) -> Callable[..., Any]:
    """Training of an adapter with small settings."""
    return partial(
        train_small, store=make_store(ROWS).path, student=tiny_student, out=tmp_path / "student", lora_rank=4
    )


def adapted(folder: Path, **options: Any) -> SentenceTransformer:
    """A student whose adapter does something."""
    student = load_student(str(folder), lora=Lora(4, **options), device="cpu")
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    return student


def test_new_adapter_changes_nothing_and_is_all_that_trains(tiny_student: Path) -> None:
    plain, student = (load_student(str(tiny_student), lora=lora, device="cpu") for lora in (None, Lora(4)))
    torch.testing.assert_close(student.encode(TEXTS), plain.encode(TEXTS), rtol=0, atol=0)
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert has_lora(student)
    assert not has_lora(plain)


def test_head_behind_an_adapter_trains_too(tiny_student: Path) -> None:
    student = load_student(str(tiny_student), lora=Lora(4), width=8, device="cpu")
    assert student.head.linear.weight.requires_grad


def test_named_layers_alone_get_the_adapter(tiny_student: Path) -> None:
    student = load_student(str(tiny_student), lora=Lora(4, targets=("query", "value")), device="cpu")
    layers = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in student.named_parameters() if "lora_A" in name
    }
    assert layers == {"query", "value"}


def test_layers_that_are_not_there_are_refused(tiny_student: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lora-targets nope: Target modules .*nope.* not found"):
        load_student(str(tiny_student), lora=Lora(4, targets=("nope",)), device="cpu")


def test_alpha_is_twice_the_rank_unless_given(tiny_student: Path) -> None:
    for alpha, scale in ((None, 2.0), (4.0, 1.0)):
        student = adapted(tiny_student, alpha=alpha)
        query = student.transformers_model.encoder.layer[0].attention.self.query
        assert query.scaling["default"] == scale


def test_saved_within_merged_it_is_a_whole_model_that_computes_the_same(tiny_student: Path, tmp_path: Path) -> None:
    student = adapted(tiny_student)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    with merged(student):
        student.save(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(saved.encode(TEXTS), student.encode(TEXTS))
    assert weights(tmp_path / "saved").keys() == weights(tiny_student).keys()
    # What is trained on is not touched.
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())
    assert has_lora(student)


def test_trained_adapter_is_merged_into_the_weights_that_it_stands_beside(
    run: Callable[..., Any], tiny_student: Path
) -> None:
    report = run()
    before, after = weights(tiny_student), weights(report.path)
    for name, weight in before.items():
        # Nobody uses the pooler of BERT.
        same = weight.dim() < 2 or "embeddings" in name or "pooler" in name
        assert torch.equal(weight, after[name]) == same, name
    assert "LoRA of rank 4 on all linear layers" in (report.path / "README.md").read_text()


def test_adapter_is_a_model_to_gistfast(run: Callable[..., Any]) -> None:
    report = run()
    loaded = load_sentence_transformer(model_folder(str(report.path / "adapter")), pooling="mean", device="cpu")
    student = SentenceTransformer(str(report.path), device="cpu")
    torch.testing.assert_close(loaded.encode(TEXTS), student.encode(TEXTS))


@pytest.mark.parametrize("more", [{}, {"dim": 8, "lora_dropout": 0.2}], ids=["adapter", "adapter and head"])
def test_run_resumes_to_the_last_bit(more: dict[str, Any], run: Callable[..., Any], tmp_path: Path) -> None:
    undisturbed, resumed = resumes_exactly(run, tmp_path, **more)
    one, other = (load_file(report.path / "adapter" / "adapter_model.safetensors") for report in (undisturbed, resumed))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_activations_can_be_recomputed(run: Callable[..., Any], tmp_path: Path) -> None:
    kept, recomputed = (
        run(gradient_checkpointing=on, dropout=0.0, max_steps=3, out=tmp_path / str(on)) for on in (False, True)
    )
    for one, other in zip(steps(kept.path), steps(recomputed.path), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_checkpoint_is_a_model_too(run: Callable[..., Any]) -> None:
    report = run(save_steps=6)
    checkpoint = SentenceTransformer(str(report.path / "checkpoints" / "checkpoint-6"), device="cpu")
    student = SentenceTransformer(str(report.path), device="cpu")
    torch.testing.assert_close(checkpoint.encode(TEXTS), student.encode(TEXTS), rtol=0, atol=0)


def test_run_killed_before_its_last_file_is_only_saved_again(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(out=tmp_path / "undisturbed")

    def fail(*arguments: object) -> None:
        raise RuntimeError("the power went")

    monkeypatch.setattr("gistfast.stages.train.add_section", fail)
    with pytest.raises(RuntimeError, match="the power went"):
        run(save_steps=2)
    monkeypatch.undo()
    resumed = run(save_steps=2, resume=True)
    one, other = weights(undisturbed.path), weights(resumed.path)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_adapter_of_a_cut_student_is_not_left_alone(run: Callable[..., Any]) -> None:
    # Nobody else has the model that it fits to.
    report = run(keep_layers="0")
    assert not (report.path / "adapter").exists()


def test_rank_without_peft_says_what_to_install(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match=r"--lora-rank trains an adapter, .* `pip install gistfast\[lora\]`"):
        load_student(str(tiny_student), lora=Lora(4), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 8.0}, "do nothing without --lora-rank"),
        ({"lora_dropout": 0.1}, "do nothing without --lora-rank"),
        ({"lora_targets": "query"}, "do nothing without --lora-rank"),
        ({"lora_rank": 4, "freeze": "0"}, "leave --freeze out"),
        ({"learning_rates": "embeddings"}, "--learning-rates must look like embeddings=1e-6,head=1e-3"),
        ({"learning_rates": "(=1"}, "is no regular expression"),
        ({"learning_rates": {"head": "fast"}}, "head must have a finite rate of at least 0, found 'fast'"),
    ],
)
def test_options_that_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TrainSettings, {"store": "store", "student": "student", "out": "out", **options})
