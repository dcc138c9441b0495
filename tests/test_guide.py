import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import AutoTokenizer

from gistfast.demo import models
from gistfast.errors import ConfigError, DependencyError, VectorError
from gistfast.guide import ModelGuide, StudentSpelling, load_guide, token_batches

# One word, one line, a repetition, other letters, and more than any limit.
TEXTS = [
    "river",
    "A large natural stream of water, larger than a creek; the river was navigable for miles.",
    "Größe 大きさ",
    "river",
    "to be or not to be " * 80,
    "a bowed stringed instrument",
    "food made from dough of flour and water, usually raised and baked",
]


@pytest.fixture(scope="module")
def guide(guide_folder: Path) -> ModelGuide:
    return load_guide(str(guide_folder))


@pytest.fixture(scope="module")
def peer(guide_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(guide_folder), device="cpu")


def save(model: SentenceTransformer, folder: Path) -> str:
    model.save(str(folder))
    return str(folder)


def test_vectors_are_those_of_encode_in_the_order_given(guide: ModelGuide, peer: SentenceTransformer) -> None:
    vectors = guide.embed(TEXTS, "query")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, peer.encode(TEXTS), atol=2e-6)


def test_vectors_have_length_one_without_a_normalising_module(tiny_student: Path) -> None:
    vectors = load_guide(str(tiny_student)).embed(TEXTS, "query")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 100_000])
def test_vectors_do_not_depend_on_the_batch(
    tiny_student: Path, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_guide(str(tiny_student)).embed(TEXTS, "query")
    monkeypatch.setattr("gistfast.guide.WINDOW", 3)
    vectors = load_guide(str(tiny_student), tokens_per_batch=tokens_per_batch).embed(TEXTS, "query")
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_every_text_is_reported_as_done(tiny_student: Path) -> None:
    done: list[int] = []
    load_guide(str(tiny_student), tokens_per_batch=40).embed(TEXTS, "document", done.append)
    assert len(done) > 1
    assert sum(done) == len(TEXTS)


def test_no_texts_give_no_vectors(guide: ModelGuide) -> None:
    assert guide.embed([], "query").shape == (0, 384)


def test_prompts_stand_before_the_texts_of_their_role(tiny_student: Path) -> None:
    guide = load_guide(str(tiny_student), query_prompt="query: ", document_prompt="passage: ")
    peer = load_guide(str(tiny_student))
    for role, prompt in (("query", "query: "), ("document", "passage: ")):
        vectors = guide.embed(TEXTS, role)  # type: ignore[arg-type]
        np.testing.assert_allclose(vectors, peer.embed([prompt + text for text in TEXTS], "query"), atol=2e-6)


def test_prompt_can_be_left_out_of_the_pooling(tiny_student: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    model.set_pooling_include_prompt(False)
    guide = load_guide(save(model, tmp_path / "excluding"), query_prompt="a long prompt: ")
    expected = model.encode(TEXTS, prompt="a long prompt: ", normalize_embeddings=True)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), expected, atol=2e-6)


@pytest.mark.parametrize("pooling", ["cls", "last", "max", "mean"])
def test_poolings_match_sentence_transformers(tiny_student: Path, pooling: Any) -> None:
    guide = load_guide(str(tiny_student.parent / "encoder"), pooling=pooling)
    encoder = modules.Transformer(str(tiny_student.parent / "encoder"))
    pool = modules.Pooling(32, "lasttoken" if pooling == "last" else pooling)
    peer = SentenceTransformer(modules=[encoder, pool], device="cpu")
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), peer.encode(TEXTS, normalize_embeddings=True), atol=2e-6)


def test_left_padded_model_matches_sentence_transformers(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student.parent / "encoder", tmp_path / "decoder"))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.save_pretrained(folder)
    left = load_guide(str(folder), pooling="last", tokens_per_batch=60).embed(TEXTS, "query")
    encoder = modules.Transformer(str(folder))
    peer = SentenceTransformer(modules=[encoder, modules.Pooling(32, "lasttoken")], device="cpu")
    assert peer.preprocess(["a", "a longer text"])["attention_mask"][0, 0] == 0
    one_by_one = [peer.encode(text, normalize_embeddings=True) for text in TEXTS]
    assert left.shape == (len(TEXTS), 32)
    # BERT numbers its positions from the padding on, so only the longest of a batch equals the text alone.
    np.testing.assert_allclose(left[4], one_by_one[4], atol=2e-6)


def test_settings_that_cut_vectors_short_hold(tiny_student: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu", truncate_dim=8)
    guide = load_guide(save(model, tmp_path / "short"))
    assert guide.info.width == 8
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), model.encode(TEXTS, normalize_embeddings=True), atol=2e-6)


def test_bfloat16_moves_scores_by_less_than_a_hundredth(guide_folder: Path, guide: ModelGuide) -> None:
    half = load_guide(str(guide_folder), dtype="bfloat16")
    assert half.info.compute_dtype == "bfloat16"
    exact, rounded = guide.embed(TEXTS, "query"), half.embed(TEXTS, "query")
    assert np.abs(exact @ exact.T - rounded @ rounded.T).max() < 0.01


def static_model(folder: Path, tiny_student: Path, zero: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tiny_student).backend_tokenizer
    weights = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 16)).astype(np.float32)
    weights[tokenizer.encode(zero, add_special_tokens=False).ids] = 0
    return save(SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, weights)], device="cpu"), folder)


def test_static_embeddings_are_guides(tiny_student: Path, tmp_path: Path) -> None:
    folder = static_model(tmp_path / "static", tiny_student, zero="violin")
    guide = load_guide(folder)
    assert guide.info.max_length is None
    assert guide.info.pooling == "none"
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), expected, atol=2e-6)


def test_zero_vector_is_named_by_its_text(tiny_student: Path, tmp_path: Path) -> None:
    guide = load_guide(static_model(tmp_path / "static", tiny_student, zero="violin"))
    with pytest.raises(VectorError, match="the vector of the text 'violin violin' has length 0"):
        guide.embed([*TEXTS, "violin violin", *TEXTS], "query")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vector_that_is_not_finite_is_named_by_its_text(tiny_student: Path, tmp_path: Path, value: float) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "poisoned"))
    weights = load_file(folder / "model.safetensors")
    violin = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("violin")
    weights["embeddings.word_embeddings.weight"][violin] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    guide = load_guide(str(folder))
    guide.embed(TEXTS, "query")
    with pytest.raises(VectorError, match="the vector of the text 'an old violin' is not finite"):
        guide.embed([*TEXTS, "an old violin"], "query")


def test_student_spelling_is_what_a_live_guide_is_given(
    tiny_student: Path, guide_folder: Path, peer: SentenceTransformer
) -> None:
    guide = load_guide(str(guide_folder), decode_with=str(tiny_student))
    student = SentenceTransformer(str(tiny_student), device="cpu")
    ids = student.preprocess(TEXTS)["input_ids"]
    decoded = student.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert decoded != TEXTS
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), peer.encode(decoded), atol=2e-6)
    assert guide.info.decoded_with == StudentSpelling(str(tiny_student)).name


def test_missing_device_is_refused(guide_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--device must be auto, cpu, cuda or cuda:N"):
        load_guide(str(guide_folder), device="abacus")


@pytest.mark.parametrize("side", [lambda row, width: row + [0] * width, lambda row, width: [0] * width + row])
@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_batches_hold_each_row_once_within_the_budget(side: Callable[[list[int], int], list[int]], budget: int) -> None:
    lengths = [3, 1, 6, 2, 6, 4, 1]
    ids = [side(list(range(1, length + 1)), 6 - length) for length in lengths]
    features = {
        "input_ids": torch.tensor(ids),
        "attention_mask": (torch.tensor(ids) > 0).long(),
        "prompt_length": 2,
    }
    seen: list[int] = []
    for rows, batch in token_batches(features, budget):
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["prompt_length"] == 2
        assert len(rows) == 1 or batch["input_ids"].numel() <= budget
        for row, tokens in zip(rows.tolist(), batch["input_ids"], strict=True):
            assert tokens[tokens > 0].tolist() == list(range(1, lengths[row] + 1))
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1]
        seen.extend(rows.tolist())
    assert sorted(seen) == list(range(len(lengths)))


def test_missing_demo_guide_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", absent)
    with pytest.raises(DependencyError, match=r"pip install gistfast\[demo\]"):
        models.demo_guide()
