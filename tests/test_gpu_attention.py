"""Texts in one row of students and guides, and a compiled student, on a card: `pytest tests/test_gpu_attention.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import ENCODERS, TEXTS, forms, make_encoder, make_student
from train_cases import steps, train_small
from transformers import AutoTokenizer

from gistfast import gpu_check
from gistfast.guides.batch_done import BatchDone
from gistfast.guides.guide import load_guide
from gistfast.models.packed_attention import varlen_missing
from gistfast.training.attention import _difference
from gistfast.training.passes import PackedPasses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What compilers and drivers remark is not the test's affair.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a store and a student."""
    folder = tmp_path_factory.mktemp("card")
    gpu_check.make_store(folder / "store")
    gpu_check.make_student(folder / "student")
    return folder


@pytest.fixture
def needs_varlen() -> None:
    """Skips, with the reason, where there is no variable-length attention."""
    missing = varlen_missing(torch.device("cuda"))
    if missing is not None:
        pytest.skip(missing)


@pytest.mark.usefixtures("needs_varlen")
@pytest.mark.parametrize("name", ENCODERS)
def test_packed_passes_are_no_worse_than_padded_ones(name: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    student = make_student(name, tmp_path, tokenizer, "mean", ENCODERS[name], "cuda")
    (form, padded), (packed, _) = forms(student, TEXTS)
    assert _difference(student, form, packed, padded.to("cuda"), PackedPasses(40), bf16=True) is None


@pytest.mark.usefixtures("needs_varlen")
@pytest.mark.parametrize("name", ENCODERS)
def test_guide_has_the_vectors_of_padded_texts(name: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    encoder = make_encoder(name, tmp_path, tokenizer, **ENCODERS[name])
    pooling: Any = "last" if name in ("Qwen3", "Mistral") else "mean"
    # More than a budget can be measured on.
    texts = [f"{text} {number}" for number in range(2000) for text in TEXTS]
    vectors, done = {}, {}
    for attention in ("padded", "unpadded", "auto"):
        batches: list[BatchDone] = []
        guide = load_guide(
            str(encoder),
            pooling=pooling,
            max_length=32,
            dtype="bfloat16",
            device="cuda",
            attention=attention,  # type: ignore[arg-type]
        )
        vectors[attention] = guide.embed(texts, "query", batches.append)
        done[attention] = sum(batch.num_padded for batch in batches) / sum(batch.num_tokens for batch in batches)
    assert done["padded"] > done["unpadded"] == done["auto"] == 1
    np.testing.assert_allclose(vectors["unpadded"], vectors["padded"], atol=0.05)
    assert np.abs(vectors["unpadded"] - vectors["padded"]).mean() < 0.005
    np.testing.assert_allclose(vectors["auto"], vectors["unpadded"], atol=0.05)


def losses(folder: Path, out: Path, **options: Any) -> list[float]:
    run = {"student": folder / "student", "batch_size": 64, "learning_rate": 1e-4, "dropout": 0.0, "bf16": True}
    report = train_small(store=folder / "store", out=out, device="cuda", **run | options)
    return [record["loss"] for record in steps(report.path)]


@pytest.mark.usefixtures("needs_varlen")
@pytest.mark.parametrize("options", [{}, {"cached": True, "gradient_checkpointing": True}], ids=str)
def test_unpadded_run_has_the_losses_of_a_padded_one(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    padded = losses(folder, tmp_path / "padded", attention="padded", **options)
    assert losses(folder, tmp_path / "unpadded", attention="unpadded", **options) == pytest.approx(padded, rel=0.05)


@pytest.mark.parametrize("options", [{}, {"cached": True, "gradient_checkpointing": True}], ids=str)
def test_compiled_run_has_the_losses_of_one_that_is_not(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    padded = losses(folder, tmp_path / "padded", attention="padded", **options)
    assert losses(folder, tmp_path / "compiled", compile=True, **options) == pytest.approx(padded, rel=0.05)
