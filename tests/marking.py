"""A row as text, for tests that compare it with text written by hand."""

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase


def marked(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], mask: Sequence[int]) -> str:
    """The row as text, with [[ ]] around each stretch that the loss predicts."""
    pairs = zip(tokens, mask, strict=True)
    runs = [(on, [t for t, _ in run]) for on, run in groupby(pairs, lambda pair: pair[1])]
    show = lambda on, run: f"[[{tokenizer.decode(run)}]]" if on else tokenizer.decode(run)
    return "".join(show(on, run) for on, run in runs)
