import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor
from train_cases import ROWS, records, resumes_exactly, same_weights, steps, train_small

from gistfast.errors import ConfigError
from gistfast.evaluation.retrieval import MEASURES
from gistfast.losses.gist_loss import GISTLoss
from gistfast.losses.matryoshka import Matryoshka, matryoshka
from gistfast.settings.stages import TrainSettings, build
from gistfast.stages.evaluate import evaluate
from gistfast.stages.train import TrainReport
from gistfast.store import GuideStore
from gistfast.training.run_picture import _panels
from gistfast.training.trainer import GuidedTrainer

DIMS, WEIGHTS = (16, 8), (0.5, 2.0)


@pytest.fixture
def held_out(make_store: Callable[..., GuideStore]) -> GuideStore:
    return make_store(ROWS, holdout=0.3)


@pytest.fixture
def run(held_out: GuideStore, tiny_student: Path, tmp_path: Path) -> Callable[..., TrainReport]:
    """Training at the student's own width of 32, and at 16 and 8."""
    return partial(
        train_small, store=held_out.path, student=tiny_student, out=tmp_path / "student", matryoshka_dims=DIMS
    )


# The loss.


def test_losses_at_the_widths_are_weighted_and_summed_the_whole_last() -> None:
    # Whole numbers, whose sums are exact in any order.
    columns = torch.arange(48.0).reshape(2, 3, 8).requires_grad_()
    seen: list[int] = []

    def contrast(columns: Tensor) -> Tensor:
        seen.append(columns.shape[-1])
        return (columns**2).sum()

    total, at = Matryoshka({2: 0.5, 4: 2.0, 8: 1.0}).loss(contrast, columns)
    squares = columns.detach() ** 2
    assert seen == [2, 4, 8]
    assert {name: loss.item() for name, loss in at.items()} == {
        f"loss_at/{width}": squares[..., :width].sum().item() for width in seen
    }
    total.backward()
    scale = torch.tensor([3.5] * 2 + [3.0] * 2 + [1.0] * 4)
    torch.testing.assert_close(columns.grad, 2 * columns.detach() * scale)


def test_own_width_is_always_among_the_widths() -> None:
    assert matryoshka(32, (8, 16), ()).weights == {8: 1.0, 16: 1.0, 32: 1.0}
    found = matryoshka(32, (32, 16), (0.25, 4.0))
    assert list(found.weights.items()) == [(16, 4.0), (32, 0.25)]
    assert found.cuts == [16]


def test_first_step_is_that_of_sentence_transformers_own_loss_on_the_same_rows(
    run: Callable[..., TrainReport], held_out: GuideStore, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Tensor] = []
    compute_loss = GuidedTrainer.compute_loss

    def observed(self: GuidedTrainer, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        rows.append(inputs["rows"])
        return compute_loss(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(GuidedTrainer, "compute_loss", observed)
    report = run(max_steps=1, dropout=0.0, matryoshka_weights=WEIGHTS, margin=0.1)
    model = SentenceTransformer(str(tiny_student), device="cpu").eval()
    guided = GISTLoss(model, held_out, temperature=0.1, margin=0.1)
    ids = held_out.rows[rows[0].numpy()]
    features = [model.preprocess(held_out.texts.take(ids[:, column])) for column in range(2)]
    expected = MatryoshkaLoss(model, guided, [32, *DIMS], [1.0, *WEIGHTS])(features, torch.from_numpy(ids))
    (record,) = steps(report.path)
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-4)
    parts = {32: 1.0, **dict(zip(DIMS, WEIGHTS, strict=True))}
    total = sum(weight * record[f"loss_at/{width}"] for width, weight in parts.items())
    assert record["loss"] == pytest.approx(total, abs=5e-4)
    assert record["dropped/ap"] == pytest.approx(guided.last_stats["dropped/ap"].item(), abs=1e-4)


def test_scores_of_the_log_are_those_of_whole_vectors(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    first = steps(run(max_steps=1).path)[0]
    alone = steps(run(max_steps=1, matryoshka_dims=(), out=tmp_path / "alone").path)[0]
    assert first["score/positive"] == alone["score/positive"]
    assert first["loss_at/32"] == pytest.approx(alone["loss"], abs=1e-4)


@pytest.mark.parametrize("options", [{"cached": True}, {"cached": True, "replay_tolerance": 1e-9}], ids=str)
def test_cached_run_takes_the_same_steps(
    options: dict[str, Any], run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    plain, cached = run(dropout=0.0), run(dropout=0.0, out=tmp_path / "cached", **options)
    for expected, found in zip(steps(plain.path), steps(cached.path), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["loss_at/8"] == pytest.approx(expected["loss_at/8"], rel=1e-3, abs=2e-4)


def test_run_is_resumed_to_the_last_bit(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    options: dict[str, Any] = {"matryoshka_weights": WEIGHTS, "eval_steps": 2}
    report, _ = resumes_exactly(run, tmp_path, **options)
    assert not same_weights(report.path, run(out=tmp_path / "even").path)


# The evaluation.


def test_evaluation_has_the_scores_of_cut_vectors_which_evaluate_finds_again(
    run: Callable[..., TrainReport], held_out: GuideStore
) -> None:
    report = run(eval_steps=3)
    found = [record for record in records(report.path) if "eval_runtime" in record]
    assert [record["step"] for record in found] == [0, 3, 6]
    for width in DIMS:
        measured = evaluate(report.path, store=held_out.path, truncate_dim=width, device="cpu")
        assert measured["truncate_dim"] == width
        for measure in MEASURES:
            assert found[-1][f"eval_held_out_cosine_{measure}_at/{width}"] == measured["retrieval"][measure]
    whole = evaluate(report.path, store=held_out.path, device="cpu")["retrieval"]
    assert report.evaluation["ndcg@10"] == found[-1]["eval_held_out_cosine_ndcg@10"] == whole["ndcg@10"]
    panels = _panels(records(report.path))
    assert panels["nDCG@10 of cut vectors"]["16"][0] == panels["nDCG@10 of cut vectors"]["8"][0] == [0, 3, 6]
    assert set(panels["loss at each width"]) == {"8", "16", "32"}
    assert not panels["loss of each store"]
    assert not panels["nDCG@10 of each store"]


def test_evaluation_embeds_each_text_once(run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = SentenceTransformer.encode

    def counted(self: SentenceTransformer, inputs: list[str], *arguments: Any, **options: Any) -> Any:
        calls.append(len(inputs))
        return encode(self, inputs, *arguments, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", counted)
    run(eval_steps=6, matryoshka_dims=())
    without, calls[:] = list(calls), []
    run(eval_steps=6, overwrite=True)
    assert calls == without


def test_scored_pairs_are_compared_at_each_width(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"sentence1": one, "sentence2": other, "score": number % 5} for number, (one, other) in enumerate(ROWS)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(eval_steps=6, eval_sts=str(pairs))
    last = [record for record in records(report.path) if "eval_runtime" in record][-1]
    for width in DIMS:
        measured = evaluate(report.path, sts=str(pairs), truncate_dim=width, device="cpu")["sts"]["spearman"]
        assert last[f"eval_sts_spearman_cosine_at/{width}"] == pytest.approx(measured)
    assert report.evaluation["spearman"] == last["eval_sts_spearman_cosine"]


def test_several_stores_have_the_mean_of_cut_vectors(
    run: Callable[..., TrainReport], make_store: Callable[..., GuideStore], held_out: GuideStore
) -> None:
    other = make_store([(f"{anchor}!", f"{positive}?") for anchor, positive in ROWS], name="other", holdout=0.3)
    report = run(store=[held_out.path, other.path], eval_steps=6)
    last = [record for record in records(report.path) if "eval_runtime" in record][-1]
    measured = [
        evaluate(report.path, store=store.path, truncate_dim=8, device="cpu")["retrieval"]["ndcg@10"]
        for store in (held_out, other)
    ]
    assert last["eval_held_out_cosine_ndcg@10_at/8"] == pytest.approx(sum(measured) / 2)
    assert not any("_at/8/" in name for name in last)
    assert set(report.stores) == {"store", "other"}


def test_card_names_the_widths_and_the_paper(run: Callable[..., TrainReport]) -> None:
    card = (run().path / "README.md").read_text()
    assert "trained to be cut to 16, 8 dimensions" in card
    assert "loss:MatryoshkaLoss" in card
    assert "Matryoshka Representation Learning" in card


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matryoshka_weights": "1"}, "--matryoshka-weights does nothing without --matryoshka-dims"),
        ({"matryoshka_dims": "16,16"}, "must be different widths of at least 1, found 16,16"),
        ({"matryoshka_dims": "0"}, "must be different widths of at least 1, found 0"),
        ({"matryoshka_dims": "x"}, "--matryoshka-dims must be numbers like 256,128,64, found 'x'"),
        ({"matryoshka_dims": "16,8", "matryoshka_weights": "1"}, "for each of --matryoshka-dims 16,8, found 1"),
        ({"matryoshka_dims": "16", "matryoshka_weights": "0"}, "must be a number above 0 for each"),
    ],
)
def test_bad_widths_are_one_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(TrainSettings, {"store": "store", "student": "student", "out": "out", **options})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((64, 8), "--matryoshka-dims 64: the student's vectors are 32 wide: give less"),
        ((32,), "32 is the student's own width, which is trained anyway"),
    ],
)
def test_width_that_the_student_does_not_have_is_refused_before_anything_is_written(
    dims: tuple[int, ...], message: str, run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(matryoshka_dims=dims)
    assert not (tmp_path / "student").exists()


def test_evaluation_at_the_model_s_own_width_is_refused(tiny_student: Path, held_out: GuideStore) -> None:
    with pytest.raises(ConfigError, match="--truncate-dim 32: the model's vectors are 32 wide"):
        evaluate(tiny_student, store=held_out.path, truncate_dim=32, device="cpu")
