"""Response-only masks by the texts that open a turn, for rows whose messages are not known."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from os.path import commonprefix
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from bridge.tokenizer import conversation_row, encode, end_of_turn, render
from unsloth_jax.data import Row

# Unlikely in any template, and each begins and ends so that no template trims it.
PROBE = ("ask-one-7f3a", "say-one-7f3a", "ask-two-7f3a", "say-two-7f3a")
REMEDY = "give rows of messages, or instruction_part and response_part"


class Markers(NamedTuple):
    """Token ids that open a user's turn and the assistant's.

    One of `tails` may follow the opening of an answer and belongs to it, whole or its beginning;
    `stop` ends an answer where known.
    """

    instruction: list[int]
    response: list[int]
    tails: Sequence[list[int]] = ()
    stop: int | None = None


def responses_only(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    instruction_part: str | None,
    response_part: str | None,
    *,
    force_match: bool = True,
    last_response_only: bool = False,
) -> list[Row]:
    """The rows with only what stands between markers supervised, as Unsloth does.

    Raises ValueError for one marker of two, for an instruction marker that is nowhere, or with the
    index of a row in which none is left.
    """
    found = markers(tokenizer, instruction_part, response_part, force_match=force_match)
    _require_questions(rows, tokenizer, found)
    mask = lambda row: mask_responses(row.tokens, row.mask, found, last_response_only)
    masked = [Row(row.tokens, mask(row)) for row in rows]
    bare = [index for index, row in enumerate(masked) if not any(row.mask)]
    if bare:
        share = f" ({len(bare)} of {len(masked)} rows are so)"
        raise ValueError(f"row {bare[0]}: {_nothing(tokenizer, found, share)}")
    return masked


class Detected:
    """Masks of rows whose messages are not known: from where the chat template opens an answer
    through its end-of-turn token. Its markers are looked for when the first such row comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, last_response_only: bool = False):
        self.tokenizer, self.last_response_only = tokenizer, last_response_only

    @cached_property
    def markers(self) -> Markers:
        """Raises ValueError where the template has none that tell its answers."""
        found = markers(self.tokenizer)
        if found.stop is None:
            _require_proved(self.tokenizer, found)
        return found

    def __call__(self, tokens: Sequence[int], mask: Sequence[int]) -> list[int]:
        """`mask`, kept in answers alone; raises ValueError where none is, or, without an
        end-of-turn token, where the markers don't take turns.
        """
        if self.markers.stop is None:
            _require_turns(tokens, self.markers)
        found = mask_responses(tokens, mask, self.markers, self.last_response_only)
        if not any(found[1:]):
            raise ValueError(_nothing(self.tokenizer, self.markers))
        return found


def _nothing(tokenizer: PreTrainedTokenizerBase, markers: Markers, share: str = "") -> str:
    ask, say = tokenizer.decode(markers.instruction), tokenizer.decode(markers.response)
    return (
        f"no supervised token after masking{share}; the response marker is {say!r}, the "
        f"instruction marker {ask!r}; without markers messages are masked by rendering them, other "
        "rows by the chat template's own markers, and force_match=False lets line ends differ"
    )


def mask_responses(
    tokens: Sequence[int], mask: Sequence[int], markers: Markers, last_response_only: bool = False
) -> list[int]:
    """`mask`, kept from each response marker to the next instruction marker, or through `stop`."""
    asks = _places(tokens, markers.instruction)
    starts = [_start(tokens, at, markers) for at in _places(tokens, markers.response)]
    starts = starts[-1:] if last_response_only else starts
    spans = [(s, _end(tokens, s, asks, markers.stop)) for s in starts]
    return [int(on and any(s <= i < e for s, e in spans)) for i, on in enumerate(mask)]


def _require_proved(tokenizer: PreTrainedTokenizerBase, markers: Markers) -> None:
    """Raises ValueError where the markers mask a probe otherwise than rendering it turn by turn."""
    tokens, wanted = conversation_row(tokenizer, _probe())
    if mask_responses(tokens, [1] * len(tokens), markers) != wanted:
        raise ValueError(
            "the chat template ends answers with no special token, and the text that opens its "
            f"turns doesn't tell the answers of {tokenizer.decode(tokens)!r}; {REMEDY}"
        )


def _require_questions(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, markers: Markers
) -> None:
    """Raises ValueError where rows hold several answers but none the instruction marker."""
    asked = any(_places(row.tokens, markers.instruction) for row in rows)
    if not asked and any(len(_places(row.tokens, markers.response)) > 1 for row in rows):
        raise ValueError(
            f"the instruction marker {tokenizer.decode(markers.instruction)!r} is in none of the "
            f"{len(rows)} rows: what users say after an answer would be supervised"
        )


def _require_turns(tokens: Sequence[int], markers: Markers) -> None:
    """Raises ValueError where a message may hold a marker: two of one kind in succession."""
    found = [(at, "instruction") for at in _places(tokens, markers.instruction)]
    found += [(at, "response") for at in _places(tokens, markers.response)]
    twice = [a for (_, a), (_, b) in pairwise(sorted(found)) if a == b]
    if twice:
        raise ValueError(
            f"two {twice[0]} markers follow each other, and the chat template ends answers with no "
            f"special token to tell them apart; {REMEDY}"
        )


def _start(tokens: Sequence[int], at: int, markers: Markers) -> int:
    """Where an answer begins: after the marker, and after as much of a tail as is there."""
    start = at + len(markers.response)
    shared = lambda tail: len(commonprefix([tail, list(tokens[start : start + len(tail)])]))
    return start + max(map(shared, markers.tails), default=0)


def _end(tokens: Sequence[int], start: int, asks: Sequence[int], stop: int | None) -> int:
    stops = (i + 1 for i in range(start, len(tokens)) if tokens[i] == stop)
    asked = (at for at in asks if at >= start)
    return min(next(stops, len(tokens)), next(asked, len(tokens)))


def _places(tokens: Sequence[int], part: Sequence[int]) -> list[int]:
    size = len(part)
    return [i for i in range(len(tokens) - size + 1) if list(tokens[i : i + size]) == list(part)]


def markers(
    tokenizer: PreTrainedTokenizerBase,
    instruction_part: str | None = None,
    response_part: str | None = None,
    *,
    force_match: bool = True,
) -> Markers:
    """Both markers as ids: exactly as given, or, unless `force_match`, what all contexts share.

    Raises ValueError if one is missing, or if a marker has no ids that every context keeps.
    """
    if (instruction_part is None) != (response_part is None):
        raise ValueError("give both instruction_part and response_part, or neither")
    if instruction_part is None or response_part is None:
        texts, stop, force_match = detect_markers(tokenizer), end_of_turn(tokenizer), False
    else:
        texts, stop = (instruction_part, response_part), None
    ask, say = (encode(tokenizer, text, special=False).ids for text in texts)
    if force_match:
        found = Markers(ask, say)
    else:
        core = _shared(tokenizer, texts[1])
        found = Markers(_shared(tokenizer, texts[0]), core, _tails(tokenizer, texts[1], core), stop)
    if not all(found[:2]) or found.instruction == found.response:
        raise ValueError(f"markers {texts[0]!r} and {texts[1]!r} have no distinct token ids")
    return found


def _shared(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The longest run of the marker's ids that stays whole whatever stands beside it."""
    # A space at its end may become part of the word that follows.
    text = text.rstrip(" ") or text
    plain = lambda text: encode(tokenizer, text, special=False).ids
    beside = [(a, b) for a in ("", "\n", "a\n") for b in ("", "x", " x", "\n", "\n\n", "7")]
    around = [plain(before + text + after) for before, after in beside]
    whole = plain(text)
    sizes = range(len(whole), 0, -1)
    runs = (whole[i : i + n] for n in sizes for i in range(len(whole) - n + 1))
    return next((run for run in runs if all(_places(other, run) for other in around)), [])


def _tails(tokenizer: PreTrainedTokenizerBase, text: str, core: list[int]) -> list[list[int]]:
    """The ids of the marker after its core, as they are before different texts."""
    found = []
    for after in ("", "x", "7", "\n"):
        tokens, ends = encode(tokenizer, text + after, special=False)
        start = next(iter(_places(tokens, core)), 0) + len(core)
        tail = [t for t, end in zip(tokens, ends, strict=True) if end <= len(text)][start:]
        found += [] if tail in found else [tail]
    return found


def _probe() -> list[dict[str, str]]:
    roles = ("user", "assistant") * 2
    return [{"role": r, "content": text} for r, text in zip(roles, PROBE, strict=True)]


def detect_markers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(instruction_part, response_part) as the chat template writes them around a probe.

    Raises ValueError where the template changes the probe's texts.
    """
    rendered = render(tokenizer, _probe())
    pieces, rest = [], rendered
    for text in PROBE:
        before, found, rest = rest.partition(text)
        if not found:
            raise ValueError(f"the chat template changes messages: no {text!r} in {rendered!r}")
        pieces.append(before)
    # What follows the last answer ends a turn; it belongs to no opening.
    opening = lambda piece: piece.removeprefix(rest)
    return opening(pieces[2]), opening(pieces[1])
