"""A GGUF file run in llama.cpp, in a process of its own.

An assertion that fails in GGML ends its process; this way it ends none but that one, and its memory
goes with it. `python -m workflows.llama_cpp` takes the work as JSON on stdin and answers on stdout.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

MOST_THREADS = 16
PR_SET_PDEATHSIG = 1
CONTEXT = 256  # tokens of each conversation
# A run that hangs is ended; two slow cores need a third of this for 8 prompts of 32 new tokens.
SECONDS, SECONDS_PER_GB = 300, 90
LAST_LINES = 8
BROKEN = 3  # exit status: the package can't be imported
LEFT_OUT = "run_in_llama_cpp=False leaves this check out"


class NotRun(Exception):
    """llama.cpp could not be asked; says nothing about the file."""


class Greedy(NamedTuple):
    """Tokens [prompts, new] by greedy choice among all but `barred`, which end an answer."""

    tokens: list[list[int]]
    barred: list[int]


def absent() -> str | None:
    """Why llama.cpp can't be run here, None where it can."""
    if util.find_spec("xllamacpp") is None:
        return "the package xllamacpp is not installed"
    return None


def greedy(path: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> Greedy:
    """llama.cpp's continuations of token ids, all prompts at once; no token ends them early.

    Raises ValueError where llama.cpp does not load or run the file, or answers something else.
    """
    body = {
        "prompt": [list(prompt) for prompt in prompts],
        "n_predict": new_tokens,
        "samplers": ["temperature"],
        "temperature": 0,
        "ignore_eos": True,
        "return_tokens": True,
        "cache_prompt": False,
    }
    found = _asked(path, [("/completion", body)], slots=len(prompts))[0]
    rows = sorted(found, key=lambda row: row["index"])
    tokens = [row["tokens"] for row in rows]
    if [len(row) for row in tokens] != [new_tokens] * len(prompts):
        lengths = [len(row) for row in tokens]
        raise ValueError(
            f"{path.name}: llama.cpp answered {len(prompts)} prompts with {lengths} tokens, "
            f"expected {new_tokens} each; {LEFT_OUT}"
        )
    barred = [bias["token"] for bias in rows[0]["generation_settings"]["logit_bias"]]
    return Greedy(tokens, barred)


def chat(path: Path, conversations: Sequence[list[dict]], new_tokens: int) -> list[str]:
    """llama.cpp's greedy answers, through the file's own template and tokenizer.

    Raises ValueError as `greedy`.
    """
    ask = lambda messages: {"messages": messages, "temperature": 0, "max_tokens": new_tokens}
    posts = [("/v1/chat/completions", ask(messages)) for messages in conversations]
    return [found["choices"][0]["message"]["content"] for found in _asked(path, posts)]


def _asked(path: Path, posts: Sequence[tuple[str, dict]], slots: int = 1) -> list[Any]:
    """The server's answer to each (route, body), from a process that ends with the last."""
    work = {"path": str(path), "slots": slots, "threads": _threads(), "posts": posts}
    limit = SECONDS + SECONDS_PER_GB * path.stat().st_size / 1e9
    # The same packages as here, whatever found them; no folder of a user's stands before these.
    command = [sys.executable, "-P", "-m", "workflows.llama_cpp"]
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    # UTF-8 whatever the locale; the last lines of an abort are its reason, not a stack.
    env = os.environ | {"PYTHONPATH": places, "PYTHONUTF8": "1", "GGML_NO_BACKTRACE": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(
            command,
            input=json.dumps(work),
            env=env,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{path.name}: it did not finish within {limit:.0f} s") from None
    if done.returncode == BROKEN:
        raise NotRun(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        last = "\n  ".join(done.stderr.strip().splitlines()[-LAST_LINES:]) or "nothing"
        raise ValueError(
            f"{path.name}: llama.cpp ended with exit status {done.returncode} instead of answers "
            f"({LEFT_OUT}); its last lines:\n  {last}"
        )
    return json.loads(done.stdout)


def _threads() -> int:
    """OMP_NUM_THREADS where it is a number over 0, else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    number = int(asked) if asked.isascii() and asked.isdigit() else 0
    return min(MOST_THREADS, number or len(os.sched_getaffinity(0)))


def _serving(work: dict[str, Any]) -> Any:
    """A server on the CPU whose cache and attention add no rounding to that of the weights."""
    try:
        import xllamacpp
    except ImportError as error:
        print(f"the package xllamacpp can't be imported: {error}", file=sys.stderr)
        sys.exit(BROKEN)

    params = xllamacpp.CommonParams()
    params.model.path = work["path"]
    params.n_parallel, params.n_ctx = work["slots"], CONTEXT * work["slots"]
    params.warmup, params.verbosity = False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = 0
    # Weights stay where they lie in the file, mapped, without a copy in another order.
    params.no_extra_bufts = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = work["threads"]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as refusal:
        sys.exit(str(refusal))


def _posted(server: Any, route: str, body: dict) -> Any:
    request = urllib.request.Request(
        server.listening_address + route,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with local.open(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refusal:
        sys.exit(f"{route} was refused: {refusal.read().decode(errors='replace')}")


def _end_with_parent() -> None:
    """Has Linux end this process where the one that waits for it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp prints is no part of the answers
    work = json.load(sys.stdin)
    server = _serving(work)
    found = [_posted(server, route, body) for route, body in work["posts"]]
    answers.write(json.dumps(found))
    answers.flush()
    os._exit(0)  # a server may wait for its own threads for ever


if __name__ == "__main__":
    main()
