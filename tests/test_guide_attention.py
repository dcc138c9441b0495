"""A guide whose texts stand in one row gives the vectors that it gives for padded texts."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import ENCODERS, TEXTS, let_texts_see_each_other, make_encoder, make_t5
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import Tensor
from transformers import AutoTokenizer

from gistfast.errors import ConfigError
from gistfast.guides import attention
from gistfast.guides.guide import ModelGuide, load_guide
from gistfast.guides.token_batches import TokenWindow
from gistfast.models import packed_attention, packed_texts
from gistfast.stages.precompute import precompute
from gistfast.stages.repair import repair

MakeEncoder = Callable[..., str]

# Of a component, in a vector of length 1.
CLOSE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def encoder(guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeEncoder:
    """Makes folders of plain encoders: `encoder("Bert")`, or with a tokenizer that pads on the left."""

    def make(name: str, *, side: str = "right", config: Any = None) -> str:
        tokenizer = AutoTokenizer.from_pretrained(guide_folder, padding_side=side)
        folder = tmp_path_factory.mktemp(name)
        return str(make_encoder(name, folder, tokenizer, **ENCODERS[name] if config is None else config))

    return make


def both(folder: str | Path, *, dtype: Any = "float32", **options: Any) -> tuple[ModelGuide, ModelGuide]:
    """The guide with padded texts, and with texts in one row."""
    padded, unpadded = (
        load_guide(str(folder), dtype=dtype, device="cpu", attention=way, **options)  # type: ignore[arg-type]
        for way in ("padded", "unpadded")
    )
    return padded, unpadded


def assert_same(folder: str | Path, texts: Sequence[str] = TEXTS, *, dtype: str = "float32", **options: Any) -> None:
    padded, unpadded = both(folder, dtype=dtype, **options)
    for role in ("query", "document"):
        expected = padded.embed(texts, role)  # type: ignore[arg-type]
        np.testing.assert_allclose(unpadded.embed(texts, role), expected, atol=CLOSE[dtype])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_are_those_of_padded_texts(name: str, encoder: MakeEncoder) -> None:
    assert_same(encoder(name), pooling="mean", max_length=32, tokens_per_batch=40)


@pytest.mark.parametrize("dtype", CLOSE)
def test_vectors_of_a_real_guide_are_those_of_padded_texts(dtype: str, guide_folder: Path) -> None:
    assert_same(guide_folder, dtype=dtype, query_prompt="the meaning of ", tokens_per_batch=100)


@pytest.mark.parametrize("name", ENCODERS)
def test_attention_of_a_half_precision_guide_is_given_that_alone(
    name: str, encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing else is what PyTorch's variable-length attention takes on a GPU.
    right, seen = packed_attention._text_by_text, set()

    def watched(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        seen.update({query.dtype, key.dtype, value.dtype})
        return right(query, key, value, *rest)

    monkeypatch.setattr(packed_attention, "_text_by_text", watched)
    assert_same(encoder(name), pooling="mean", max_length=32, tokens_per_batch=40, dtype="bfloat16")
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_token_of_each_text_is_pooled_whatever_the_side_of_padding(side: str, encoder: MakeEncoder) -> None:
    assert_same(encoder("Qwen3", side=side), pooling="last", max_length=32)


@pytest.mark.parametrize("pooling", ["cls", "max", "weightedmean", "mean_sqrt_len"])
def test_every_pooling_tells_texts_apart(pooling: str, encoder: MakeEncoder) -> None:
    assert_same(encoder("XLMRoberta"), pooling=pooling, max_length=32, tokens_per_batch=60)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_of_roles_and_modules_after_the_pooling(
    include_prompt: bool, encoder: MakeEncoder, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    chain = [
        modules.Transformer(encoder("Bert"), max_seq_length=32),
        modules.Pooling(32, include_prompt=include_prompt),
        modules.Dense(32, 12),
        modules.Normalize(),
    ]
    model = SentenceTransformer(modules=chain, device="cpu", prompts={"query": "which word is: ", "document": "it: "})
    model.save(str(tmp_path / "model"))
    assert_same(tmp_path / "model", tokens_per_batch=40)


def test_texts_keep_their_order_and_are_embedded_alone(encoder: MakeEncoder) -> None:
    _, guide = both(encoder("ModernBert"), pooling="cls", max_length=32)
    texts = [*TEXTS, *TEXTS[::-1]]
    alone = np.concatenate([guide.embed([text], "query") for text in texts])
    np.testing.assert_allclose(guide.embed(texts, "query"), alone, atol=2e-6)


def test_text_without_tokens_is_the_padding_that_it_was(encoder: MakeEncoder) -> None:
    _, guide = both(encoder("Qwen3"), pooling="last", max_length=32)
    guide._model.tokenizer.backend_tokenizer.post_processor = None
    guide.embed(TEXTS, "query")
    window = guide._tokenise(["", "oak", ""], np.arange(3), "query")
    texts, empty = window.batches(64)
    assert (texts.numbers.tolist(), empty.numbers.tolist()) == ([1], [0, 2])
    assert empty.features["attention_mask"].tolist() == [[0], [0]]
    assert not guide._forward(empty).any()


def test_batches_hold_as_many_tokens_as_there_is_room_for(encoder: MakeEncoder) -> None:
    _, guide = both(encoder("Bert"), pooling="mean", max_length=32, tokens_per_batch=20)
    done: list[Any] = []
    guide.embed([*TEXTS, *["a flat piece of land"] * 30], "query", done.append)
    assert all(batch.num_padded == batch.num_tokens for batch in done)
    assert all(batch.num_tokens <= 20 or batch.num_texts == 1 for batch in done)
    assert sum(batch.num_texts for batch in done) == len(TEXTS) + 30


def test_measured_budget_counts_tokens_of_texts(encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TokenWindow] = []

    def measured(window: TokenWindow, forward: Any) -> int:
        given.append(window)
        return 64

    monkeypatch.setattr("gistfast.guides.guide.measure_budget", measured)
    _, guide = both(encoder("Bert"), pooling="mean", max_length=32)
    guide._tokens_per_batch = None
    guide.embed(TEXTS, "query")
    (window,) = given
    (batch,) = window.batches(window.num_tokens)
    assert batch.num_padded == window.num_tokens


# The choice.


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == packed_texts.__name__]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., ModelGuide]:
    """Loads a guide that embeds a few texts and chooses as it would on a GPU, where "auto" tries texts in one row."""
    caplog.set_level(logging.INFO, "gistfast")
    monkeypatch.setattr("gistfast.guides.guide.may_be_unpadded", lambda model, padding, way: way != "padded")

    def choose(folder: str, way: Any = "auto", **options: Any) -> ModelGuide:
        options = {"pooling": "mean", "max_length": 32, "dtype": "float32"} | options
        guide = load_guide(folder, device="cpu", attention=way, **options)
        guide.embed(TEXTS, "query")
        return guide

    return choose


def refused(choose: Any, folder: str, caplog: pytest.LogCaptureFixture) -> str:
    """Why the guide takes padded texts: said once, and refused where one row was asked for."""
    guide = choose(folder)
    np.testing.assert_array_equal(guide.embed(TEXTS, "query"), choose(folder, "padded").embed(TEXTS, "query"))
    (line,) = lines_of(caplog)
    reason = line.removeprefix("padded attention, because unpadded cannot be had here: ")
    with pytest.raises(ConfigError) as error:
        choose(folder, "unpadded")
    assert str(error.value) == f"--attention unpadded cannot be had here: {reason}"
    return reason


def test_choice_is_made_once_and_said_in_one_line(
    choose: Any, encoder: MakeEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    guide = choose(encoder("Bert"))
    done: list[Any] = []
    guide.embed(TEXTS, "document", done.append)
    assert all(batch.num_padded == batch.num_tokens for batch in done)
    assert lines_of(caplog) == ["unpadded attention, text by text: it gives the vectors of padded texts"]


@pytest.mark.parametrize("way", ["auto", "padded"])
def test_on_a_cpu_texts_are_padded_and_nothing_is_tried(
    way: Any, encoder: MakeEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "gistfast")
    monkeypatch.setattr("gistfast.guides.guide.choose_padding", lambda *given: 1 / 0)
    load_guide(encoder("Bert"), pooling="mean", device="cpu", attention=way).embed(TEXTS, "query")
    assert lines_of(caplog) == []


def test_guide_with_attention_of_its_own_takes_padded_texts(
    choose: Any, encoder: MakeEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = encoder("MPNet", config={"max_position_embeddings": 34, "pad_token_id": 1})
    assert refused(choose, folder, caplog) == "MPNetModel computes attention in its own way"


def test_guide_with_a_bias_for_positions_takes_padded_texts(
    choose: Any, guide_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert refused(choose, str(make_t5(tmp_path / "t5", guide_folder)), caplog)


def test_packed_passes_that_are_wrong_are_not_taken(
    choose: Any, encoder: MakeEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_texts_see_each_other(monkeypatch)
    assert refused(choose, encoder("Bert"), caplog).startswith("its vectors are off by ")


def test_vectors_that_are_no_numbers_are_not_taken(
    choose: Any, encoder: MakeEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = packed_attention._text_by_text
    monkeypatch.setattr(packed_attention, "_text_by_text", lambda *given: right(*given) * float("nan"))
    assert refused(choose, encoder("Bert"), caplog).startswith("its vectors are off by nan ")


def test_error_of_the_architecture_is_the_reason(
    choose: Any, encoder: MakeEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> Tensor:
        raise RuntimeError("head_size must be a multiple of 8\nmore")

    monkeypatch.setattr(packed_attention, "_text_by_text", fail)
    assert refused(choose, encoder("Bert"), caplog) == "head_size must be a multiple of 8"


def test_texts_that_see_each_other_are_noticed_in_half_precision(
    choose: Any, encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_texts_see_each_other(monkeypatch)
    with pytest.raises(ConfigError, match=r"its vectors are off by .*, rounding is up to 0\.\d+$"):
        choose(encoder("Bert"), "unpadded", dtype="bfloat16")


@pytest.mark.parametrize("count", [1, 2, 3, 500])
def test_shortest_and_longest_texts_are_tried(count: int) -> None:
    texts = ["x" * (1 + number * 37 % 501) for number in range(count)]
    tried = attention.tried_texts(texts)
    assert {min(texts, key=len), max(texts, key=len)} <= set(tried)
    assert 2 <= len(tried) <= 9


def test_static_embeddings_have_no_attention(guide_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(guide_folder).backend_tokenizer
    static = modules.StaticEmbedding(tokenizer, embedding_dim=16)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    assert load_guide(str(tmp_path / "static"), device="cpu").embed(["oak"], "query").shape == (1, 16)
    with pytest.raises(
        ConfigError, match="unpadded cannot be had here: the guide's first module, StaticEmbedding, has no attention"
    ):
        load_guide(str(tmp_path / "static"), device="cpu", attention="unpadded")


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "reason"),
    [
        ("mps", None, "bfloat16", "PyTorch's variable-length attention does not run on mps"),
        ("cuda", (9, 0), "float32", "computes in half precision: give --dtype bfloat16"),
        ("cuda", (7, 5), "bfloat16", "Card is older than its kernel, which begins with Ampere"),
    ],
)
def test_what_a_device_lacks_is_said_before_any_text_is_read(
    device: str,
    capability: Any,
    dtype: str,
    reason: str,
    tiny_student: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "gistfast")
    model = SentenceTransformer(str(tiny_student), device="cpu").to(getattr(torch, dtype))
    monkeypatch.setattr(SentenceTransformer, "device", torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    info: Any = None
    assert not ModelGuide(model, info)._to_be_tried
    (line,) = lines_of(caplog)
    assert line.startswith("padded attention, because unpadded cannot be had here: ")
    assert line.endswith(reason)
    assert not ModelGuide(model, info, attention="padded")._to_be_tried
    with pytest.raises(ConfigError, match=f"^--attention unpadded cannot be had here: .*{reason}$"):
        ModelGuide(model, info, attention="unpadded")
    assert len(lines_of(caplog)) == 1


def test_on_a_card_that_lacks_nothing_texts_in_one_row_are_tried(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu").bfloat16()
    monkeypatch.setattr(SentenceTransformer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    info: Any = None
    assert ModelGuide(model, info)._to_be_tried


# The stores.


def test_store_is_that_of_padded_texts(
    pairs_file: Path, guide_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gistfast")
    options: dict[str, Any] = {"guide": guide_folder, "store_dtype": "float32", "dtype": "float32", "device": "cpu"}
    padded = precompute(pairs_file, out=tmp_path / "padded", attention="padded", **options)
    assert lines_of(caplog) == []
    unpadded = precompute(pairs_file, out=tmp_path / "unpadded", attention="unpadded", **options)
    assert len(lines_of(caplog)) == 1
    ids = torch.arange(padded.num_texts)
    torch.testing.assert_close(unpadded.gather(ids), padded.gather(ids), atol=2e-6, rtol=0)
    assert unpadded.fingerprint == padded.fingerprint


def test_store_grows_is_resumed_and_mended_either_way(
    pairs_file: Path, tiny_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gistfast")
    options: dict[str, Any] = {"guide": tiny_student, "out": tmp_path / "store", "index": "none", "device": "cpu"}
    first = tmp_path / "first.jsonl"
    first.write_text("".join(pairs_file.read_text(encoding="utf-8").splitlines(keepends=True)[:5]), encoding="utf-8")
    precompute(first, attention="padded", **options)
    store = precompute(pairs_file, attention="unpadded", append=True, **options)
    assert len(lines_of(caplog)) == 1
    next(store.path.glob("vectors/*/*.arrow")).unlink()
    repaired = repair(store.path, guide=tiny_student, attention="unpadded")
    assert (len(repaired.mended), repaired.left) == (1, [])
    assert len(lines_of(caplog)) == 2


def test_every_process_is_told(pairs_file: Path, guide_folder: Path, tmp_path: Path) -> None:
    static = modules.StaticEmbedding(AutoTokenizer.from_pretrained(guide_folder).backend_tokenizer, embedding_dim=16)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    options: dict[str, Any] = {"guide": tmp_path / "static", "out": tmp_path / "store", "device": "cpu"}
    with pytest.raises(ConfigError, match="--attention unpadded cannot be had here: "):
        precompute(pairs_file, attention="unpadded", processes=2, **options)
