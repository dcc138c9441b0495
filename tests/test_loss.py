"""The two losses, by themselves and in sentence-transformers' own trainer."""

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from torch import Tensor, nn

from gistfast import CachedGISTLoss, GISTLoss, guided_contrastive_loss
from gistfast.errors import ConfigError, GistfastError, ShapeError, StoreError
from gistfast.stages.precompute import precompute
from gistfast.store import GuideStore
from gistfast.students.student import set_dropout

# Sharper than this the losses of random students say little.
TEMPERATURE = 0.1
COLUMNS = ("anchor", "positive", "negative_1", "negative_2")
# "automobile" is an anchor, a positive and a negative; "a stringed toy" is a negative of two rows.
ROWS = [
    ("car", "a motor vehicle with four wheels", "a vehicle with two wheels", "a boat with sails"),
    ("automobile", "a motor vehicle with four wheels", "a toy on wheels", "a road for vehicles"),
    ("a carriage with an engine", "automobile", "a lake in the hills", "a drink of water"),
    ("violin", "a bowed stringed instrument", "a brass instrument", "a stringed toy"),
    ("fiddle", "a bowed stringed instrument", "a stringed toy", "automobile"),
    ("to sleep", "be at rest with the mind and body switched off", "be awake", "lie down to read"),
    ("bread", "food made from dough of flour and water", "cake with sugar", "flour of wheat"),
    ("staff of life", "food made from dough of flour and water", "a walking stick", "a crew"),
    ("bank", "a financial institution that accepts deposits", "a payment", "a thief"),
    ("bank", "sloping land beside a body of water", "a bridge over water", "flat land"),
    ("oak", "a tree that bears acorns", "a tree that bears cones", "a wooden table"),
    ("judge", "a public official who decides cases in court", "a lawyer", "a police station"),
]
UNIQUE = [row for row in ROWS if row[0] not in ("automobile", "fiddle", "staff of life", "bank")]

# Every step with all rows.
WHOLE = {"max_steps": 6, "per_device_train_batch_size": len(ROWS)}

Loss = Callable[..., GISTLoss]


def cached(model: SentenceTransformer, store: GuideStore, **options: Any) -> CachedGISTLoss:
    """Mini-batches that do not divide a batch."""
    return CachedGISTLoss(model, store, **{"mini_batch_size": 5} | options)


BOTH = pytest.mark.parametrize("make_loss", [GISTLoss, cached], ids=["plain", "cached"])


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """The trainer collects garbage as it begins: half a second a run, unless imports are left out of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def guide(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as the student, and of another opinion."""
    model = SentenceTransformer(str(tiny_student), device="cpu")
    torch.manual_seed(1)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    folder = tmp_path_factory.mktemp("guide") / "guide"
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def store_of(guide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., GuideStore]:
    """Makes a store of rows of texts."""

    def make(rows: list[tuple[str, ...]], **options: Any) -> GuideStore:
        folder = tmp_path_factory.mktemp("store")
        columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=False))
        Dataset.from_dict(columns).to_json(folder / "rows.jsonl")
        options = {"index": "none", "device": "cpu", "dtype": "float32", "store_dtype": "float32"} | options
        return precompute(folder / "rows.jsonl", guide=guide, out=folder / "store", **options)

    return make


@pytest.fixture(scope="module")
def store(store_of: Callable[..., GuideStore]) -> GuideStore:
    """All rows, with two negatives."""
    return store_of(ROWS)


@pytest.fixture(scope="module")
def pair_store(store_of: Callable[..., GuideStore]) -> GuideStore:
    """Anchors and positives alone, some of them held out."""
    return store_of([row[:2] for row in ROWS], holdout=0.3)


@pytest.fixture
def model(tiny_student: Path) -> SentenceTransformer:
    """A student without dropout."""
    student = SentenceTransformer(str(tiny_student), device="cpu")
    student.model_card_data.local_files_only = True
    set_dropout(student, 0.0)
    return student


def batch_of(model: SentenceTransformer, rows: Dataset | GuideStore) -> tuple[list[dict[str, Tensor]], Tensor]:
    """All rows as the trainer's collator gives them to a loss."""
    rows = rows if isinstance(rows, Dataset) else rows.to_dataset("train")
    features = [model.preprocess(rows[name][:]) for name in COLUMNS if name in rows.column_names]
    return features, torch.tensor(rows["label"][:])


class ByHand(nn.Module):
    """A loss of the student that a test writes out."""

    def __init__(self, model: SentenceTransformer, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        return self.function(features, labels)


def gradients(
    loss: nn.Module, features: list[dict[str, Tensor]], labels: Tensor, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradients on all weights as one vector."""
    loss.zero_grad()
    torch.manual_seed(seed)
    value = loss([dict(column) for column in features], labels)
    value.backward()
    found = [weight.grad.flatten() for weight in loss.parameters() if weight.grad is not None]
    return value.detach(), torch.cat(found).clone()


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> None:
    """Losses and gradients differ by no more than a share of the largest."""
    assert expected[1].abs().max() > 1e-3
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.fixture
def train(model: SentenceTransformer, tmp_path: Path) -> Callable[..., SentenceTransformerTrainer]:
    """Trains the student for a few steps, and gives back the trainer."""

    def run(
        loss: Any,
        rows: Any,
        *,
        model: SentenceTransformer = model,
        eval_dataset: Any = None,
        resume: str | None = None,
        **arguments: Any,
    ) -> SentenceTransformerTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(**defaults | arguments),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            loss=loss,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def logged(trainer: SentenceTransformerTrainer, name: str = "loss") -> list[float]:
    return [float(record[name]) for record in trainer.state.log_history if name in record]


def record_batches(loss: GISTLoss) -> list[tuple[list[dict[str, Tensor]], Tensor]]:
    """A list that receives what the loss is given, while it trains."""
    batches: list[tuple[list[dict[str, Tensor]], Tensor]] = []

    def note(_: nn.Module, given: tuple[Any, Any]) -> None:
        batches.append(([dict(column) for column in given[0]], given[1].clone()))

    loss.register_forward_pre_hook(note)
    return batches


# What a loss is.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 0.1},
        {"margin": 0.1, "margin_strategy": "relative"},
        {"contrast_anchors": False},
        {"contrast_positives": False, "temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_losses_are_those_of_sentence_transformers_where_no_text_comes_twice(
    store: GuideStore, model: SentenceTransformer, guide: Path, columns: int, options: dict[str, Any]
) -> None:
    rows = store.to_dataset("train")
    features, labels = batch_of(model, rows.select([ROWS.index(row) for row in UNIQUE]))
    batch = features[:columns], labels[:, :columns]
    options = {"temperature": TEMPERATURE} | options
    live = SentenceTransformer(str(guide), device="cpu").eval().requires_grad_(False)
    found = gradients(GISTLoss(model, store, **options), *batch)
    assert_same(gradients(CachedGISTEmbedLoss(model, live, **options), *batch), found, 1e-5)
    assert_same(gradients(cached(model, store, **options), *batch), found, 1e-5)
    if columns < 4:
        assert_same(gradients(GISTEmbedLoss(model, live, **options), *batch), found, 1e-5)


@BOTH
def test_loss_is_the_function_of_student_and_stored_vectors(
    store: GuideStore, model: SentenceTransformer, make_loss: Loss
) -> None:
    features, labels = batch_of(model, store)
    anchor, positive, *negatives = (model(dict(column))["sentence_embedding"] for column in features)
    expected, stats = guided_contrastive_loss(
        anchor,
        positive,
        torch.cat(negatives),
        guide_anchor=store.gather(labels[:, 0]),
        guide_positive=store.gather(labels[:, 1]),
        guide_negative=store.gather(labels[:, 2:].T.flatten()),
        anchor_ids=labels[:, 0],
        positive_ids=labels[:, 1],
        negative_ids=labels[:, 2:].T.flatten(),
        margin=0.05,
        hard_only=True,
        return_stats=True,
    )
    loss = make_loss(model, store, margin=0.05, hard_only=True)
    torch.testing.assert_close(loss(features, labels).detach(), expected.detach())
    assert loss.last_stats == stats.means()
    assert all(0 < share < 1 for share in stats.dropped.values())


@BOTH
def test_several_guides_judge_as_the_store_says(
    store_of: Callable[..., GuideStore], model: SentenceTransformer, tiny_student: Path, make_loss: Loss
) -> None:
    found = {}
    for guide_score in ("mean", "min", "max"):
        path = store_of([row[:2] for row in ROWS]).path
        options: dict[str, Any] = {"guide_score": guide_score, "index": "none", "device": "cpu", "holdout": 0.0}
        store = precompute(path.parent / "rows.jsonl", guide=tiny_student, out=path, add_guide=True, **options)
        features, labels = batch_of(model, store)
        anchor, positive = (model(dict(column))["sentence_embedding"] for column in features)
        expected, stats = guided_contrastive_loss(
            anchor,
            positive,
            guide_anchor=store.gather(labels[:, 0]),
            guide_positive=store.gather(labels[:, 1]),
            guide_widths=store.guide_widths,
            guide_score=guide_score,
            anchor_ids=labels[:, 0],
            positive_ids=labels[:, 1],
            return_stats=True,
        )
        loss = make_loss(model, store)
        torch.testing.assert_close(loss(features, labels).detach(), expected.detach())
        assert loss.last_stats == stats.means()
        found[guide_score] = float(expected.detach())
    assert len(set(found.values())) == 3


@BOTH
def test_same_text_is_no_negative_under_another_prompt(
    store_of: Callable[..., GuideStore], model: SentenceTransformer, make_loss: Loss
) -> None:
    store = store_of([row[:2] for row in ROWS], query_prompt="query: ")
    features, labels = batch_of(model, store)
    anchors, positives = zip(*(row[:2] for row in ROWS), strict=True)
    assert labels[1, 0] != labels[2, 1]
    assert anchors[1] == positives[2]
    # So far below every score that the guide drops nothing.
    loss = make_loss(model, store, margin=-3.0)
    loss(features, labels)
    pairs = [(row, other) for row in range(len(ROWS)) for other in range(len(ROWS)) if row != other]
    for block, seen in {"ap": positives, "aa": anchors, "pp": positives}.items():
        same = sum(seen[other] in (anchors[row], positives[row]) for row, other in pairs)
        assert loss.last_stats[f"dropped/{block}"].item() == pytest.approx(same / len(pairs))


@BOTH
def test_single_row_has_no_candidates(pair_store: GuideStore, model: SentenceTransformer, make_loss: Loss) -> None:
    features, labels = batch_of(model, pair_store.to_dataset("train").select([0]))
    loss, gradient = gradients(make_loss(model, pair_store), features, labels)
    assert loss == 0
    assert not gradient.any()


def test_nothing_of_the_store_is_in_the_state(store: GuideStore, model: SentenceTransformer) -> None:
    loss = GISTLoss(model, store)
    assert loss.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
    batch = batch_of(model, store)
    assert_same(gradients(copy.deepcopy(loss), *batch), gradients(loss, *batch))


# The cached loss.


@pytest.mark.parametrize(
    "options",
    [
        {"mini_batch_size": 1},
        {"mini_batch_size": 5},
        {"mini_batch_size": 100},
        {"mini_batch_num_tokens": 16},
        {"margin": 0.05, "hard_only": True},
    ],
    ids=str,
)
def test_cached_gradient_is_the_uncached_one(
    store: GuideStore, model: SentenceTransformer, options: dict[str, Any]
) -> None:
    # In single precision the sums of mini-batches differ by rounding.
    batch = batch_of(model.double(), store)
    loss = cached(model, store, temperature=TEMPERATURE, **options)
    sizes = ("mini_batch_size", "mini_batch_num_tokens")
    plain = {name: value for name, value in options.items() if name not in sizes}
    expected = gradients(GISTLoss(model, store, temperature=TEMPERATURE, **plain), *batch)
    assert_same(gradients(loss, *batch), expected)


def test_cached_gradient_is_the_uncached_one_with_dropout(store: GuideStore, model: SentenceTransformer) -> None:
    set_dropout(model, 0.3)
    model.train()
    batch = batch_of(model, store)
    # One mini-batch a column draws what the uncached loss draws.
    whole = gradients(cached(model, store, temperature=TEMPERATURE, mini_batch_size=100), *batch)
    plain = GISTLoss(model, store, temperature=TEMPERATURE)
    assert_same(whole, gradients(plain, *batch))
    assert not torch.equal(whole[1], gradients(plain, *batch, seed=1)[1])


def test_mini_batches_are_embedded_again_with_the_same_dropout(store: GuideStore, model: SentenceTransformer) -> None:
    set_dropout(model, 0.3)
    model.train()
    features, labels = batch_of(model, store)
    loss = cached(model, store, temperature=TEMPERATURE)

    def with_graphs(columns: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        batches = (loss.embed_minibatch_iter(column, with_grad=True, copy_random_state=False) for column in columns)
        return loss.calculate_loss([[vectors for vectors, _ in column] for column in batches], labels)

    expected = gradients(ByHand(model, with_graphs), features, labels)
    assert_same(gradients(loss, features, labels), expected)


def test_cached_loss_needs_no_gradient(store: GuideStore, model: SentenceTransformer) -> None:
    batch = batch_of(model, store)
    with torch.no_grad():
        values = [make(model, store)(*batch) for make in (GISTLoss, cached)]
    assert not values[1].requires_grad
    torch.testing.assert_close(*values)


def test_later_batch_does_not_touch_the_gradient_of_an_earlier_one(
    store: GuideStore, model: SentenceTransformer
) -> None:
    features, labels = batch_of(model, store)
    loss = cached(model, store, temperature=TEMPERATURE)
    expected = gradients(loss, features, labels)
    loss.zero_grad()
    first = loss([dict(column) for column in features], labels)
    with torch.no_grad():
        loss([dict(column) for column in features], labels.flip(0))
    first.backward()
    found = torch.cat([weight.grad.flatten() for weight in loss.parameters() if weight.grad is not None])
    assert_same((first.detach(), found), expected)


# MatryoshkaLoss.


@BOTH
def test_matryoshka_adds_up_the_losses_of_shortened_vectors(
    store: GuideStore, model: SentenceTransformer, make_loss: Loss
) -> None:
    features, labels = batch_of(model, store)
    plain = GISTLoss(model, store, temperature=TEMPERATURE)

    def of_widths(columns: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        vectors = [model(column)["sentence_embedding"] for column in columns]
        losses = [plain._loss([vector[:, :width] for vector in vectors], labels) for width in (32, 16, 8)]
        return losses[0] + 0.5 * losses[1] + 2.0 * losses[2]

    loss = make_loss(model, store, temperature=TEMPERATURE)
    found = gradients(MatryoshkaLoss(model, loss, [32, 16, 8], [1.0, 0.5, 2.0]), features, labels)
    assert_same(found, gradients(ByHand(model, of_widths), features, labels), 1e-5)


@pytest.mark.parametrize("options", [{}, {"mini_batch_num_tokens": 16}, {"mini_batch_size": 1}], ids=str)
def test_tiny_tolerance_replays_the_whole_gradient(
    store: GuideStore, model: SentenceTransformer, options: dict[str, Any]
) -> None:
    batch = batch_of(model.double(), store)
    loss = cached(model, store, temperature=TEMPERATURE, replay_tolerance=1e-9, **options)
    assert_same(gradients(loss, *batch), gradients(GISTLoss(model, store, temperature=TEMPERATURE), *batch))
    # Negatives that every row drops carry nothing.
    assert 40 < loss.last_replay["texts"] < batch[1].numel()


def test_tolerance_leaves_texts_out(store: GuideStore, model: SentenceTransformer) -> None:
    batch = batch_of(model, store)
    whole = gradients(GISTLoss(model, store, temperature=TEMPERATURE), *batch)
    errors, counts = [], []
    for tolerance in (0.5, 0.1):
        loss = cached(model, store, temperature=TEMPERATURE, replay_tolerance=tolerance)
        value, gradient = gradients(loss, *batch)
        torch.testing.assert_close(value, whole[0])
        assert 0 < loss.last_replay["left_out"] <= tolerance
        counts.append(int(loss.last_replay["texts"]))
        errors.append((gradient - whole[1]).norm() / whole[1].norm())
    assert counts[0] < counts[1] < batch[1].numel()
    assert errors[0] > errors[1] > 0


def test_tolerance_trains_beside_matryoshka_and_evaluation(
    pair_store: GuideStore, train: Callable[..., Any], model: SentenceTransformer
) -> None:
    loss = MatryoshkaLoss(model, cached(model, pair_store, temperature=TEMPERATURE, replay_tolerance=0.1), [32, 8])
    held_out = pair_store.to_dataset("held_out")
    trainer = train(loss, pair_store.to_dataset("train"), eval_dataset=held_out, **WHOLE)
    losses = logged(trainer)
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] > 0


# In the trainer.


def texts_of(model: SentenceTransformer, column: dict[str, Tensor]) -> list[str]:
    texts: list[str] = model.tokenizer.batch_decode(column["input_ids"], skip_special_tokens=True)
    return texts


@BOTH
def test_trainer_gives_each_text_its_id(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    batches = record_batches(loss := make_loss(model, store))
    trainer = train(loss, store.to_dataset("train"))
    assert len(batches) == len(logged(trainer)) == 3
    for features, labels in batches:
        assert labels.shape == (4, 4)
        for column, ids in zip(features, labels.T, strict=True):
            stored = model.preprocess(store.texts.take(ids.numpy()))
            assert texts_of(model, column) == texts_of(model, stored)


def test_both_losses_take_the_same_steps(store: GuideStore, train: Callable[..., Any], tiny_student: Path) -> None:
    runs = []
    for make_loss in (GISTLoss, cached):
        student = SentenceTransformer(str(tiny_student), device="cpu")
        set_dropout(student, 0.0)
        loss = make_loss(student, store, temperature=TEMPERATURE)
        runs.append(logged(train(loss, store.to_dataset("train"), model=student, **WHOLE)))
    plain, other = runs
    assert plain[-1] < plain[0]
    assert other == pytest.approx(plain, rel=1e-3)


@BOTH
def test_streamed_rows_train(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    batches = record_batches(loss := make_loss(model, store))
    train(loss, store.to_dataset("train").to_iterable_dataset())
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.tensor(store.rows))


@BOTH
def test_batches_without_duplicates(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    batches = record_batches(loss := make_loss(model, store))
    train(loss, store.to_dataset("train"), batch_sampler=BatchSamplers.NO_DUPLICATES)
    assert len(batches) == 3
    for _, labels in batches:
        assert len(labels.unique()) == labels.numel()


@BOTH
def test_several_datasets_with_a_store_each(
    store: GuideStore,
    pair_store: GuideStore,
    train: Callable[..., Any],
    model: SentenceTransformer,
    make_loss: Loss,
) -> None:
    losses = {"rows": make_loss(model, store), "pairs": make_loss(model, pair_store)}
    batches = {name: record_batches(loss) for name, loss in losses.items()}
    rows = DatasetDict(rows=store.to_dataset("train"), pairs=pair_store.to_dataset("train"))
    held_out = {"pairs": pair_store.to_dataset("held_out")}
    trainer = train(losses, rows, max_steps=4, eval_dataset=held_out, multi_dataset_batch_sampler="round_robin")
    assert [labels.shape[1] for _, labels in batches["rows"]] == [4, 4]
    assert [labels.shape[1] for _, labels in batches["pairs"]] == [2, 2]
    assert trainer.evaluate()["eval_pairs_loss"] > 0


@BOTH
def test_several_datasets_of_one_store(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    rows = store.to_dataset("train")
    pairs = rows.select_columns(["anchor", "positive"])
    pairs = pairs.add_column("label", [ids[:2] for ids in rows["label"]])
    parts = DatasetDict(rows=rows, pairs=pairs)
    batches = record_batches(loss := make_loss(model, store))
    train(loss, parts, max_steps=4, multi_dataset_batch_sampler="round_robin")
    assert sorted(labels.shape[1] for _, labels in batches) == [2, 2, 4, 4]


@BOTH
def test_matryoshka_trains(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    loss = MatryoshkaLoss(model, make_loss(model, store, temperature=TEMPERATURE), [32, 8])
    losses = logged(train(loss, store.to_dataset("train"), **WHOLE))
    assert losses[-1] < losses[0]


@BOTH
def test_evaluation_gives_the_loss_of_held_out_rows(
    pair_store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    held_out = pair_store.to_dataset("held_out")
    assert len(held_out) > 1
    loss = make_loss(model, pair_store, temperature=TEMPERATURE)
    trainer = train(
        loss,
        pair_store.to_dataset("train"),
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=len(held_out),
    )
    model.eval()
    with torch.no_grad():
        expected = loss(*batch_of(model, held_out)).item()
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(expected, rel=1e-5)


@BOTH
def test_resumed_run_ends_as_an_undisturbed_one(
    store: GuideStore, train: Callable[..., Any], tiny_student: Path, tmp_path: Path, make_loss: Loss
) -> None:
    """With the student's own dropout."""

    def run(out: str, resume: str | None = None) -> tuple[Tensor, list[float]]:
        student = SentenceTransformer(str(tiny_student), device="cpu")
        student.model_card_data.local_files_only = True
        trainer = train(
            make_loss(student, store),
            store.to_dataset("train"),
            model=student,
            resume=resume,
            output_dir=str(tmp_path / out),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        return torch.cat([weight.detach().flatten() for weight in student.parameters()]), logged(trainer)

    undisturbed, losses = run("run")
    resumed, resumed_losses = run("resumed", str(tmp_path / "run" / "checkpoint-2"))
    assert len(losses) == 4
    assert resumed_losses == losses
    assert torch.equal(resumed, undisturbed)


@BOTH
def test_half_precision_trains(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    loss = make_loss(model, store, temperature=TEMPERATURE)
    exact = loss(*batch_of(model, store)).item()
    losses = logged(train(loss, store.to_dataset("train"), bf16=True, **WHOLE))
    assert losses[0] == pytest.approx(exact, rel=0.05)
    assert losses[-1] < losses[0]


@BOTH
def test_model_card_names_guide_options_and_paper(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, tmp_path: Path, make_loss: Loss
) -> None:
    loss = make_loss(model, store, margin=0.05)
    train(loss, store.to_dataset("train"), max_steps=1)
    model.save_pretrained(str(tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    for fact in (f"{type(loss).__module__}.{type(loss).__name__}", '"margin": 0.05', store.fingerprint, "2402.16829"):
        assert fact in card


# What is refused.


@pytest.fixture(params=[GISTLoss, cached], ids=["plain", "cached"])
def refused(
    request: pytest.FixtureRequest, store: GuideStore, model: SentenceTransformer
) -> Callable[[Tensor | None, type[GistfastError]], str]:
    """What the loss says to labels: one line."""

    def message(labels: Tensor | None, error: type[GistfastError]) -> str:
        with pytest.raises(error) as caught:
            request.param(model, store)(batch_of(model, store)[0], labels)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


Refused = Callable[[Tensor | None, type[GistfastError]], str]
IDS = torch.arange(48).view(12, 4)


def test_missing_labels_are_named(refused: Refused) -> None:
    assert "was given no labels: the dataset needs a column `label`" in refused(None, ConfigError)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (IDS[:, :3], r"shape (12, 3) and dtype torch.int64, the batch has 12 rows of 4 columns"),
        (IDS[:, 0], r"shape (12,)"),
        (IDS[:6], r"shape (6, 4)"),
        (IDS[None], r"shape (1, 12, 4)"),
        (IDS.float(), r"dtype torch.float32"),
    ],
    ids=["columns", "scores", "rows", "vectors", "fractions"],
)
def test_labels_that_do_not_fit_are_named(refused: Refused, labels: Tensor, found: str) -> None:
    message = refused(labels, ShapeError)
    assert found in message
    assert "give one text id for each column" in message


@pytest.mark.parametrize("wrong", [-1, 1000])
def test_ids_outside_the_store_are_named(refused: Refused, store: GuideStore, wrong: int) -> None:
    labels = torch.tensor(store.rows)
    labels[3, 1] = wrong
    message = refused(labels, StoreError)
    assert f"{wrong}" in message
    assert f"which holds {store.num_texts} texts" in message


def test_one_column_is_not_enough(store: GuideStore, model: SentenceTransformer) -> None:
    features, labels = batch_of(model, store)
    with pytest.raises(ShapeError, match="at least an anchor and a positive"):
        GISTLoss(model, store)(features[:1], labels[:, :1])


@BOTH
def test_trainer_shows_what_is_missing(
    store: GuideStore, train: Callable[..., Any], model: SentenceTransformer, make_loss: Loss
) -> None:
    rows = store.to_dataset("train").remove_columns("label")
    with pytest.raises(ConfigError, match="was given no labels"):
        train(make_loss(model, store), rows)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"margin": float("nan")},
        {"margin_strategy": "both"},
        {"mini_batch_size": 0},
        {"mini_batch_num_tokens": 0},
        {"replay_tolerance": 1.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(store: GuideStore, model: SentenceTransformer, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"^{name} is "):
        CachedGISTLoss(model, store, **options)


def test_static_embeddings_cannot_be_cached(store: GuideStore, model: SentenceTransformer) -> None:
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=16)], device="cpu")
    batch = batch_of(static, store)
    assert GISTLoss(static, store)(*batch) > 0
    with pytest.raises(ConfigError, match="StaticEmbedding"):
        CachedGISTLoss(static, store)
