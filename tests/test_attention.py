"""Texts in one row give the vectors and gradients of padded texts."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import ENCODERS, TEXTS, forms, let_texts_see_each_other, make_t5
from attention_cases import make_student as new_student
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from torch.nn.attention import varlen
from train_cases import ROWS, steps, train_small
from transformers import AutoTokenizer

from gistfast.errors import ConfigError, ModelError
from gistfast.models import packed_attention
from gistfast.store import GuideStore
from gistfast.students.input import InputForm, input_form
from gistfast.students.packed import pack
from gistfast.students.student import checkpoint_activations, load_student, set_dropout
from gistfast.students.tokenising import tokenise
from gistfast.training.attention import choose_form
from gistfast.training.feed import feed
from gistfast.training.passes import PackedPasses, Passes
from gistfast.training.step import Replay, embed, replayed_loss


@pytest.fixture(scope="module")
def make_student(guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SentenceTransformer]:
    """Makes students: `make_student("Bert", pooling="cls")`."""
    tokenizer = AutoTokenizer.from_pretrained(guide_folder)

    def make(name: str = "Bert", *, pooling: Any = "mean", config: Any = None) -> SentenceTransformer:
        folder = tmp_path_factory.mktemp(name)
        return new_student(name, folder, tokenizer, pooling, ENCODERS[name] if config is None else config, "cpu")

    return make


def gradients(model: SentenceTransformer, vectors: Tensor) -> dict[str, Tensor]:
    """Of all weights, for a loss that weighs each number of the vectors differently."""
    model.zero_grad()
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_both_ways(model: SentenceTransformer, texts: list[str], prompt: str = "") -> None:
    (form, padded), (packed, in_rows) = forms(model, texts, prompt)
    right = embed(model, form, padded)
    wanted = gradients(model, right)
    vectors = embed(model, packed, in_rows)
    found = gradients(model, vectors)
    assert len(in_rows.forwards) > 1
    assert torch.allclose(vectors, right, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max() + 1)), name


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_and_gradients_are_those_of_padded_texts(
    name: str, make_student: Callable[..., SentenceTransformer]
) -> None:
    assert_same_both_ways(make_student(name), TEXTS)


@pytest.mark.parametrize(
    "pooling", ["cls", "max", "weightedmean", "mean_sqrt_len_tokens", "lasttoken", ("cls", "mean")]
)
def test_every_pooling_tells_texts_apart(pooling: Any, make_student: Callable[..., SentenceTransformer]) -> None:
    assert_same_both_ways(make_student(pooling=pooling), TEXTS)


@pytest.mark.parametrize("pooling", ["cls", "mean", "weightedmean", "max"])
def test_prompt_is_left_out_of_pooling(pooling: str, make_student: Callable[..., SentenceTransformer]) -> None:
    student = make_student(pooling=pooling)
    student.set_pooling_include_prompt(False)
    assert_same_both_ways(student, TEXTS, prompt="a word: ")


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_of_a_single_token(side: str, make_student: Callable[..., SentenceTransformer]) -> None:
    student = make_student("Qwen3", pooling="lasttoken")
    student.tokenizer.padding_side = side
    student.tokenizer.backend_tokenizer.post_processor = None
    assert 1 in tokenise(student, TEXTS, "")[1]
    assert_same_both_ways(student, TEXTS)


def test_activations_are_recomputed_with_the_same_texts(make_student: Callable[..., SentenceTransformer]) -> None:
    student = make_student("ModernBert")
    checkpoint_activations(student)
    assert_same_both_ways(student, TEXTS)


def test_padded_texts_are_embedded_as_before(make_student: Callable[..., SentenceTransformer]) -> None:
    for name in ("Bert", "ModernBert", "Qwen3"):
        student = make_student(name)
        before = student.encode(TEXTS)
        pack(student, input_form(student, [""]))
        np.testing.assert_array_equal(student.encode(TEXTS), before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replay_has_the_gradient_of_kept_graphs(
    dropout: float, make_student: Callable[..., SentenceTransformer]
) -> None:
    student = make_student()
    set_dropout(student, dropout)
    _, (packed, in_rows) = forms(student, TEXTS)

    def loss_of(vectors: Tensor) -> Tensor:
        return (vectors @ vectors.T).logsumexp(1).sum()

    def of(loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        student.zero_grad()
        torch.manual_seed(0)
        loss().backward()
        return {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}

    wanted = of(lambda: loss_of(embed(student, packed, in_rows)))
    replay = Replay(0.0, False, PackedPasses(40))
    found = of(lambda: replayed_loss(student, packed, in_rows, loss_of, replay)[0])
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * float(gradient.abs().max())), name


def test_packed_passes_have_room_and_leave_nothing_out() -> None:
    sizes = np.sort(np.random.default_rng(0).integers(1, 90, 200))[::-1]
    passes = PackedPasses(80)
    forwards = passes.cut(sizes, np.repeat([0, 1], 100))
    assert forwards[:, 0].tolist() == [0, *forwards[:-1, 1]]
    assert forwards[-1, 1] == 200
    for first, end, kind in forwards:
        assert sizes[first:end].sum() <= 80 or end - first == 1
        assert kind == (first >= 100)
        if end < 200 and end != 100:
            assert sizes[first : end + 1].sum() > 80
    assert passes.num_tokens(sizes, forwards) == sizes.sum()


# The choice.


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(ROWS)


@pytest.fixture
def choose(store: GuideStore, tmp_path: Path) -> Callable[..., tuple[InputForm, Passes]]:
    """Lets a student choose, with the store's texts."""

    def choose(model: SentenceTransformer, attention: Any = "auto") -> tuple[InputForm, Passes]:
        form, collators = feed(model, [store], {}, spare_folder=tmp_path, on_cpu=True)
        return choose_form(model, form, collators, attention=attention, bf16=False), collators[0].passes

    return choose


def test_choice_leaves_the_student_and_random_numbers_as_they_were(
    choose: Any, make_student: Callable[..., SentenceTransformer], caplog: pytest.LogCaptureFixture
) -> None:
    student = make_student()
    set_dropout(student, 0.1)
    student[1].eval()
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "gistfast.models.packed_texts"):
        _, passes = choose(student)
    assert isinstance(passes, PackedPasses)
    assert [record.getMessage() for record in caplog.records] == [
        "unpadded attention, text by text: it gives the vectors and gradients of padded texts"
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert (student.training, student[0].training, student[1].training) == (True, True, False)
    assert all(weight.grad is None for weight in student.parameters())


def refused(choose: Any, student: SentenceTransformer, caplog: pytest.LogCaptureFixture) -> str:
    """Why the student takes padded texts: said once, and refused where one row was asked for."""
    with caplog.at_level(logging.INFO, "gistfast.models.packed_texts"):
        _, passes = choose(student)
    assert not isinstance(passes, PackedPasses)
    (message,) = (record.getMessage() for record in caplog.records)
    reason = message.removeprefix("padded attention, because unpadded cannot be had here: ")
    with pytest.raises(ConfigError) as error:
        choose(student, "unpadded")
    assert str(error.value) == f"--attention unpadded cannot be had here: {reason}"
    return reason


def test_student_with_attention_of_its_own_takes_padded_texts(
    choose: Any, make_student: Callable[..., SentenceTransformer], caplog: pytest.LogCaptureFixture
) -> None:
    student = make_student("MPNet", config={"max_position_embeddings": 34, "pad_token_id": 1})
    assert refused(choose, student, caplog) == "MPNetModel computes attention in its own way"


def test_student_with_a_bias_for_positions_takes_padded_texts(
    choose: Any, guide_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    modules = [Transformer(str(make_t5(tmp_path / "t5", guide_folder)), max_seq_length=32), Pooling(16)]
    student = SentenceTransformer(modules=modules, device="cpu")
    assert refused(choose, student, caplog)
    assert student[0].model.config._attn_implementation == "sdpa"


def test_packed_passes_that_are_wrong_are_not_taken(
    choose: Any,
    make_student: Callable[..., SentenceTransformer],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student()
    before = student.encode(TEXTS)
    let_texts_see_each_other(monkeypatch)
    assert refused(choose, student, caplog).startswith("its vectors are off by ")
    np.testing.assert_array_equal(student.encode(TEXTS), before)


def test_wrong_gradient_alone_is_noticed(
    choose: Any,
    make_student: Callable[..., SentenceTransformer],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = packed_attention._text_by_text
    # The same numbers, and half of the gradient.
    monkeypatch.setattr(
        packed_attention, "_text_by_text", lambda *given: right(*given).mul(0.5).add(right(*given).detach() / 2)
    )
    assert refused(choose, make_student(), caplog).startswith("its gradients are off by ")


def test_error_of_the_architecture_is_the_reason(
    choose: Any,
    make_student: Callable[..., SentenceTransformer],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: Any) -> Tensor:
        raise RuntimeError("head_size must be a multiple of 8\nmore")

    monkeypatch.setattr(packed_attention, "_text_by_text", fail)
    assert refused(choose, make_student(), caplog) == "head_size must be a multiple of 8"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cached": True},
        {"cached": True, "replay_tolerance": 0.1, "gradient_checkpointing": True},
        {"lora_rank": 2},
        {"bf16": True},
    ],
    ids=str,
)
def test_run_is_that_of_padded_texts(
    options: dict[str, Any],
    make_store: Callable[..., GuideStore],
    make_student: Callable[..., SentenceTransformer],
    tmp_path: Path,
) -> None:
    rows = [(" ".join([anchor] * (1 + number % 5)), positive) for number, (anchor, positive) in enumerate(ROWS)]
    make_student("ModernBert").save(str(tmp_path / "before"))
    run = partial(
        train_small,
        store=make_store(rows).path,
        student=tmp_path / "before",
        learning_rate=1e-4,
        tokens_per_forward=64,
        **options,
    )
    padded = run(out=tmp_path / "padded", attention="padded")
    unpadded = run(out=tmp_path / "unpadded", attention="unpadded")
    for one, other in zip(steps(padded.path), steps(unpadded.path), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-2 if "bf16" in options else 1e-3)
        assert one["tokens"] == other["tokens"] == other["padded_tokens"] <= one["padded_tokens"]
    assert any(record["tokens"] < record["padded_tokens"] for record in steps(padded.path))
    saved = [path.read_text() for path in unpadded.path.glob("**/*.json") if "checkpoints" not in str(path)]
    assert packed_attention.PACKED not in "".join(saved)
    assert load_student(str(unpadded.path), device="cpu")[0].model.config._attn_implementation == "sdpa"


# What PyTorch's variable-length attention gets; the rest needs a GPU (test_gpu_attention.py).


def as_documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` after its documentation, one token after the other."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert all(tensor.stride(-1) == 1 and len(tensor) == cu_seq_q[-1] for tensor in (query, key, value))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    left, right = (max_q if reach == -1 else reach for reach in window_size)
    rows = []
    for begin, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        for place in range(begin, end):
            seen = slice(max(begin, place - left), min(end, place + right + 1))
            weights = (torch.einsum("hd,khd->hk", query[place], key[seen]) * scale).softmax(1)
            rows.append(torch.einsum("hk,khd->hd", weights, value[seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ENCODERS)
def test_variable_length_attention_gets_what_its_documentation_asks_for(
    name: str, make_student: Callable[..., SentenceTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", as_documented)
    monkeypatch.setattr(packed_attention, "_text_by_text", lambda *given: packed_attention._varlen(*given[:5]))
    assert_same_both_ways(make_student(name), TEXTS)


def test_installed_variable_length_attention_takes_the_call() -> None:
    texts = packed_attention._Texts(torch.tensor([0, 3, 10], dtype=torch.int32, device="meta"), 7, (3, 0))
    query, key, value = (
        torch.empty(1, heads, 10, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    )
    found = packed_attention._varlen(query, key, value, texts, 0.5)
    found.sum().backward()
    assert found.shape == (1, 10, 4, 8)
    assert query.grad is not None
    assert key.grad is not None
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


@pytest.mark.parametrize(
    ("capability", "function", "reason"),
    [
        ((7, 5), as_documented, "Old Card is older than its kernel, which begins with Ampere"),
        ((8, 0), lambda query, is_causal: query, f"PyTorch {torch.__version__} does not have it yet"),
        ((9, 0), as_documented, None),
    ],
)
def test_card_and_version_that_lack_it_are_named(
    capability: tuple[int, int], function: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(varlen, "varlen_attn", function)
    assert packed_attention.varlen_missing(torch.device("cuda")) == reason


def test_dropout_of_attention_weights_is_refused_on_a_gpu() -> None:
    query: Any = SimpleNamespace(is_cuda=True)
    with pytest.raises(ModelError, match="--dropout 0"):
        packed_attention.packed_attention(
            torch.nn.Identity(), query, query, query, None, 0.1, cu_seq_lens_q=torch.tensor([0, 1]), max_length_q=1
        )


@pytest.mark.parametrize("option", ["position_bias", "softcap", "s_aux"])
def test_what_packed_attention_does_not_do_is_refused(option: str) -> None:
    query = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ModelError, match="its attention "):
        packed_attention.packed_attention(
            torch.nn.Identity(), query, query, query, None, cu_seq_lens_q=torch.tensor([0, 5]), max_length_q=5,
            **{option: torch.ones(1)},
        )  # fmt: skip


def test_fp32_run_on_a_gpu_is_told_of_bf16(choose: Any, make_student: Callable[..., SentenceTransformer]) -> None:
    class OnCard(SentenceTransformer):
        device = torch.device("cuda")

    student = make_student()
    student.__class__ = OnCard
    with pytest.raises(ConfigError, match="give --bf16"):
        choose(student, "unpadded")
