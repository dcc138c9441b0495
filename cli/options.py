"""Commands generated from the settings: each field of the dataclass is one option."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

import typer

from gistfast.errors import ConfigError, GistfastError
from gistfast.progress import console
from gistfast.settings import Settings, build, flag_of

S = TypeVar("S", bound=Settings)


def command(settings_class: type[S], run: Callable[[S], None]) -> Callable[..., None]:
    """A function that Typer can register: one parameter a field, `run` called with the built settings."""
    hints = get_type_hints(settings_class)

    def call(**values: Any) -> None:
        with errors_in_one_line(settings_class.when_stopped):
            run(build(settings_class, {name: value for name, value in values.items() if value is not None}))

    parameters = [_parameter(item, hints[item.name]) for item in fields(settings_class)]
    call.__doc__ = settings_class.about
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


@contextmanager
def errors_in_one_line(when_stopped: str = Settings.when_stopped) -> Iterator[None]:
    """Turn a refusal and Ctrl-C into one line on stderr; anything else is a bug and keeps its traceback."""
    try:
        yield
    except GistfastError as error:
        _say(str(error))
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        _say(when_stopped)
        raise typer.Exit(130) from None


def _say(line: str) -> None:
    console.print(f"gistfast: {line}", markup=False, highlight=False, soft_wrap=True)


def _parameter(item: "Field[Any]", hint: Any) -> inspect.Parameter:
    """The Typer parameter of a field; a setting that holds several values is text here."""
    default, annotation = item.default, hint
    if item.metadata["parse"] is not None:
        annotation = str | None
        default = ",".join(default) if isinstance(default, tuple) and default else None
    option = _argument(item) if item.metadata.get("positional") else _option(item, default)
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _argument(item: "Field[Any]") -> Any:
    return typer.Argument(metavar=item.name.upper(), help=item.metadata["help"], show_default=False)


def _option(item: "Field[Any]", default: Any) -> Any:
    flag = flag_of(item)
    # A switch that is on needs a way to turn it off; one that is off needs none.
    names = f"{flag}/--no-{flag[2:]}" if default is True else flag
    limits = "".join(f", {words} {limit}" for words, limit in item.metadata["limits"].items())
    help = item.metadata["help"] + (f" [{limits[2:]}]" if limits else "")
    # Nothing, an empty text and a switch that is off need no word; 0 does.
    shown = bool(default) or type(default) in (int, float)
    return typer.Option(... if default is MISSING else default, names, help=help, show_default=shown)
