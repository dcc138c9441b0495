"""How settings are declared, read from loose values, and checked.

A field carries its default, its help and what it admits. A flag is the field's name with dashes:
`batch_size` is `--batch-size`.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gistfast.errors import ConfigError

S = TypeVar("S", bound="Settings")

_HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "above": lambda value, limit: value > limit,
    "at least": lambda value, limit: value >= limit,
    "at most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
}
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "text or a list"}


def setting(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field with its help and its range.

    Args:
        default: The value when none is given; MISSING makes the setting required.
        help: One sentence for `--help`.
        above: The value must be greater.
        at_least: The value must be this or greater.
        at_most: The value must be this or smaller.
        below: The value must be smaller.
        parse: Reads the value from text, for settings that hold several values.
    """
    limits = {"above": above, "at least": at_least, "at most": at_most, "below": below}
    given = {words: limit for words, limit in limits.items() if limit is not None}
    return field(default=default, metadata={"help": help, "limits": given, "parse": parse})


def argument(help: str, *, several: bool = False) -> Any:
    """A required dataclass field that the command line takes by position.

    Args:
        help: One sentence for `--help`.
        several: Whether more than one value may stand there; the field is a tuple, also of a single text.
    """
    parse = _alone if several else None
    return field(metadata={"help": help, "limits": {}, "parse": parse, "positional": True, "several": several})


def _alone(text: str) -> tuple[str, ...]:
    return (text,)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all commands share: every value is checked against its field's type and range."""

    # The first line of a command's help, and what Ctrl-C is answered with.
    about: ClassVar[str]
    when_stopped: ClassVar[str] = "stopped"
    # Titles in the help, by the field that each begins with; "Options" go before the first.
    sections: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Check each field alone, then the fields against each other."""
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            _check_type(item, hints[item.name], value)
            _check_limits(item, value)
        self.check()

    def check(self) -> None:
        """Refuse settings that contradict each other; commands with such settings override it."""


def flag_of(item: "Field[Any]") -> str:
    """How the user writes a field: `--batch-size`, or `STORE` for one taken by position."""
    return item.name.upper() if item.metadata.get("positional") else "--" + item.name.replace("_", "-")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values that a `Literal[...]` or `Literal[...] | None` admits; none for other types."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    return tuple(choice for part in literals for choice in get_args(part))


def build(cls: type[S], values: Mapping[str, Any]) -> S:
    """Settings of one command from loose values, as a command line, a file or a caller gives them.

    Text is parsed for settings that hold several values; a path becomes text.

    Raises:
        ConfigError: For an unknown name (the nearest known one is named), a missing or a bad value.
    """
    known = {item.name: item for item in fields(cls)}
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown setting {name!r}: {hint}")
    for name, item in known.items():
        if item.default is MISSING and name not in values:
            raise ConfigError(f"{flag_of(item)} is needed: {item.metadata['help']}")
    return cls(**{name: _read(known[name], value) for name, value in values.items()})


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as JSON knows them: tuples are lists."""
    plain = asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def comma_separated(text: str) -> tuple[str, ...]:
    """The parts of `"a, b"`; none for an empty text and for `"none"`."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    return () if parts == ("none",) else parts


N = TypeVar("N", int, float)


def numbers(kind: Callable[[str], N], flag: str, example: str) -> Callable[[str], tuple[N, ...]]:
    """What reads the numbers of `"0,1,2"`.

    Args:
        kind: int or float.
        flag: How the user writes the setting.
        example: What it may look like.
    """

    def read(text: str) -> tuple[N, ...]:
        try:
            return tuple(kind(part) for part in comma_separated(text))
        except ValueError:
            raise ConfigError(f"{flag} must be numbers like {example}, found {text!r}") from None

    return read


def column_names(text: str) -> dict[str, str]:
    """The mapping of `"anchor=title,positive=body"`."""
    return _mapping(text, "--columns", "anchor=title,positive=body")


def vector_places(text: str) -> dict[str, str]:
    """The mapping of `"anchor=a.npy,positive=p.npy"`."""
    return _mapping(text, "--vectors", "text=embedding or anchor=a.npy,positive=p.npy")


def learning_rates(text: str) -> dict[str, float]:
    """The mapping of `"embeddings=1e-6,head=1e-3"`; an expression may have an equals sign in it."""
    pairs = [part.rpartition("=") for part in comma_separated(text)]
    try:
        rates = {name.strip(): float(rate) for name, _, rate in pairs}
    except ValueError:
        rates = {}
    if not rates or "" in rates:
        raise ConfigError(f"--learning-rates must look like embeddings=1e-6,head=1e-3, found {text!r}")
    return rates


def _mapping(text: str, flag: str, example: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in comma_separated(text)]
    if not pairs or not all(name and equals and column for name, equals, column in pairs):
        raise ConfigError(f"{flag} must look like {example}, found {text!r}")
    return {name.strip(): column.strip() for name, _, column in pairs}


def part_of_shards(text: str) -> tuple[int, ...]:
    """The numbers of `"0/8"`: the first of eight parts."""
    part = tuple(int(number) for number in re.findall(r"\d+", text)) if re.fullmatch(r"\d+/\d+", text) else ()
    refuse_bad_part(part, text)
    return part


def refuse_bad_part(part: tuple[int, ...], found: object) -> None:
    """Refuse a part of the shards that is not two numbers, the first from 0 to below the second.

    Raises:
        ConfigError: Saying what was found.
    """
    if len(part) != 2 or not 0 <= part[0] < part[1]:
        raise ConfigError(f"--shards must be a part like 0/8, the first of eight, to 7/8, the last; found {found!r}")


def refuse_both(settings: Settings, *names: str) -> None:
    """Refuse switches that contradict each other.

    Raises:
        ConfigError: When more than one of the named settings is on.
    """
    given = [flag_of(item) for item in fields(settings) if item.name in names and getattr(settings, item.name)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} contradict each other: give one of them")


def refuse_unknown_device(device: str) -> None:
    """Refuse a device that no machine has; whether this machine has it shows when it is used.

    Raises:
        ConfigError: When it is not auto, cpu, cuda or cuda:N.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, found {device!r}")


def _read(item: "Field[Any]", value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    parse = item.metadata["parse"]
    if parse is None or value is None or isinstance(value, Mapping):
        return value
    if isinstance(value, str):
        return parse(value)
    if not isinstance(value, Iterable):
        return value
    return tuple(os.fspath(part) if isinstance(part, os.PathLike) else part for part in value)


def _check_type(item: "Field[Any]", hint: Any, value: Any) -> None:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in parts:
        return
    if choices := choices_of(hint):
        admitted = value in choices
        wanted = "one of " + ", ".join(map(str, choices))
    else:
        part = next(part for part in parts if part is not type(None))
        kind = get_origin(part) or part
        if kind is tuple and isinstance(value, tuple):
            kind = get_args(part)[0]
            wrong = [element for element in value if not _is_a(kind, element)]
        else:
            wrong = [] if _is_a(kind, value) else [value]
        admitted, value = not wrong, next(iter(wrong), value)
        wanted = _NAMES.get(kind, kind.__name__)
    if not admitted:
        raise ConfigError(f"{flag_of(item)} must be {wanted}, found {value!r}")


def _is_a(kind: type, value: Any) -> bool:
    # A whole number is a valid float; True is an int to Python, but to no user.
    kinds = (float, int) if kind is float else (kind,)
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def _check_limits(item: "Field[Any]", value: Any) -> None:
    if value is None:
        return
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"{flag_of(item)} must be finite, found {value}")
    for words, limit in item.metadata["limits"].items():
        if not _HOLDS[words](value, limit):
            raise ConfigError(f"{flag_of(item)} must be {words} {limit}, found {value}")
