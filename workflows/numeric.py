"""Numbers in text, read exactly: signs, commas, decimals, exponents, fractions, percentages."""

import re
from fractions import Fraction
from typing import Any, NamedTuple

LONGEST = 400  # characters of a number; longer ones are noise, and cost
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])"
    r"(?P<sign>(?:(?<![)\]}])[-+])?)(?:[$€£](?P<inner>-?))?"
    rf"(?:(?:(?P<whole>{_DIGITS})\ )?(?P<over>{_DIGITS})/(?P<under>{_DIGITS})"
    rf"|(?P<plain>(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?))"
    r"(?P<percent>\s?\\?%)?"
)
_FRAC = re.compile(r"([0-9]?)\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}")


class Number(NamedTuple):
    """A number as it was written: 50% has the value 50 and `percent`."""

    value: Fraction
    percent: bool


def numbers(text: str) -> list[Number]:
    """All numbers of a text in order. `1 1/2` is 3/2, LaTeX's `\\frac{1}{2}` a fraction.

    A letter, digit or dot before digits makes them no number (H2O, the end of 3.5.2); fractions
    over 0 and numbers of more than 400 characters are left out.
    """
    flat = _FRAC.sub(r"\1 \2/\3", text).replace("−", "-")
    found = (_number(match) for match in NUMBER.finditer(flat))
    return [number for number in found if number is not None]


def number(given: Any) -> Number | None:
    """A data set's number: one as it is, or the last of a text (GSM8K's end with theirs)."""
    if isinstance(given, str):
        return (numbers(given) or [None])[-1]
    return Number(Fraction(str(given)), False)


def same(a: Number, b: Number, tolerance: float | int = 0) -> bool:
    """Whether two are equal, up to `tolerance`: 50% equals 50%, and both 0.5 and 50."""
    near = lambda x, y: abs(x - y) <= tolerance
    if a.percent == b.percent:
        return near(a.value, b.value)
    share, plain = (a, b) if a.percent else (b, a)
    return near(share.value, plain.value) or near(share.value / 100, plain.value)


def _number(match: re.Match) -> Number | None:
    if len(match[0]) > LONGEST:
        return None
    part = lambda name: Fraction((match[name] or "0").replace(",", ""))
    if match["plain"] is not None:
        value = part("plain")
    elif part("under") == 0:
        return None
    else:
        value = part("whole") + part("over") / part("under")
    negative = (match["sign"] == "-") != (match["inner"] == "-")
    return Number(-value if negative else value, match["percent"] is not None)
