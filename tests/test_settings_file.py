import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gistfast.cli.options import command
from gistfast.errors import ConfigError
from gistfast.settings.file import read_settings_file
from gistfast.settings.stages import TrainSettings, build, to_dict

YAML = """
store: guide-store
student: small-model
out: run
learning-rate: 2e-5
batch_size: 128
trackers: [wandb, tensorboard]
bf16: true
max_steps: null
"""


def train(*arguments: str) -> tuple[list[TrainSettings], int, str]:
    """What `gistfast train` would run with these arguments."""
    seen: list[TrainSettings] = []
    app = typer.Typer()
    app.command()(command(TrainSettings, seen.append))
    result = CliRunner().invoke(app, list(arguments))
    return seen, result.exit_code, result.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(YAML)
    return path


def test_file_holds_what_would_stand_on_the_command_line(file: Path) -> None:
    (settings,), code, _ = train("--config", str(file))
    assert code == 0
    assert settings == TrainSettings(
        store=("guide-store",),
        student="small-model",
        out="run",
        learning_rate=2e-5,
        batch_size=128,
        trackers=("wandb", "tensorboard"),
        bf16=True,
    )


def test_command_line_goes_before_the_file(file: Path) -> None:
    (settings,), _, _ = train("other-store", "--config", str(file), "--batch-size", "64", "--trackers", "none")
    assert (settings.store, settings.batch_size, settings.trackers) == (("other-store",), 64, ())
    assert settings.learning_rate == 2e-5


def test_several_stores_stand_on_the_command_line_or_in_a_list(file: Path) -> None:
    (settings,), _, _ = train("one", "--config", str(file), "two", "--mixing", "round_robin", "three")
    assert (settings.store, settings.mixing) == (("one", "two", "three"), "round_robin")
    file.write_text(YAML.replace("guide-store", "[one, two]"))
    (settings,), _, _ = train("--config", str(file))
    assert settings.store == ("one", "two")


def test_default_that_is_typed_goes_before_the_file(file: Path) -> None:
    default = TrainSettings(store=("s",), student="m", out="o").batch_size
    (settings,), _, _ = train("--config", str(file), "--batch-size", str(default))
    assert settings.batch_size == default


def test_record_of_a_run_is_a_settings_file(tmp_path: Path, file: Path) -> None:
    settings = build(TrainSettings, read_settings_file(file))
    record = tmp_path / "gistfast.json"
    record.write_text(json.dumps({"settings": to_dict(settings), "store": {"fingerprint": "f"}}))
    assert train("--config", str(record))[0] == [settings]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "batchsize: 3", "unknown setting 'batchsize': did you mean 'batch_size'?"),
        ("a.yaml", "- batch_size", "holds list, expected one mapping"),
        ("a.yaml", "a: [", "is not valid YAML"),
        ("a.yaml", "out: o\na: b: c", "is not valid YAML: mapping values are not allowed here (line 2, column 5)"),
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "student: m\nout: o", "STORE is needed"),
        (
            "a.yaml",
            "{store: s, student: m, out: o, batch_size: many}",
            "--batch-size must be a whole number, found 'many'",
        ),
        ("a.toml", "batch_size = 3", "must be a .yaml, .yml or .json file"),
        ("a.yaml", None, "cannot be read: "),
    ],
)
def test_bad_file_is_refused_in_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    seen, code, said = train("--config", str(path))
    assert not seen
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("written", ["2e-5", "2.0e-5", "2E-5", "0.00002"])
def test_yaml_numbers_are_numbers(tmp_path: Path, written: str) -> None:
    path = tmp_path / "a.yml"
    path.write_text(f"learning_rate: {written}\nstudent: '7e3'")
    assert read_settings_file(path) == {"learning_rate": 2e-5, "student": "7e3"}


def test_unreadable_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings_file(path)
