"""How many bits layers get, from Unsloth's four switches, and which repo a name then stands for."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bridge import hf, hub, hub_names
from workflows.keywords import say

PACKED = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning")
WIDTHS = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8")


def one_width(load: Callable) -> Callable:
    """`load`, which refuses two of WIDTHS where the caller names both; a default is no wish."""
    names = inspect.signature(load).parameters

    @functools.wraps(load)
    def checked(*args: Any, **given: Any) -> Any:
        named = dict(zip(names, args, strict=False)) | given
        asked = [f"{n}={named[n]!r}" for n in WIDTHS if named.get(n) not in (None, False)]
        if len(asked) > 1:
            raise ValueError(
                f"from_pretrained got {' and '.join(asked)}, expected one width of {list(WIDTHS)}; "
                "load_in_4bit=True is the default"
            )
        return load(*args, **given)

    return checked


def packed(
    load_in_4bit: bool = True,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
) -> str | None:
    """The format, of quant.FORMATS, that these switches ask for; None is 16 bits.

    8 and 16 bits go before the default of 4, and nothing packed is trained as a whole.
    """
    if full_finetuning and load_in_8bit:
        say("full_finetuning=True trains every weight: load_in_8bit=True has no effect")
    if load_in_16bit or full_finetuning:
        return None
    return "int8" if load_in_8bit else "nf4" if load_in_4bit else None


def settled(given: Mapping[str, Any]) -> dict[str, bool]:
    """The default of 4 bits as another width leaves it, so that all settings fit together."""
    other = any(given.get(name) for name in ("load_in_8bit", "load_in_16bit"))
    return {"load_in_4bit": False} if other else {}


def located(
    model_name: str | Path,
    fmt: str | None,
    exact: bool,
    find: Mapping[str, Any],
    recorded: str | None = None,
    **more: Any,
) -> tuple[str, Path]:
    """(the name that is read, where its files are) of a name, with what `hub.find` takes.

    Unless `exact`, a 4-bit repo stands for its 16-bit parent where `fmt` is not 4 bits. `recorded`
    is the revision that an adapter names; it counts for the repo that it names alone. Raises
    ValueError for another revision there, which would be that of another repo.
    """
    name = str(model_name)
    wanted = name if exact else hub_names.read_as(name, fmt)
    if wanted == name and recorded is not None:
        find = {**find, "revision": recorded}
    if wanted != name:
        exactly = f"use_exact_model_name=True dequantizes those of {name}"
        if find.get("revision") is not None:
            raise ValueError(
                f"revision={find['revision']!r} is one of {name}, but without 4 bits {wanted} is "
                f"read: name that, with a revision of its own; {exactly}"
            )
        say(f"{wanted} is read, the 16-bit weights of {name}; {exactly}")
    return wanted, hub.find(wanted, **find, **more)


def tell(name: str, config: Mapping[str, Any], fmt: str | None) -> None:
    """Says where a checkpoint's own format is not the one asked for."""
    own = hf.own_format(dict(config))
    if own is not None and fmt is None:
        say(f"{name} is stored as {own}: its weights are dequantized")
    elif own not in (None, fmt):
        say(f"{name} is stored as {own}: its weights are taken as they are, not as {fmt}")
