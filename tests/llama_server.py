"""llama.cpp's own tokenizer and templates, asked over loopback: the reference for token ids."""

import json
import urllib.request
from pathlib import Path

import xllamacpp


def serve(path: Path) -> xllamacpp.Server:
    """A llama.cpp server for the GGUF at `path`; it stops when the object goes."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def token_ids(server: xllamacpp.Server, text: str, *, add_special: bool = False) -> list[int]:
    """llama.cpp's ids of `text`, special tokens in it taken as such."""
    asked = {"content": text, "add_special": add_special, "parse_special": True}
    return _post(server, "/tokenize", asked)["tokens"]


def rendered(server: xllamacpp.Server, messages: list[dict[str, str]]) -> str:
    """The prompt that llama.cpp's own template engine makes of a conversation."""
    return _post(server, "/apply-template", {"messages": messages})["prompt"]


def _post(server: xllamacpp.Server, route: str, body: dict) -> dict:
    request = urllib.request.Request(
        server.listening_address + route,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
