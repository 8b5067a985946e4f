"""How completions are drawn, by vLLM's field names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unsloth_jax.sample import Sampling

RULES = {
    "n": (lambda x: x % 1 == 0 and x >= 1, "a whole number, at least 1"),
    "temperature": (lambda x: 0 <= x < math.inf, "finite and at least 0 (0 is greedy)"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "top_k": (lambda x: x % 1 == 0 and x >= -1, "a whole number (0 and -1 keep all)"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "over 0 and finite (1 changes nothing)"),
    "max_tokens": (lambda x: x % 1 == 0 and x >= 1, "a whole number, at least 1"),
}


@dataclass(frozen=True)
class SamplingParams:
    """vLLM 0.23's `SamplingParams` as far as it is known here, with its defaults.

    A prompt's `n` completions differ by their random keys; with a `seed` they are the same
    wherever the prompt stands. `stop` strings end a completion with the token that completes one,
    `stop_token_ids` with that token, as the tokenizer's own end does unless `ignore_eos`.
    Raises ValueError naming the field.
    """

    n: int = 1
    temperature: float | int = 1.0
    top_p: float | int = 1.0
    top_k: int = 0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16

    def __post_init__(self) -> None:
        for name, (fits, rule) in RULES.items():
            given = getattr(self, name)
            if not isinstance(given, int | float) or not fits(given):
                raise ValueError(f"{name} must be {rule}, got {given!r}")
        if not all(self.stops):
            raise ValueError(f"stop must hold strings that are not empty, got {self.stop!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> Sampling:
        """What a draw looks at."""
        top_k = max(self.top_k, 0)
        return Sampling(self.temperature, top_k, self.top_p, self.min_p, self.repetition_penalty)
