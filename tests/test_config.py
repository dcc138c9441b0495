import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from gistfast.errors import ConfigError
from gistfast.settings.base import Settings, choices_of, column_names, comma_separated
from gistfast.settings.stages import (
    EvaluateSettings,
    PrecomputeSettings,
    QuickstartSettings,
    TrainSettings,
    build,
    to_dict,
)

PRECOMPUTE = {"source": "pairs.jsonl", "guide": "guide", "out": "store"}
TRAIN = {"store": "store", "student": "student", "out": "trained"}
ALL = [PrecomputeSettings, TrainSettings, EvaluateSettings, QuickstartSettings]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_setting_has_help_that_is_a_sentence(cls: type[Settings]) -> None:
    for item in fields(cls):
        assert item.metadata["help"][0].isupper(), item.name
        assert item.metadata["help"].endswith("."), item.name


def test_defaults_are_valid() -> None:
    build(PrecomputeSettings, PRECOMPUTE)
    build(TrainSettings, TRAIN)
    build(EvaluateSettings, {"model": "model", "store": "store"})
    build(QuickstartSettings, {})


def test_required_settings_have_no_default() -> None:
    required = {item.name for item in fields(TrainSettings) if item.default is MISSING}
    assert required == {"store", "student", "out"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -1.0, "--temperature must be above 0, found -1.0"),
        ("temperature", float("nan"), "--temperature must be above 0, found nan"),
        ("seed", 2**32, "--seed must be at most 4294967295, found 4294967296"),
        ("epochs", float("inf"), "--epochs must be finite, found inf"),
        (
            "learning_rates",
            {"head": float("inf")},
            "--learning-rates: head must have a finite rate of at least 0, found inf",
        ),
        ("temperature", "hot", "--temperature must be a number, found 'hot'"),
        ("batch_size", 1, "--batch-size must be at least 2, found 1"),
        ("batch_size", 8.5, "--batch-size must be a whole number, found 8.5"),
        ("batch_size", True, "--batch-size must be a whole number, found True"),
        ("bf16", 1, "--bf16 must be true or false, found 1"),
        ("backend", "cuda", "--backend must be one of auto, reference, chunked, triton, found 'cuda'"),
        ("trackers", "mlflow", "--trackers knows tensorboard, wandb and trackio, found mlflow"),
        ("keep_layers", "0,x", "--keep-layers must be numbers like 0,1,2, found '0,x'"),
        ("store", 7, "STORE must be text or a list, found 7"),
        ("store", ["a", 7], "STORE must be text, found 7"),
        ("store", ["a", None], "STORE must be text, found None"),
        ("store", [], "STORE is needed: give the folder of a guide store, or of several"),
        ("mixing", "round_robin", "--mixing round_robin does nothing with one store: leave it out"),
        ("keep_layers", [0, "x"], "--keep-layers must be a whole number, found 'x'"),
    ],
)
def test_bad_value_is_refused_with_its_flag(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(TrainSettings, {**TRAIN, name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shards": "8/8"}, "--shards must be a part like 0/8, the first of eight, to 7/8, the last; found '8/8'"),
        ({"shards": "0-8"}, "--shards must be a part like 0/8, the first of eight, to 7/8, the last; found '0-8'"),
        ({"shards": (3, 2)}, "--shards must be a part like 0/8, the first of eight, to 7/8, the last; found (3, 2)"),
        ({"shards": "0/8", "rows_only": True}, "--shards and --rows-only contradict each other: give one of them"),
        ({"processes": 0}, "--processes must be at least 1, found 0"),
        ({"address": "auto"}, "--address auto is of a Ray cluster: add --engine ray, or leave it out"),
        (
            {"engine": "ray", "device": "cuda:1"},
            "--device cuda:1: Ray chooses the GPU of each process: give auto, cpu or cuda",
        ),
    ],
)
def test_bad_choice_of_workers_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(PrecomputeSettings, {**PRECOMPUTE, **given})
    assert str(caught.value) == message


def test_part_of_the_shards_is_read_from_text() -> None:
    settings = build(PrecomputeSettings, {**PRECOMPUTE, "shards": "3/8"})
    assert settings.shards == (3, 8)
    # As workers and records are given it.
    assert build(PrecomputeSettings, json.loads(json.dumps(to_dict(settings)))) == settings


def test_device_that_no_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device must be auto, cpu, cuda or cuda:N, found 'gpu'"):
        build(PrecomputeSettings, {**PRECOMPUTE, "device": "gpu"})
    assert build(PrecomputeSettings, {**PRECOMPUTE, "device": "cuda:1"}).device == "cuda:1"


def test_holdout_of_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="--holdout must be below 1"):
        build(PrecomputeSettings, {**PRECOMPUTE, "holdout": 1.0})


def test_unknown_setting_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'batchsize': did you mean 'batch_size'"):
        build(TrainSettings, {**TRAIN, "batchsize": 8})


def test_missing_setting_is_named_with_its_help() -> None:
    with pytest.raises(ConfigError, match="--guide is needed: Guide model"):
        build(PrecomputeSettings, {"source": "pairs.jsonl", "out": "store"})


@pytest.mark.parametrize(("cls", "values"), [(PrecomputeSettings, PRECOMPUTE), (TrainSettings, TRAIN)])
def test_resume_and_overwrite_contradict_each_other(cls: type[Settings], values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--resume and --overwrite contradict each other"):
        build(cls, {**values, "resume": True, "overwrite": True})


def test_half_a_retrieval_test_is_refused() -> None:
    with pytest.raises(ConfigError, match="give all three"):
        build(EvaluateSettings, {"model": "model", "queries": "queries.jsonl"})


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        build(EvaluateSettings, {"model": "model"})


def test_text_and_values_build_equal_settings() -> None:
    from_text = build(TrainSettings, {**TRAIN, "keep_layers": "0, 1,2", "trackers": "none"})
    from_values = build(TrainSettings, {**TRAIN, "keep_layers": [0, 1, 2], "trackers": ()})
    assert from_text == from_values
    assert from_text.keep_layers == (0, 1, 2)
    assert from_text.trackers == ()


def test_path_becomes_text() -> None:
    assert build(EvaluateSettings, {"model": Path("a") / "b", "store": "store"}).model == "a/b"


def test_one_store_and_several_are_the_same_setting() -> None:
    for given in ("a/b", Path("a/b"), ["a/b"], (Path("a") / "b",)):
        assert build(TrainSettings, {**TRAIN, "store": given}).store == ("a/b",)
    assert build(TrainSettings, {**TRAIN, "store": [Path("a"), "b"]}).store == ("a", "b")


def test_saved_settings_build_the_same_settings() -> None:
    settings = build(TrainSettings, {**TRAIN, "keep_layers": "0,1,2", "max_steps": 5})
    assert build(TrainSettings, json.loads(json.dumps(to_dict(settings)))) == settings


def test_columns_map_our_names_to_theirs() -> None:
    assert column_names("anchor=title, positive=body") == {"anchor": "title", "positive": "body"}
    for wrong in ("title", "anchor=", "=title", ""):
        with pytest.raises(ConfigError, match="--columns must look like"):
            column_names(wrong)


def test_comma_separated_text_drops_blanks() -> None:
    assert comma_separated("a, b,") == ("a", "b")
    assert comma_separated("none") == comma_separated("") == ()


def test_choices_are_read_from_literals() -> None:
    from typing import Literal

    assert choices_of(Literal["a", "b"] | None) == ("a", "b")
    assert choices_of(str | None) == ()
