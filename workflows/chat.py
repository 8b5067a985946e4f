"""Talk to a model in a terminal.

python -m workflows.chat FOLDER
"""

import argparse
import sys

import numpy as np

from bridge import tokenizer as text
from unsloth_jax.sample import Sampling
from workflows.face import FastLanguageModel
from workflows.model import Model


class Printed:
    """Prints an answer as it grows, holding back what may still be half a character."""

    def __init__(self, model: Model):
        self._model, self._tokens, self._length = model, [], 0

    def put(self, tokens: np.ndarray) -> None:
        stops = self._model.stop_ids()
        self._tokens += [t for t in np.atleast_1d(tokens).tolist() if t >= 0 and t not in stops]
        whole = self._model.tokenizer.decode(self._tokens)
        if not whole.endswith("\ufffd"):
            self._show(whole, end="")

    def end(self) -> None:
        self._show(self._model.tokenizer.decode(self._tokens), end="\n")

    def _show(self, whole: str, end: str) -> None:
        print(whole[self._length :], end=end, flush=True)
        self._length = len(whole)


def reply(model: Model, messages: list[dict], sampling: Sampling, limit: int, seed: int) -> str:
    """Prints and returns the answer to a conversation."""
    ids = text.ids(model.tokenizer, messages, add_generation_prompt=True)
    room = model.max_seq_length - len(ids)
    if room < 1:
        raise ValueError(
            f"the conversation has {len(ids)} tokens, max_seq_length is {model.max_seq_length}"
        )
    shown = Printed(model)
    (answer,) = model.answers(
        [ids], max_new_tokens=min(limit, room), sampling=sampling, streamer=shown, seed=seed
    )
    shown.end()
    body = answer.tokens[:-1] if answer.stopped else answer.tokens
    return model.tokenizer.decode(body)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.chat", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", help="a model or adapter folder, a GGUF file or a hub name")
    parser.add_argument("--system", help="the system message; by default the chat template's")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-seq-length", type=int, default=2048)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens")
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=3407)
    width = parser.add_mutually_exclusive_group()
    width.add_argument("--load-in-4bit", action="store_true")
    width.add_argument("--load-in-8bit", action="store_true")
    a = parser.parse_args()
    try:
        model, _ = FastLanguageModel.from_pretrained(
            a.folder, a.max_seq_length, load_in_4bit=a.load_in_4bit, load_in_8bit=a.load_in_8bit
        )
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty)
    start = [{"role": "system", "content": a.system}] if a.system else []
    messages = list(start)
    print("empty line or Ctrl-D ends; /new starts over", file=sys.stderr)
    while line := ask():
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        messages.append(
            {
                "role": "assistant",
                "content": reply(model, messages, sampling, a.max_new_tokens, a.seed),
            }
        )


def ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
