"""What speaks vLLM's two faces, `vllm.LLM` and its server, and draws with our own sampler.

It loads adapters from their folders as vLLM does, so that what is written, named and asked is
tested where vLLM is not installed; test_vllm.py does the same with vLLM itself.
"""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

from bridge import peft_adapter
from unsloth_jax import lora
from workflows import rollout
from workflows.sampling_params import SamplingParams


class Base:
    """A model's base with adapters by name. `stale` answers any name with the first adapters."""

    def __init__(self, model: Any, stale: bool = False):
        self.model, self.stale = model, stale
        self.adapters: dict[str, Any] = {}
        self.first: Any = None
        self.log: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def load(self, name: str, folder: str) -> None:
        found, s = peft_adapter.load(folder, self.model.params)
        self.first = self.first or found
        with self.lock:
            self.adapters[name] = (self.first if self.stale else found), s
        self.log.append(("load", name))

    def unload(self, name: str) -> None:
        del self.adapters[name]
        self.log.append(("unload", name))

    def draw(self, name: str, ids: list[int], asked: dict[str, Any]) -> list[rollout.Completion]:
        pairs, s = self.adapters[name]
        m = self.model
        params = lora.attach(m.params, pairs, lora.scaling(s.alpha, s.rank, s.rslora))
        names = ("n", "temperature", "max_tokens", "stop_token_ids", "ignore_eos", "seed")
        how = SamplingParams(**{name: asked[name] for name in names})
        with self.lock:
            found = rollout.run(m.family, m.config, params, [ids], how)
        return found.completions[0]


class LLM:
    """`vllm.LLM` as far as it is used."""

    base: Base
    made: list[dict[str, Any]] = []

    def __init__(self, **options: Any):
        self.made.append(options)
        self.names: dict[int, str] = {}
        self.llm_engine = SimpleNamespace(add_lora=self._add, remove_lora=self._remove)

    def _add(self, request: Any) -> bool:
        assert request.lora_int_id not in self.names
        self.base.load(request.lora_name, request.lora_path)
        self.names[request.lora_int_id] = request.lora_name
        return True

    def _remove(self, number: int) -> bool:
        self.base.unload(self.names.pop(number))
        return True

    def generate(self, prompts, params, lora_request, use_tqdm):
        outputs = []
        for prompt, how in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"]
            found = self.base.draw(lora_request.lora_name, ids, vars(how))
            each = [
                SimpleNamespace(
                    index=n, token_ids=tuple(one.tokens), finish_reason=one.finish_reason,
                    logprobs=[{i: SimpleNamespace(logprob=x)}
                              for i, x in zip(one.tokens, one.logprobs, strict=True)],
                    stop_reason=one.stop_reason,
                )
                for n, one in enumerate(found)
            ]  # fmt: skip
            outputs.append(
                SimpleNamespace(outputs=each[::-1], prompt_token_ids=ids, lora_request=lora_request)
            )
        return outputs


def installed(patch: Any, base: Base) -> type[LLM]:
    """Puts the stand-in where `import vllm` finds it; its LLM counts how often it is made."""
    patch.setattr(LLM, "made", [])
    patch.setattr(LLM, "base", base, raising=False)
    names = ("vllm", "vllm.lora", "vllm.lora.request")
    modules = {name: ModuleType(name) for name in names}
    modules["vllm"].LLM, modules["vllm"].SamplingParams = LLM, SimpleNamespace
    request = lambda name, number, path: SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    modules["vllm.lora.request"].LoRARequest = request
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    return LLM


@contextmanager
def serving(base: Base, **changes: Any):
    """The address of a server; `changes` stand in its completions' answers."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._give({"data": [{"id": "base", "max_model_len": base.model.max_seq_length}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/completions":
                self._give(answer(body) | changes)
            elif self.path == "/v1/load_lora_adapter":
                base.load(body["lora_name"], body["lora_path"])
                self._give("Success")
            elif self.path == "/v1/unload_lora_adapter":
                base.unload(body["lora_name"])
                self._give("Success")

        def _give(self, what: Any) -> None:
            refused = changes.get("refuses") == self.path
            self.send_response(404 if refused else 200)
            self.end_headers()
            self.wfile.write((what if isinstance(what, str) else json.dumps(what)).encode())

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        assert body["return_token_ids"] and body["top_p"] == 1.0 and body["logprobs"] == 0
        found = base.draw(body["model"], body["prompt"], body)
        choices = [
            {
                "index": n, "token_ids": one.tokens, "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason, "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": one.logprobs},
            }
            for n, one in enumerate(found)
        ]  # fmt: skip
        return {"model": body["model"], "choices": choices[::-1]}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
