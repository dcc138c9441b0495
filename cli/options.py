"""Commands generated from the settings: each field of the dataclass is one option."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from gistfast.errors import ConfigError, GistfastError
from gistfast.launch import alike, rank
from gistfast.progress import console
from gistfast.settings.base import Settings, build, choices_of, flag_of
from gistfast.settings.file import read_settings_file

S = TypeVar("S", bound=Settings)


def command(settings_class: type[S], run: Callable[[S], None]) -> Callable[..., None]:
    """A function that Typer can register: one parameter a field, `run` called with the built settings.

    `--config FILE` gives settings, too; what stands on the command line goes before it.
    """
    hints = get_type_hints(settings_class)

    def call(context: typer.Context, config: Path | None, **values: Any) -> None:
        with errors_in_one_line(settings_class.when_stopped):
            typed = {name: _read(hints[name], value) for name, value in values.items() if _was_typed(context, name)}
            with alike():
                from_file = {} if config is None else read_settings_file(config)
                settings = build(settings_class, from_file | typed)
            run(settings)

    parameters = [_CONTEXT, *(_parameter(item, hints[item.name]) for item in fields(settings_class)), _CONFIG]
    call.__doc__ = settings_class.about
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def command_class(settings_class: type[Settings]) -> type[TyperCommand]:
    """The Typer command whose help lists the options under the titles of their sections."""

    class Command(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write the options, section by section."""
            sections: dict[str, list[tuple[str, str]]] = {}
            title = "Options"
            for parameter in self.get_params(ctx):
                name = parameter.name or ""
                title = "Other" if name in ("config", "help") else settings_class.sections.get(name, title)
                kind = "Arguments" if parameter.param_type_name == "argument" else title
                if (record := parameter.get_help_record(ctx)) is not None:
                    sections.setdefault(kind, []).append(record)
            for heading, records in sections.items():
                with formatter.section(heading):
                    formatter.write_dl(records)

    return Command


_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=typer.Option(None, "--config", metavar="FILE", help="YAML or JSON file with settings by name."),
    annotation=Path | None,
)


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def errors_in_one_line(when_stopped: str = Settings.when_stopped) -> Iterator[None]:
    """Turn a refusal and Ctrl-C into one line on stderr; anything else is a bug and keeps its traceback."""
    try:
        yield
    except GistfastError as error:
        if error.said_elsewhere:
            # torchrun ends the run, with what the process says that failed.
            raise typer.Exit(0) from None
        say(str(error) if rank() == 0 else f"process {rank()}: {error}")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        if rank() == 0:
            say(when_stopped)
        raise typer.Exit(130) from None


def say(line: str) -> None:
    """Write one line to the error stream."""
    console.print(f"gistfast: {line}", markup=False, highlight=False, soft_wrap=True)


def _parameter(item: "Field[Any]", hint: Any) -> inspect.Parameter:
    """The Typer parameter of a field; a setting that holds several values is text here."""
    default, annotation = item.default, hint
    if item.metadata.get("several"):
        annotation = list[str] | None
    elif _metavar(hint):
        # Typer's own refusal of a bad value takes three lines and leaves the value out.
        annotation = str | None
        default = default if default in (None, MISSING) else str(default)
    elif item.metadata["parse"] is not None:
        annotation = str | None
        default = ",".join(default) if isinstance(default, tuple) and default else None
    elif default is MISSING:
        # Asked for when the settings are built: a file may have it.
        annotation = hint | None
    option = _argument(item) if item.metadata.get("positional") else _option(item, hint, default)
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _argument(item: "Field[Any]") -> Any:
    return typer.Argument(None, metavar=flag_of(item), help=item.metadata["help"], show_default=False)


def _option(item: "Field[Any]", hint: Any, default: Any) -> Any:
    flag = flag_of(item)
    # A switch that is on, or neither on nor off, needs a way to turn it off; one that is off needs none.
    names = f"{flag}/--no-{flag[2:]}" if default is True or hint == bool | None else flag
    limits = "".join(f", {words} {limit}" for words, limit in item.metadata["limits"].items())
    help = item.metadata["help"] + (f" [{limits[2:]}]" if limits else "")
    # Nothing, an empty text and a switch that is off need no word; 0 does.
    shown = default is not MISSING and bool(default)
    if default is MISSING:
        help += " [required]"
    given = None if default is MISSING else default
    return typer.Option(given, names, metavar=_metavar(hint), help=help, show_default=shown)


def _kind(hint: Any) -> type[int] | type[float] | None:
    """The kind of number that a field holds; None for one that holds something else."""
    parts = (hint, *get_args(hint))
    return next((kind for kind in (int, float) if kind in parts), None)


def _metavar(hint: Any) -> str | None:
    """What stands for a value in the help, as `<a|b>` or `<int>`; None for what Typer reads itself."""
    if get_origin(hint) is tuple:
        return None
    kind = _kind(hint)
    what = "|".join(map(str, choices_of(hint))) or (kind.__name__ if kind else "")
    return f"<{what}>" if what else None


def _read(hint: Any, value: Any) -> Any:
    """A value as it was typed; what should be a number and is none stays text, and is refused with its name."""
    kind = _kind(hint)
    if kind is None or _metavar(hint) is None or not isinstance(value, str):
        return value
    with suppress(ValueError):
        return kind(value)
    return value
