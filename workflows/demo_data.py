"""The demo's data set: a guest's message in, the booking record that a program can read out."""

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

SYSTEM = "Booking: place | people | day | time"
TRAIN, HELD_OUT, SEED = 360, 60, 3407

PLACES = (
    "Luigi's",
    "Blue Door",
    "Casa Verde",
    "Golden Fork",
    "The Anchor",
    "Saffron",
    "Harbor Grill",
    "Old Mill",
    "Sakura",
    "Red Lantern",
    "Green Table",
    "Maple House",
    "Corner Bistro",
    "Little India",
    "Sunset Cafe",
    "Silver Spoon",
    "Marco's",
    "The Garden",
    "Ocean View",
    "Stone Oven",
)
PEOPLE = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
}
DAYS = {
    "Monday": "Mon",
    "Tuesday": "Tue",
    "Wednesday": "Wed",
    "Thursday": "Thu",
    "Friday": "Fri",
    "Saturday": "Sat",
    "Sunday": "Sun",
}
TIMES = {
    "noon": "12:00",
    "1 pm": "13:00",
    "2 pm": "14:00",
    "5 pm": "17:00",
    "6 pm": "18:00",
    "7 pm": "19:00",
    "8 pm": "20:00",
    "9 pm": "21:00",
}
PHRASES = (
    "Book a table for {people} at {place} on {day} at {time}.",
    "Table for {people}, {place}, {day} {time}, please.",
    "Can we come to {place} on {day} at {time}? We are {people}.",
    "We are {people} and want to eat at {place}, {day} {time}.",
    "Please reserve {place} for {day} at {time}, {people} people.",
    "{day} at {time}, {people} people, {place}. Is that free?",
    "I need {place} on {day} for {people}, around {time}.",
    "Is {place} open on {day}? {people} of us, at {time}.",
    "Hi! {people} guests at {place} this {day}, {time}.",
    "{place} at {time} on {day}? Party of {people}.",
    "At {time} on {day} the {people} of us would love {place}.",
    "Eating at {place}: {people} people, {day}, {time}.",
)


class Example(NamedTuple):
    """What the guest writes, and the record that should come out."""

    request: str
    record: str


class Split(NamedTuple):
    """Examples to train on, and others whose records never occur among them."""

    train: list[Example]
    held_out: list[Example]


def split(seed: int = SEED, train: int = TRAIN, held_out: int = HELD_OUT) -> Split:
    """`train` + `held_out` examples, no record twice; the same for a seed on every Python."""
    stream = _examples(random.Random(seed))
    chosen: dict[str, Example] = {}
    while len(chosen) < train + held_out:
        example = next(stream)
        chosen.setdefault(example.record, example)
    examples = list(chosen.values())
    return Split(examples[:train], examples[train:])


def _examples(rng: random.Random):
    # Only random() promises the same sequence on every Python version; choice() doesn't.
    pick = lambda table: table[int(rng.random() * len(table))]
    people, days, times = list(PEOPLE), list(DAYS), list(TIMES)
    while True:
        place, party, day, time = pick(PLACES), pick(people), pick(days), pick(times)
        said = party if rng.random() < 0.5 else PEOPLE[party]
        text = pick(PHRASES).format(place=place, people=said, day=day, time=time)
        record = " | ".join([place, PEOPLE[party], DAYS[day], TIMES[time]])
        yield Example(text[0].upper() + text[1:], record)


def prompt(example: Example) -> list[dict[str, str]]:
    """The messages that ask for the record."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": example.request},
    ]


def conversations(examples: Iterable[Example]) -> list[dict[str, list[dict[str, str]]]]:
    """Rows with a `messages` column, as a trainer takes them."""
    answer = lambda e: {"role": "assistant", "content": e.record}
    return [{"messages": [*prompt(e), answer(e)]} for e in examples]


def score(answers: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Share of answers equal to what was expected, from 0 to 1; nothing is stripped.

    Give both with their end token, as text or tuples of ids. Raises ValueError unless one to one.
    """
    if len(answers) != len(expected) or not expected:
        raise ValueError(f"got {len(answers)} answers for {len(expected)} expected ones")
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(expected)


def best_constant(expected: Sequence[Hashable]) -> float:
    """The score of the one answer that would do best if it were always given."""
    if not expected:
        raise ValueError("got no expected answers")
    return Counter(expected).most_common(1)[0][1] / len(expected)
