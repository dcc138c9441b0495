import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from gistfast.errors import ConfigError, DependencyError, ModelError, VectorError
from gistfast.guides.batch_done import BatchDone, advancing
from gistfast.guides.bench import docstrings, score_errors
from gistfast.guides.guide import ModelGuide, load_guide
from gistfast.guides.spelling import StudentSpelling
from gistfast.guides.token_batches import TokenBatch, TokenWindow
from gistfast.progress import Bar

# What processors compute in by default differs.
exact = partial(load_guide, dtype="float32")

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
    return exact(str(guide_folder))


@pytest.fixture(scope="module")
def peer(guide_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(guide_folder), device="cpu")


def save(model: SentenceTransformer, folder: Path) -> str:
    model.save(str(folder))
    return str(folder)


def test_vectors_are_those_of_encode_in_the_order_given(guide: ModelGuide, peer: SentenceTransformer) -> None:
    vectors = guide.embed(TEXTS, "query")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, peer.encode(TEXTS), atol=1e-6)


def test_vectors_have_length_one_without_a_normalising_module(tiny_student: Path) -> None:
    vectors = exact(str(tiny_student)).embed(TEXTS, "query")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 100_000])
def test_vectors_do_not_depend_on_the_batch(
    tiny_student: Path, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exact(str(tiny_student)).embed(TEXTS, "query")
    monkeypatch.setattr("gistfast.guides.guide.CHARS_PER_WINDOW", 100)
    monkeypatch.setattr("gistfast.guides.guide.WINDOW_CHARS_PER_TOKEN", 0)
    vectors = exact(str(tiny_student), tokens_per_batch=tokens_per_batch).embed(TEXTS, "query")
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_every_text_and_token_is_reported_as_done(tiny_student: Path) -> None:
    done: list[BatchDone] = []
    exact(str(tiny_student), tokens_per_batch=40).embed(TEXTS, "document", done.append)
    mask = SentenceTransformer(str(tiny_student), device="cpu").preprocess(TEXTS)["attention_mask"]
    assert len(done) > 1
    assert sum(batch.num_texts for batch in done) == len(TEXTS)
    assert sum(batch.num_tokens for batch in done) == mask.sum()
    assert mask.sum() < sum(batch.num_padded for batch in done) < mask.numel()


def test_bar_notes_the_padding_of_all_batches_so_far() -> None:
    bar, notes = Bar("embedding texts", total=10, unit="texts"), []
    bar.advance = lambda count=1, note="": notes.append((count, note))  # type: ignore[method-assign]
    on_batch = advancing(bar)
    for batch in (BatchDone(3), BatchDone(4, 10, 12), BatchDone(3, 10, 10)):
        on_batch(batch)
    assert notes == [(3, ""), (4, "padding 1.200x"), (3, "padding 1.100x")]


def test_threads_of_pytorch_are_what_they_were(tiny_student: Path) -> None:
    torch.set_num_threads(2)
    try:
        guide = exact(str(tiny_student), tokens_per_batch=40)
        vectors = guide.embed(TEXTS, "query")
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(vectors, guide.embed(TEXTS, "query"), atol=1e-6)


def test_error_of_the_tokenizer_ends_the_run(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = exact(str(tiny_student))
    monkeypatch.setattr(
        "gistfast.guides.guide.tokenise", lambda *given: (_ for _ in ()).throw(ValueError("no such letter"))
    )
    with pytest.raises(ValueError, match="no such letter"):
        guide.embed(TEXTS, "query")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gistfast")]


def test_ctrl_c_ends_the_run_and_its_threads(tiny_student: Path) -> None:
    guide, done = exact(str(tiny_student), tokens_per_batch=8), []

    def stop(batch: BatchDone) -> None:
        done.append(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guide.embed(TEXTS * 100, "query", stop)
    assert len(done) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gistfast")]


def test_batch_that_does_not_fit_names_the_option(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(guide: ModelGuide, batch: TokenBatch) -> None:
        raise torch.OutOfMemoryError

    guide = exact(str(tiny_student))
    monkeypatch.setattr(ModelGuide, "_forward", full)
    with pytest.raises(ModelError, match=r"a batch of .* tokens does not fit .*: give a smaller --tokens-per-batch"):
        guide.embed(TEXTS, "query")


def test_budget_of_a_gpu_is_measured_once_on_the_texts(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TokenWindow] = []

    def measured(window: TokenWindow, forward: Callable[[TokenBatch], object]) -> int:
        given.append(window)
        forward(next(window.batches(64)))
        return 64

    monkeypatch.setattr("gistfast.guides.guide.measure_budget", measured)
    expected = exact(str(tiny_student)).embed(TEXTS, "query")
    assert given == []
    guide = exact(str(tiny_student))
    guide._on_cpu, guide._tokens_per_batch = False, None
    for _ in range(2):
        np.testing.assert_allclose(guide.embed(TEXTS, "query"), expected, atol=1e-6)
    assert [len(window.numbers) for window in given] == [len(TEXTS)]


def test_no_texts_give_no_vectors(guide: ModelGuide) -> None:
    assert guide.embed([], "query").shape == (0, 384)


def test_prompts_stand_before_the_texts_of_their_role(tiny_student: Path) -> None:
    guide = exact(str(tiny_student), query_prompt="query: ", document_prompt="passage: ")
    peer = exact(str(tiny_student))
    for role, prompt in (("query", "query: "), ("document", "passage: ")):
        vectors = guide.embed(TEXTS, role)  # type: ignore[arg-type]
        np.testing.assert_allclose(vectors, peer.embed([prompt + text for text in TEXTS], "query"), atol=2e-6)


def test_prompt_can_be_left_out_of_the_pooling(tiny_student: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    model.set_pooling_include_prompt(False)
    guide = exact(save(model, tmp_path / "excluding"), query_prompt="a long prompt: ")
    expected = model.encode(TEXTS, prompt="a long prompt: ", normalize_embeddings=True)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), expected, atol=2e-6)


@pytest.mark.parametrize("pooling", ["cls", "last", "max", "mean"])
def test_poolings_match_sentence_transformers(tiny_student: Path, pooling: Any) -> None:
    guide = exact(str(tiny_student.parent / "encoder"), pooling=pooling)
    encoder = modules.Transformer(str(tiny_student.parent / "encoder"))
    pool = modules.Pooling(32, "lasttoken" if pooling == "last" else pooling)
    peer = SentenceTransformer(modules=[encoder, pool], device="cpu")
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), peer.encode(TEXTS, normalize_embeddings=True), atol=2e-6)


def test_left_padded_model_matches_sentence_transformers(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student.parent / "encoder", tmp_path / "decoder"))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.save_pretrained(folder)
    left = exact(str(folder), pooling="last", tokens_per_batch=60).embed(TEXTS, "query")
    encoder = modules.Transformer(str(folder))
    peer = SentenceTransformer(modules=[encoder, modules.Pooling(32, "lasttoken")], device="cpu")
    assert peer.preprocess(["a", "a longer text"])["attention_mask"][0, 0] == 0
    one_by_one = [peer.encode(text, normalize_embeddings=True) for text in TEXTS]
    assert left.shape == (len(TEXTS), 32)
    # BERT numbers its positions from the padding on, so only the longest of a batch equals the text alone.
    np.testing.assert_allclose(left[4], one_by_one[4], atol=2e-6)


def test_settings_that_cut_vectors_short_hold(tiny_student: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu", truncate_dim=8)
    guide = exact(save(model, tmp_path / "short"))
    assert guide.info.width == 8
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), model.encode(TEXTS, normalize_embeddings=True), atol=2e-6)


def test_bfloat16_moves_scores_of_real_texts_by_at_most_six_thousandths(guide_folder: Path, guide: ModelGuide) -> None:
    half, texts = load_guide(str(guide_folder), dtype="bfloat16"), docstrings(100)
    assert half.info.compute_dtype == "bfloat16"
    errors = score_errors(half.embed(texts, "query"), guide.embed(texts, "query"))
    assert len(errors) == 100 * 99 / 2
    assert 0 < errors.max() <= 0.006


def test_vectors_are_pooled_in_float32(tiny_student: Path) -> None:
    half = load_guide(str(tiny_student), dtype="bfloat16")
    seen: list[torch.dtype] = []
    half._model[1].register_forward_hook(lambda _, inputs, output: seen.append(output["sentence_embedding"].dtype))
    half.embed(TEXTS, "query")
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_precision_on_a_cpu_is_what_it_multiplies(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, multiplies: bool, dtype: str
) -> None:
    caplog.set_level("INFO", "gistfast")
    monkeypatch.setattr("gistfast.guides.precision.cpu_multiplies_bfloat16", lambda: multiplies)
    assert load_guide(str(tiny_student)).info.compute_dtype == dtype
    assert caplog.text.count(f"guide on cpu in {dtype}") == 1
    assert load_guide(str(tiny_student), dtype="float32").info.compute_dtype == "float32"


def static_model(folder: Path, tiny_student: Path, zero: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tiny_student).backend_tokenizer
    weights = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 16)).astype(np.float32)
    weights[tokenizer.encode(zero, add_special_tokens=False).ids] = 0
    return save(SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, weights)], device="cpu"), folder)


def test_static_embeddings_are_guides(tiny_student: Path, tmp_path: Path) -> None:
    folder = static_model(tmp_path / "static", tiny_student, zero="violin")
    guide = load_guide(folder, dtype="bfloat16")
    assert guide.info.max_length is None
    # It has no other.
    assert guide.info.compute_dtype == "float32"
    assert guide.info.pooling == "none"
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), expected, atol=2e-6)


def test_zero_vector_is_named_by_its_text(tiny_student: Path, tmp_path: Path) -> None:
    guide = exact(static_model(tmp_path / "static", tiny_student, zero="violin"))
    with pytest.raises(VectorError, match="text 'violin violin': the vector has length 0"):
        guide.embed([*TEXTS, "violin violin", *TEXTS], "query")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vector_that_is_not_finite_is_named_by_its_text(tiny_student: Path, tmp_path: Path, value: float) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "poisoned"))
    weights = load_file(folder / "model.safetensors")
    violin = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("violin")
    weights["embeddings.word_embeddings.weight"][violin] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    guide = exact(str(folder))
    guide.embed(TEXTS, "query")
    with pytest.raises(VectorError, match="text 'an old violin': the vector is not finite"):
        guide.embed([*TEXTS, "an old violin"], "query")


def test_student_spelling_is_what_a_live_guide_is_given(
    tiny_student: Path, guide_folder: Path, peer: SentenceTransformer
) -> None:
    guide = exact(str(guide_folder), decode_with=str(tiny_student))
    student = SentenceTransformer(str(tiny_student), device="cpu")
    ids = student.preprocess(TEXTS)["input_ids"]
    decoded = student.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert decoded != TEXTS
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), peer.encode(decoded), atol=2e-6)
    assert guide.info.decoded_with == StudentSpelling(str(tiny_student)).name


def test_missing_device_is_refused(guide_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--device must be auto, cpu, cuda or cuda:N"):
        exact(str(guide_folder), device="abacus")


def test_missing_demo_guide_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", absent)
    with pytest.raises(DependencyError, match=r"pip install gistfast\[demo\]"):
        models.demo_guide()
