"""What becomes of a keyword: used, accepted with a stated reason, or refused by name."""

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args

SHOWN = 80  # characters of a value that an error repeats

_said: set[str] = set()


def say(line: str) -> None:
    """Prints a line once in a process."""
    if line not in _said:
        _said.add(line)
        tell(line)


def tell(line: str) -> None:
    """Prints a line each time, where it is about one thing of several, as an export."""
    print(f"unsloth_jax: {line}")


def settle(
    where: str,
    given: Mapping[str, Any],
    used: Iterable[str],
    ignored: Mapping[str, str],
    later: Mapping[str, tuple],
) -> None:
    """Judges keywords beside those in a signature.

    `ignored` maps a name to why it has no effect (said once); `later` maps a name to its neutral
    values, any other raises ValueError. A name in neither raises TypeError with the nearest ones.
    """
    known = [*used, *ignored, *later]
    for name, value in given.items():
        if name in later:
            neutral(where, name, value, later[name])
        elif name in ignored:
            say(f"{where}({name}={value!r}) has no effect: {ignored[name]}")
        else:
            near = difflib.get_close_matches(name, known, n=3) or sorted(used)
            raise TypeError(f"{where} got an unknown keyword {name!r}; nearest known: {near}")


def neutral(where: str, name: str, value: Any, allowed: tuple) -> None:
    """Raises ValueError for a value that asks for a feature which is not there yet."""
    if not any(_same(value, x) for x in allowed):
        raise ValueError(
            f"{where}: {name}={value!r} is not supported yet; supported: {list(allowed)}"
        )


def _same(value: Any, x: Any) -> bool:
    """Equality in which 0.0 is 0, but False is not."""
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    alike = type(value) is type(x) or (number(value) and number(x))
    return value is x or (alike and value == x)


# What counts as a value of an annotation; True is no number, though Python says so.
KINDS = {
    bool: lambda x: isinstance(x, bool),
    int: lambda x: isinstance(x, Integral) and not isinstance(x, bool),
    float: lambda x: isinstance(x, Real) and not isinstance(x, bool),
    str: lambda x: isinstance(x, str | os.PathLike),
    NoneType: lambda x: x is None,
}


def typed(where: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raises TypeError for a value whose kind (`int`, `float | None`, a class, ...) is another.

    Not-a-number and infinity are of the kind float, but no values of anything: ValueError.
    """
    for name, kind in kinds.items():
        value = values[name]
        if not any(_is(value, one) for one in get_args(kind) or (kind,)):
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            raise TypeError(f"{where}: {name} must be {expected}, got {shown(value)}")
        if isinstance(value, Real) and math.isnan(value):
            raise ValueError(f"{where}: {name} must be a number, got {value!r}")
        if isinstance(value, Real) and math.isinf(value):
            raise ValueError(f"{where}: {name} must be finite, got {value!r}")


def _is(value: Any, kind: Any) -> bool:
    return KINDS[kind](value) if kind in KINDS else isinstance(value, kind)


def shown(value: Any) -> str:
    """A value as an error repeats it: itself where it is plain and short, else its class."""
    if isinstance(value, list | tuple | set | frozenset) and not all(map(_plain, value)):
        return f"a {type(value).__name__} of {', '.join(type(x).__name__ for x in value)}"[:SHOWN]
    plain = _plain(value) or isinstance(value, list | tuple | set | frozenset)
    if plain:
        text = repr(value)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return repr(value) if isinstance(value, type) else f"a value of {type(value).__name__}"


def _plain(value: Any) -> bool:
    return isinstance(value, str | bytes | Real | NoneType | os.PathLike)


def written(where: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError for a name or path that holds nothing, or a null character."""
    for name in names:
        text = None if values[name] is None else os.fspath(values[name])
        if text is not None and (not text.strip() or "\0" in text):
            raise ValueError(f"{where}: {name} must be a text that names something, got {text!r}")


def ranged(where: str, values: Mapping[str, Any], limits: Mapping[str, tuple]) -> None:
    """Raises ValueError for a value outside its (least, most), either of which may be None.

    (least, most, "below") leaves `most` itself out.
    """
    for name, (least, most, *below) in limits.items():
        value = values[name]
        if value is None:
            continue
        low = least is not None and value < least
        if low or (most is not None and (value >= most if below else value > most)):
            until = "to below" if below else "to"
            span = f"at least {least}" if most is None else f"from {least} {until} {most}"
            raise ValueError(f"{where}: {name} must be {span}, got {value!r}")
