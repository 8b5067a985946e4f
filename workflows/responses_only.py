"""train_on_responses_only with Unsloth's name and arguments."""

import functools
from typing import Any

from transformers import PreTrainedTokenizerBase

from workflows import responses
from workflows.keywords import typed
from workflows.sft_trainer import SFTTrainer

RESPONSES_KINDS = {
    "trainer": SFTTrainer, "instruction_part": str | None, "response_part": str | None,
    "force_match": bool, "tokenizer": PreTrainedTokenizerBase | None, "last_response_only": bool,
}  # fmt: skip


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> SFTTrainer:
    """The trainer, its training and evaluation rows supervised on the assistant's answers only,
    as are data sets that `evaluate` is given.

    Without markers, rows of messages are masked as `assistant_only_loss=True` masks them, by
    rendering them turn by turn, and other rows by markers found in the chat template.

    Args:
        instruction_part, response_part: texts that open a user's and the assistant's turn.
        last_response_only: only each row's last answer counts.

    Raises ValueError for one part without the other, or a row that keeps no supervised token.
    """
    given = dict(
        trainer=trainer, instruction_part=instruction_part, response_part=response_part,
        force_match=force_match, tokenizer=tokenizer, last_response_only=last_response_only,
    )  # fmt: skip
    typed("train_on_responses_only", given, RESPONSES_KINDS)
    if return_function:
        raise ValueError("train_on_responses_only: return_function=True is not supported yet")

    speaking = tokenizer or trainer.tokenizer
    if (instruction_part, response_part) == (None, None):
        elsewhere = responses.Detected(speaking, last_response_only)
        trainer.read_again(elsewhere=elsewhere, last_response_only=last_response_only)
        return trainer
    between = functools.partial(
        responses.responses_only, tokenizer=speaking, instruction_part=instruction_part,
        response_part=response_part, force_match=force_match,
        last_response_only=last_response_only,
    )  # fmt: skip
    trainer.mask(between)
    return trainer
