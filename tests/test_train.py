import errno
import gc
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_cases import at_step, records, same_weights, steps, weights, without_clock

from gistfast.errors import ConfigError, DependencyError, GistfastError, ModelError, StoreError
from gistfast.stages.precompute import precompute
from gistfast.stages.train import TrainReport, train
from gistfast.store import GuideStore
from gistfast.training.modelcard import add_section

ROWS = [
    ("car", "a motor vehicle with four wheels", "a vehicle with two wheels", "a boat with sails"),
    ("automobile", "a motor vehicle with four wheels", "a toy on wheels", "a road for vehicles"),
    ("river", "a large natural stream of water", "a lake in the hills", "a drink of water"),
    ("violin", "a bowed stringed instrument", "a brass instrument", "a song without words"),
    ("fiddle", "a bowed stringed instrument", "a stringed toy", "a bow and its arrow"),
    ("to sleep", "be at rest with the mind and body switched off", "be awake", "lie down to read"),
    ("bread", "food made from dough of flour and water", "cake with sugar", "flour of wheat"),
    ("staff of life", "food made from dough of flour and water", "a walking stick", "a crew"),
    ("bank", "a financial institution that accepts deposits", "a payment", "a thief"),
    ("bank", "sloping land beside a body of water", "a bridge over water", "flat land"),
    ("oak", "a tree that bears acorns", "a tree that bears cones", "a wooden table"),
    ("judge", "a public official who decides cases in court", "a lawyer", "a police station"),
]


def make_store(folder: Path, guide: Path, *, columns: int = 2, **options: Any) -> GuideStore:
    names = ("anchor", "positive", "negative_1", "negative_2")[:columns]
    lines = [json.dumps(dict(zip(names, row, strict=False))) for row in ROWS]
    source = folder / "pairs.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    return precompute(source, guide=guide, out=folder / "store", index="none", device="cpu", **options)


@pytest.fixture(scope="module")
def store(guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GuideStore:
    """Twelve pairs, some of which are held out."""
    return make_store(tmp_path_factory.mktemp("pairs"), guide_folder, holdout=0.2)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """The trainer collects garbage as it begins: half a second a run, unless imports are left out of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def train_small(**options: Any) -> TrainReport:
    """A run of a few steps on the CPU."""
    defaults: dict[str, Any] = {
        "epochs": 2.0,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 0,
        "trackers": (),
        "picture": False,
        "device": "cpu",
    }
    return train(**defaults | options)


@pytest.fixture
def run(store: GuideStore, tiny_student: Path, tmp_path: Path) -> Callable[..., TrainReport]:
    """Training with small settings, into tmp_path/"student" unless told otherwise."""
    return partial(train_small, store=store.path, student=tiny_student, out=tmp_path / "student")


@pytest.fixture(scope="module")
def plain(store: GuideStore, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    """A run with the small settings alone."""
    out = tmp_path_factory.mktemp("plain") / "student"
    return train_small(store=store.path, student=tiny_student, out=out)


@pytest.fixture(scope="module")
def without_dropout(store: GuideStore, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    """A run in which nothing is drawn but the order of the rows."""
    out = tmp_path_factory.mktemp("plain") / "student"
    return train_small(store=store.path, student=tiny_student, out=out, dropout=0.0)


def fail() -> None:
    raise RuntimeError("the power went")


# What a run leaves.


def test_trained_folder_is_a_sentence_transformer(plain: TrainReport, store: GuideStore, tiny_student: Path) -> None:
    report = plain
    num_rows = int((~store.held_out).sum())
    assert report.rows == num_rows
    assert report.steps == 2 * -(-num_rows // 3)
    assert SentenceTransformer(str(report.path), device="cpu").encode(["oak"]).shape == (1, 32)
    assert not same_weights(report.path, tiny_student)
    assert json.loads((report.path / "report.json").read_text())["loss"] == report.loss
    assert not list(report.path.glob("*.bin"))


def test_log_has_loss_and_dropped_shares_of_each_step(plain: TrainReport) -> None:
    log = steps(plain.path)
    assert [record["step"] for record in log] == list(range(1, plain.steps + 1))
    for record in log:
        assert record["loss"] >= 0
        assert {name for name in record if name.startswith("dropped/")} == {
            "dropped/ap",
            "dropped/aa",
            "dropped/pp",
        }
    assert plain.dropped["ap"] == pytest.approx(sum(record["dropped/ap"] for record in log) / len(log))


def test_log_counts_what_a_step_embeds(plain: TrainReport) -> None:
    for record in steps(plain.path):
        assert 0 < record["tokens"] <= record["padded_tokens"]
        assert 3 <= record["distinct_texts"] <= record["texts"] <= 2 * 3
        assert record["texts"] == 2 * record["rows"]
        assert record["padding"] == pytest.approx(1 - record["tokens"] / record["padded_tokens"], abs=1e-4)


def test_log_has_the_student_s_scores_of_own_positives_and_hardest_candidates(plain: TrainReport) -> None:
    log = steps(plain.path)
    assert all(-1 <= record[name] <= 1 for record in log for name in ("score/positive", "score/hardest"))
    gaps = [record["score/positive"] - record["score/hardest"] for record in log]
    assert gaps[-1] > gaps[0]


def test_log_has_the_pace_of_each_step(plain: TrainReport) -> None:
    for record in steps(plain.path):
        assert 0 < record["data_wait_ms"] < record["step_ms"]
        for rate, count in (("tokens_per_s", "tokens"), ("pairs_per_s", "rows")):
            assert record[rate] == pytest.approx(1000 * record[count] / record["step_ms"], rel=0.01)
        assert record["peak_mib"] > 100


def test_card_states_guide_store_data_and_settings(
    run: Callable[..., TrainReport], store: GuideStore, tiny_student: Path
) -> None:
    card = (run(temperature=0.05).path / "README.md").read_text()
    section = card[card.index("## Guided Training") : card.index("## Training Details")]
    for fact in (
        store.manifest.guide.name,
        store.fingerprint,
        store.manifest.guide.weights_hash,
        "pairs.jsonl",
        store.manifest.data.fingerprint,
        "`temperature`: 0.05",
        "`student`: " + "/".join(tiny_student.parts[-2:]),
    ):
        assert fact in section
    assert str(tiny_student) not in card


def test_section_makes_a_card_where_there_is_none(tmp_path: Path) -> None:
    add_section(tmp_path / "README.md", "## Guided Training\n")
    assert (tmp_path / "README.md").read_text() == "## Guided Training\n"


def test_negatives_are_candidates(run: Callable[..., TrainReport], guide_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    report = run(store=make_store(folder, guide_folder, columns=4).path)
    assert set(report.dropped) == {"ap", "aa", "pp", "an"}


def test_mined_negatives_are_candidates(run: Callable[..., TrainReport], guide_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    plain = make_store(folder, guide_folder)
    with pytest.raises(StoreError, match="has no mined negatives"):
        run(store=plain.path, mined_negatives=1)
    store = make_store(folder, guide_folder, negatives=2, resume=True)
    with pytest.raises(ConfigError, match="3 mined negatives are asked for"):
        run(store=store.path, mined_negatives=3)
    assert not (tmp_path / "student").exists()
    report = run(store=store.path, mined_negatives=2, workers=1)
    assert set(report.dropped) == {"ap", "aa", "pp", "an"}
    make_store(folder, guide_folder, negatives=2, negatives_margin=0.2, resume=True)
    with pytest.raises(ConfigError, match="the negatives of the store were mined otherwise"):
        run(store=store.path, mined_negatives=2, workers=1, resume=True)


def test_evaluation_is_in_log_and_report(run: Callable[..., TrainReport]) -> None:
    report = run(eval_steps=2)
    evaluated = [record for record in records(report.path) if "eval_loss" in record]
    # Before the first step, too.
    assert [record["step"] for record in evaluated] == list(range(0, report.steps + 1, 2))
    assert set(report.evaluation) == {"loss", "ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100"}
    assert report.evaluation["ndcg@10"] == evaluated[-1]["eval_held_out_cosine_ndcg@10"]


# What settings do.


def test_seed_decides_everything(plain: TrainReport, run: Callable[..., TrainReport], tmp_path: Path) -> None:
    assert same_weights(plain.path, run().path)
    assert not same_weights(plain.path, run(out=tmp_path / "other", seed=2).path)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.1},
        {"margin": 0.2},
        {"margin": 0.5, "margin_strategy": "relative"},
        {"contrast_anchors": False},
        {"contrast_positives": False},
        {"hard_only": True},
        {"learning_rate": 1e-4},
        {"warmup": 0.5},
        {"dropout": 0.5},
        {"max_steps": 2},
        {"batch_size": 5},
        {"max_length": 4},
        {"query_prompt": "search for a word: "},
        {"document_prompt": "a definition: "},
        {"bf16": True},
        {"cached": True, "replay_tolerance": 0.5},
        {"cached": True, "replay_tolerance": 0.5, "replay_unbiased": True},
    ],
    ids=lambda option: ",".join(option),
)
def test_setting_changes_the_student(
    option: dict[str, Any], plain: TrainReport, run: Callable[..., TrainReport]
) -> None:
    assert not same_weights(plain.path, run(**option).path)


@pytest.mark.parametrize(
    "option",
    [
        {"tokens_per_forward": 16},
        {"cached": True, "tokens_per_forward": 16},
        {"cached": True, "replay_tolerance": 1e-6},
        {"gradient_checkpointing": True},
        {"backend": "reference"},
    ],
    ids=lambda option: ",".join(option),
)
def test_setting_changes_memory_but_not_the_losses(
    option: dict[str, Any], without_dropout: TrainReport, run: Callable[..., TrainReport]
) -> None:
    changed = run(dropout=0.0, **option)
    expected = torch.tensor([record["loss"] for record in steps(without_dropout.path)])
    found = torch.tensor([record["loss"] for record in steps(changed.path)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_replay_is_logged(run: Callable[..., TrainReport]) -> None:
    log = steps(run(cached=True, replay_tolerance=0.5).path)
    assert all(1 <= record["replayed_texts"] <= record["distinct_texts"] for record in log)
    assert any(record["replayed_texts"] < record["distinct_texts"] for record in log)
    assert all(0 <= record["replay_left_out"] <= 0.5 for record in log)


def test_student_of_static_embeddings_trains(
    run: Callable[..., TrainReport], tiny_student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = SentenceTransformer(str(tiny_student), device="cpu").tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    static.save(str(tmp_path / "static"))
    with caplog.at_level(logging.INFO, "gistfast"):
        path = run(student=tmp_path / "static", learning_rate=0.1, epochs=8.0).path
    assert "takes texts without padding" in caplog.text
    log = steps(path)
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(record["padded_tokens"] == record["tokens"] for record in log)
    assert SentenceTransformer(str(path), device="cpu").encode(["oak"]).shape == (1, 16)


def test_loader_processes_change_nothing(plain: TrainReport, run: Callable[..., TrainReport]) -> None:
    assert same_weights(plain.path, run(workers=1).path)


def test_prompts_are_saved_with_the_student(run: Callable[..., TrainReport]) -> None:
    prompts = {"query_prompt": "word: ", "document_prompt": "meaning: "}
    student = SentenceTransformer(str(run(**prompts).path), device="cpu")
    assert (student.prompts["query"], student.prompts["document"]) == ("word: ", "meaning: ")


def test_students_own_prompts_are_used_unless_told_otherwise(
    run: Callable[..., TrainReport], tiny_student: Path, tmp_path: Path
) -> None:
    student = SentenceTransformer(str(tiny_student), device="cpu")
    student.prompts = {"query": "word: ", "passage": "meaning: "}
    student.save(str(tmp_path / "prompted"))
    own = run(student=tmp_path / "prompted", out=tmp_path / "own").path
    given = run(query_prompt="word: ", document_prompt="meaning: ", out=tmp_path / "given").path
    assert same_weights(own, given)


def test_student_is_cut_and_saved_as_a_valid_model(run: Callable[..., TrainReport], guide_folder: Path) -> None:
    path = run(student=guide_folder, keep_layers=(0,), max_steps=1).path
    student = SentenceTransformer(str(path), device="cpu")
    assert student.config.num_hidden_layers == len(student.transformers_model.encoder.layer) == 1


# Stopping and going on.


@pytest.mark.parametrize(
    "option",
    [
        {},
        {"workers": 2},
        {"cached": True},
        {"cached": True, "replay_tolerance": 0.5, "replay_unbiased": True},
    ],
    ids=lambda option: ",".join(option),
)
def test_interrupted_run_resumes_to_the_weights_of_an_undisturbed_one(
    option: dict[str, Any], run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    run = partial(run, epochs=3.0, **option)
    undisturbed = run(out=tmp_path / "undisturbed")
    # In the second of three epochs, with dropout, so that both orders of rows and draws must be restored.
    interrupted_at = undisturbed.steps // 2
    with (
        at_step(interrupted_at, lambda: signal.raise_signal(signal.SIGINT)),
        pytest.raises(KeyboardInterrupt, match=f"after step {interrupted_at}"),
    ):
        run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "student" / "checkpoints" / f"checkpoint-{interrupted_at}").is_dir()
    resumed = run(resume=True)
    assert same_weights(undisturbed.path, resumed.path)
    assert without_clock(steps(undisturbed.path)) == without_clock(steps(resumed.path))


def test_second_interrupt_stops_at_once(run: Callable[..., TrainReport]) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with at_step(2, twice), pytest.raises(KeyboardInterrupt):
        run()


def test_killed_run_resumes_from_its_last_whole_checkpoint(
    plain: TrainReport, run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    with at_step(4, fail), pytest.raises(RuntimeError, match="the power went"):
        run(save_steps=2)
    # A checkpoint whose writing was cut short.
    (tmp_path / "student" / "checkpoints" / "checkpoint-3").mkdir()
    resumed = run(save_steps=2, resume=True)
    assert same_weights(plain.path, resumed.path)
    # Step 3 was logged before the kill, and again after it.
    assert [record["step"] for record in steps(resumed.path)] == list(range(1, resumed.steps + 1))


def test_resume_begins_anew_where_nothing_was_saved(
    run: Callable[..., TrainReport], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gistfast"):
        run(resume=True)
    assert "found no checkpoint to resume" in caplog.text


def test_complete_run_is_not_trained_again(run: Callable[..., TrainReport]) -> None:
    report = run()
    with at_step(1, fail):
        assert run(resume=True) == report


def test_resuming_with_other_settings_names_the_setting(run: Callable[..., TrainReport]) -> None:
    run()
    with pytest.raises(ConfigError, match=r"--learning-rate was 0\.001, found 0\.5"):
        run(resume=True, learning_rate=0.5)


def test_resuming_with_another_store_is_refused(
    run: Callable[..., TrainReport], store: GuideStore, guide_folder: Path, tmp_path: Path
) -> None:
    run()
    folder = tmp_path / "rows"
    folder.mkdir()
    other = make_store(folder, guide_folder, holdout=0.2, query_prompt="word: ")
    with pytest.raises(ConfigError, match="guide of the store had query_prompt '', found 'word: '"):
        run(resume=True, store=other.path)


def test_full_disk_is_one_line_and_loses_nothing(
    plain: TrainReport, run: Callable[..., TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        at_step(3, lambda: patch.setattr(SentenceTransformer, "save_pretrained", full)),
        pytest.raises(GistfastError, match="is full: make room") as caught,
    ):
        run(save_steps=2)
    assert "\n" not in str(caught.value)
    assert same_weights(plain.path, run(save_steps=2, resume=True).path)


def test_folder_that_is_removed_during_the_run_is_one_line(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    with (
        at_step(3, lambda: shutil.rmtree(tmp_path / "student")),
        pytest.raises(GistfastError, match="was removed or renamed while the run wrote to it") as caught,
    ):
        run()
    assert "\n" not in str(caught.value)


def test_run_killed_before_its_last_file_is_only_saved_again(
    run: Callable[..., TrainReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four steps end in the middle of an epoch.
    undisturbed = run(out=tmp_path / "undisturbed", max_steps=4)
    monkeypatch.setattr("gistfast.stages.train.add_section", lambda card, section: fail())
    with pytest.raises(RuntimeError, match="the power went"):
        run(max_steps=4, save_steps=2)
    monkeypatch.undo()
    with at_step(1, fail):
        resumed = run(max_steps=4, save_steps=2, resume=True)
    assert (resumed.steps, resumed.loss) == (undisturbed.steps, undisturbed.loss)
    assert same_weights(undisturbed.path, resumed.path)


# Bad input: one line, nothing written.


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"batch_size": 50}, ConfigError, r"--batch-size 50 is larger than the data: .* rows to train on"),
        ({"temperature": 0.0}, ConfigError, r"--temperature must be above 0, found 0\.0"),
        ({"temperature": -1.0}, ConfigError, r"--temperature must be above 0, found -1\.0"),
        ({"student": "gistfast-tests/none"}, ModelError, "the hub cannot be reached"),
        ({"student": "/no/such/folder"}, ModelError, "is not a folder"),
        ({"store": "/no/such/store"}, StoreError, "no store.json"),
        ({"keep_layers": (0, 7)}, ConfigError, "--keep-layers"),
        ({"learning_rat": 1.0}, ConfigError, "did you mean 'learning_rate'"),
        ({"device": "cuda"}, ConfigError, "--device cuda"),
        ({"trackers": ("wandb",)}, DependencyError, "pip install wandb"),
        ({"trackers": ("trackio",)}, DependencyError, "pip install trackio"),
        ({"trackers": ("mlflow",)}, ConfigError, "--trackers knows tensorboard, wandb and trackio"),
        ({"resume": True, "overwrite": True}, ConfigError, "contradict each other"),
        ({"replay_tolerance": 0.1}, ConfigError, "--replay-tolerance does nothing without --cached"),
        ({"cached": True, "replay_unbiased": True}, ConfigError, "--replay-unbiased does nothing without"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(
    option: dict[str, Any],
    error: type[GistfastError],
    message: str,
    run: Callable[..., TrainReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("gistfast.training.callbacks.find_spec", lambda name: None)
    with pytest.raises(error, match=message) as caught:
        run(**option)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "student").exists()


def test_student_folder_that_is_not_a_model_is_refused(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not a model"):
        run(student=tmp_path / "empty")
    assert not (tmp_path / "student").exists()


def test_unfinished_store_is_refused(run: Callable[..., TrainReport], guide_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    unfinished = make_store(folder, guide_folder)
    next((unfinished.path / "commits").glob("vectors*")).unlink()
    with pytest.raises(StoreError, match="has lost 1 of its shards of vectors: run `gistfast store repair"):
        run(store=unfinished.path)
    (unfinished.path / "store.json").rename(unfinished.path / "next.json")
    with pytest.raises(StoreError, match="stage 1 has 0 of 1 shards of vectors: run `gistfast precompute"):
        run(store=unfinished.path)


def test_evaluation_without_held_out_rows_is_refused(
    run: Callable[..., TrainReport], guide_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    with pytest.raises(ConfigError, match="--eval-steps needs held-out rows"):
        run(store=make_store(folder, guide_folder).path, eval_steps=2)


def test_replaced_run_comes_back_where_the_new_one_takes_no_step(
    run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    before = weights(run().path)
    (tmp_path / "student" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        run(overwrite=True, backend="triton")
    after = weights(tmp_path / "student")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert (tmp_path / "student" / "notes.txt").is_file()
    assert (tmp_path / "student" / "report.json").is_file()
    run(overwrite=True)
    assert not (tmp_path / "student" / "notes.txt").exists()
    assert not (tmp_path / "student" / "replaced").exists()


def test_run_that_takes_no_step_leaves_nothing(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        run(backend="triton")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("what", ["store", "student"])
def test_what_the_run_is_made_from_is_not_replaced(
    what: str, run: Callable[..., TrainReport], tiny_student: Path, store: GuideStore, tmp_path: Path
) -> None:
    inside = shutil.copytree({"store": store.path, "student": tiny_student}[what], run().path / what)
    with pytest.raises(ConfigError, match=f"--overwrite would remove {inside}"):
        run(overwrite=True, **{what: inside})
    assert (tmp_path / "student" / "report.json").is_file()


def test_folder_that_cannot_be_made_is_one_line(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file/student: Not a directory"):
        run(out=tmp_path / "file" / "student")


@pytest.mark.parametrize("record", ["{}", "[]", '{"settings": 3, "store": {}}'])
def test_record_of_something_else_is_refused(record: str, run: Callable[..., TrainReport], tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "gistfast.json").write_text(record)
    with pytest.raises(
        ConfigError, match=r"gistfast\.json is no record of a training run: start anew with --overwrite"
    ):
        run(resume=True)


def test_checkpoint_whose_state_is_empty_is_passed_over(run: Callable[..., TrainReport], tmp_path: Path) -> None:
    undisturbed = run(out=tmp_path / "undisturbed")
    report = run(save_steps=2)
    (report.path / "report.json").unlink()
    (report.path / "checkpoints" / f"checkpoint-{report.steps}" / "trainer_state.json").write_text("")
    assert same_weights(undisturbed.path, run(save_steps=2, resume=True).path)


def test_existing_run_is_kept_unless_told_otherwise(run: Callable[..., TrainReport]) -> None:
    report = run()
    with pytest.raises(ConfigError, match="holds a training run: go on with --resume or replace it with"):
        run()
    # Refused before the old run is touched.
    with pytest.raises(ModelError):
        run(overwrite=True, student="/no/such/folder")
    assert (report.path / "model.safetensors").is_file()
    replaced = run(overwrite=True, seed=7)
    assert replaced.loss != report.loss
    assert replaced == replace(report, loss=replaced.loss, dropped=replaced.dropped, elapsed_s=replaced.elapsed_s)


@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}])
def test_folder_with_other_files_is_never_touched(
    option: dict[str, Any], run: Callable[..., TrainReport], tmp_path: Path
) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds files, but no training run"):
        run(**option)
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["thesis.tex"]


# Trackers.


def test_tensorboard_is_written_where_it_is_installed(run: Callable[..., TrainReport]) -> None:
    report = run(trackers=None)
    events = EventAccumulator(str(report.path / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([record["loss"] for record in steps(report.path)])
    assert "train/dropped/ap" in events.Tags()["scalars"]


def test_missing_tensorboard_is_said_once(
    run: Callable[..., TrainReport], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gistfast.training.callbacks.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "gistfast"):
        report = run(trackers=None)
    assert caplog.text.count("TensorBoard is not installed") == 1
    assert steps(report.path)
    assert not (report.path / "tensorboard").exists()
