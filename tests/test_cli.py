import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from gistfast.cli import main as cli
from gistfast.cli.main import app
from gistfast.cli.options import command, command_class
from gistfast.errors import ConfigError, StoreError
from gistfast.settings.base import Settings, argument, comma_separated, flag_of, setting
from gistfast.settings.stages import (
    EvaluateSettings,
    PictureSettings,
    PrecomputeSettings,
    QuickstartSettings,
    TrainSettings,
)
from gistfast.settings.store import StoreGcSettings, StoreInfoSettings, StoreRepairSettings, StoreVerifySettings

COMMANDS = {
    "precompute": PrecomputeSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "picture": PictureSettings,
    "quickstart": QuickstartSettings,
    "store info": StoreInfoSettings,
    "store verify": StoreVerifySettings,
    "store repair": StoreRepairSettings,
    "store gc": StoreGcSettings,
}


@dataclass(frozen=True, kw_only=True)
class Small(Settings):
    about = "Try every kind of option."
    when_stopped = "stopped: call again"

    place: str = argument("Where.")
    ratio: float = setting(0.5, "A share.", at_least=0, at_most=1)
    kind: Literal["a", "b"] | None = setting(None, "A choice.")
    on: bool = setting(True, "A switch that is on.")
    off: bool = setting(False, "A switch that is off.")
    either: bool | None = setting(None, "A switch that is neither.")
    names: tuple[str, ...] = setting(("x",), "Several names.", parse=comma_separated)


def invoke(run: object, *arguments: str) -> tuple[int, str]:
    small = typer.Typer()
    small.command()(command(Small, run))  # type: ignore[arg-type]
    result = CliRunner().invoke(small, list(arguments))
    return result.exit_code, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_setting(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0
    for item in fields(COMMANDS[name]):
        assert flag_of(item) in result.output


@pytest.mark.parametrize("settings", [PrecomputeSettings, TrainSettings])
def test_help_stands_under_the_titles_of_its_sections(settings: type[Settings]) -> None:
    assert settings.sections.keys() <= {item.name for item in fields(settings)}
    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=command_class(settings))(command(settings, lambda built: None))
    lines = CliRunner().invoke(app, ["--help"]).output.splitlines()
    for name, title in settings.sections.items():
        assert lines[lines.index(f"{title}:") + 1].split()[0] == f"--{name.replace('_', '-')}"


def test_command_line_builds_the_settings() -> None:
    seen: list[Small] = []
    arguments = ["here", "--ratio", "0.25", "--kind", "b", "--no-on", "--off", "--names", "y,z"]
    assert invoke(seen.append, *arguments)[0] == 0
    assert seen == [Small(place="here", ratio=0.25, kind="b", on=False, off=True, names=("y", "z"))]


def test_left_out_options_take_the_defaults() -> None:
    seen: list[Small] = []
    invoke(seen.append, "here")
    assert seen == [Small(place="here")]


@pytest.mark.parametrize(("flag", "value"), [("--either", True), ("--no-either", False)])
def test_switch_that_is_neither_can_be_turned_on_and_off(flag: str, value: bool) -> None:
    seen: list[Small] = []
    invoke(seen.append, "here", flag)
    assert seen == [Small(place="here", either=value)]


def test_bad_setting_is_one_line_and_exit_code_2() -> None:
    code, said = invoke(print, "here", "--ratio", "2")
    assert (code, said) == (2, "gistfast: --ratio must be at most 1, found 2.0\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ratio", "half"], "--ratio must be a number, found 'half'"),
        (["--kind", "c"], "--kind must be one of a, b, found 'c'"),
    ],
)
def test_bad_value_is_one_line_that_says_what_was_found(arguments: list[str], said: str) -> None:
    assert invoke(print, "here", *arguments) == (2, f"gistfast: {said}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["precompute", "--quantise"], "No such option: --quantise: `gistfast precompute --help` lists what there is"),
        (["store", "mend"], "No such command 'mend': `gistfast store --help` lists what there is"),
        (["picture", "run", "more"], "unexpected extra argument(s) (more): `gistfast picture --help`"),
    ],
)
def test_unknown_words_are_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gistfast", *arguments])
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("gistfast: ")
    assert said in error
    assert error.count("\n") == 1


def test_command_without_a_word_answers_with_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gistfast", "store"])
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "Usage: gistfast store" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(StoreError("no store"), 1), (ConfigError("no"), 2)])
def test_refusal_is_one_line_and_its_exit_code(error: Exception, code: int) -> None:
    def refuse(settings: Small) -> None:
        raise error

    assert invoke(refuse, "here") == (code, f"gistfast: {error}\n")


def test_interrupt_is_one_line_that_says_how_to_go_on() -> None:
    def interrupt(settings: Small) -> None:
        raise KeyboardInterrupt

    assert invoke(interrupt, "here") == (130, "gistfast: stopped: call again\n")


def test_bug_keeps_its_traceback() -> None:
    def fail(settings: Small) -> None:
        raise RuntimeError("a bug")

    small = typer.Typer()
    small.command()(command(Small, fail))
    assert isinstance(CliRunner().invoke(small, ["here"]).exception, RuntimeError)


def test_missing_option_is_named() -> None:
    result = CliRunner().invoke(app, ["precompute", "pairs.jsonl", "--out", "store"])
    assert result.exit_code == 2
    assert "--guide is needed" in result.output + result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "gistfast.batches.bench",
        "gistfast.batches.compare",
        "gistfast.engines.bench",
        "gistfast.guides.bench",
        "gistfast.stages.memory_bench",
        "gistfast.store.bench",
        "gistfast.training.bench",
    ],
)
def test_option_that_a_benchmark_does_not_have_is_refused_in_one_line(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Asked for its store first.
    store = ["store"] if module == "gistfast.batches.compare" else []
    with pytest.raises(SystemExit) as left:
        import_module(module).main([*store, "--no-such"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said == f"gistfast: unrecognized arguments: --no-such: `python -m {module} --help` lists what there is\n"


def test_value_that_a_benchmark_cannot_read_is_refused_in_one_line() -> None:
    result = CliRunner().invoke(app, ["bench", "gather", "--repeats", "many"])
    assert result.exit_code == 2
    assert result.stderr == (
        "gistfast: argument --repeats: invalid int value: 'many': "
        "`python -m gistfast.store.bench --help` lists what there is\n"
    )


@pytest.mark.parametrize("arguments", ["", *COMMANDS, "store", "bench", "bench loss", "bench gather", "bench step"])
def test_help_needs_no_heavy_import(arguments: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'faiss', 'matplotlib'}"
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom gistfast.cli.main import app\n"
        f"assert CliRunner().invoke(app, '{arguments} --help').exit_code == 0\n"
        f"print({heavy} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
