"""train_on_responses_only with Unsloth's name and arguments."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from unsloth_jax.data import Row
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
    """The trainer, its training and evaluation rows supervised on the assistant's answers only.

    Args:
        instruction_part, response_part: texts that open a user's and the assistant's turn; without
            them the chat template's own are found.
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

    if callable(trainer.rows):
        raise ValueError(
            "train_on_responses_only needs rows that are there; a streamed data set of messages "
            "takes SFTConfig(assistant_only_loss=True)"
        )

    def masked(rows: list[Row]) -> list[Row]:
        return responses.responses_only(
            rows,
            tokenizer or trainer.tokenizer,
            instruction_part,
            response_part,
            force_match=force_match,
            last_response_only=last_response_only,
        )

    trainer.rows = masked(trainer.rows)
    trainer.eval_rows = {name: masked(some) for name, some in trainer.eval_rows.items()}
    return trainer
