"""vLLM as a sampler over token ids, in this process or behind a server: only adapters move.

vLLM loads the base once. Each version of the adapters is a PEFT folder of its own, under a name
that no other version or run has, by which vLLM also keys its prefix cache. Nothing is decoded or
encoded: token ids go in, token ids and the log-probabilities at the run's temperature come out.
vLLM itself is imported by `in_process` alone. Written for vLLM 0.32.
"""

import http.client
import itertools
import json
import math
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

from bridge import peft_adapter, peft_experts
from bridge.peft_adapter import Settings
from unsloth_jax import lora
from unsloth_jax.dims import Params

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
AT_ONCE = 64  # requests that wait on a server
MODE = "processed_logprobs"  # after the temperature; vLLM's default is before it
START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.entrypoints.openai.api_server --model BASE "
    "--enable-lora --max-loras 1 --max-lora-rank RANK --logprobs-mode processed_logprobs"
)


class Drawn(NamedTuple):
    """One completion, its stop token included."""

    tokens: list[int]
    logprobs: list[float]  # at the temperature
    finish_reason: str  # "stop" or "length"
    stop_reason: int | str | None


class How(NamedTuple):
    """How completions are drawn; nothing is filtered."""

    n: int
    temperature: float | int
    max_tokens: int
    stop_token_ids: Sequence[int] = ()


class Version(NamedTuple):
    """The adapters that vLLM has."""

    number: int
    name: str
    folder: Path
    bytes: int  # of the adapters' values, all that moved
    seconds: float  # to write and to load them


@runtime_checkable
class Host(Protocol):
    """What holds the base and one version of the adapters."""

    def load(self, name: str, folder: Path) -> None: ...

    def unload(self, name: str) -> None: ...

    def draw(
        self, name: str, prompts: Sequence[list[int]], how: How, seeds: Sequence[int]
    ) -> list[list[Drawn]]: ...


def in_process(
    base: str | Path, *, dtype: str, rank: int, length: int, **options: Any
) -> "InProcess":
    """vLLM in this process with the model of a Hugging Face folder.

    `options` go to `vllm.LLM`. Raises ImportError where vLLM is not installed, ValueError for a
    rank that it has no room for.
    """
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "use_vllm=True needs vLLM, which is not installed: pip install 'unsloth-jax[vllm]', or "
            "vllm_mode='server' with a server that runs elsewhere on this machine"
        ) from error
    own = dict(
        model=str(base), dtype=dtype, max_model_len=length, max_lora_rank=room(rank),
        enable_lora=True, max_loras=1, logprobs_mode=MODE, skip_tokenizer_init=True,
    )  # fmt: skip
    return InProcess(vllm.LLM(**(own | options)))


def room(rank: int) -> int:
    """The least rank that vLLM makes room for and that holds `rank`."""
    found = next((r for r in RANKS if r >= rank), None)
    if found is None:
        raise ValueError(f"vLLM takes adapters of rank {RANKS[-1]} at most, got {rank}")
    return found


class InProcess:
    """A `vllm.LLM`; its adapters' numbers are never used twice in a process."""

    numbers = itertools.count(1)

    def __init__(self, llm: Any):
        self.llm = llm
        self.loaded: dict[str, Any] = {}

    def load(self, name: str, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, next(self.numbers), str(folder))
        if not self.llm.llm_engine.add_lora(request):
            raise RuntimeError(f"vLLM did not take the adapters {name} from {folder}")
        self.loaded[name] = request

    def unload(self, name: str) -> None:
        self.llm.llm_engine.remove_lora(self.loaded.pop(name).lora_int_id)

    def draw(
        self, name: str, prompts: Sequence[list[int]], how: How, seeds: Sequence[int]
    ) -> list[list[Drawn]]:
        from vllm import SamplingParams

        own = dict(
            n=how.n, temperature=how.temperature, max_tokens=how.max_tokens, ignore_eos=True,
            stop_token_ids=list(how.stop_token_ids), logprobs=0, detokenize=False,
        )  # fmt: skip
        found = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            [SamplingParams(seed=seed, **own) for seed in seeds],
            lora_request=self.loaded[name],
            use_tqdm=False,
        )
        for ids, one in zip(prompts, found, strict=True):
            by = one.lora_request and one.lora_request.lora_name
            _same(name, by, ids, one.prompt_token_ids)
        return [[_of_output(one) for one in sorted(r.outputs, key=_index)] for r in found]


def _index(output: Any) -> int:
    return output.index


def _of_output(one: Any) -> Drawn:
    ids = list(one.token_ids)
    logprobs = [at[i].logprob for i, at in zip(ids, one.logprobs, strict=True)]
    return _drawn(ids, logprobs, one.finish_reason, one.stop_reason)


class Server:
    """A vLLM server on this machine, or one that sees its files; `START` says how to start it."""

    def __init__(self, url: str, timeout: float | int = 240.0):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ValueError(f"vllm_server_base_url={url!r} is no http or https address")
        self.url, self.timeout = url, timeout
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.connect: Callable = lambda: kinds[parts.scheme](
            parts.hostname, parts.port, timeout=timeout
        )

    def check(self, length: int) -> None:
        """Raises ConnectionError without a server, ValueError where its rows are shorter."""
        found = self._ask("/v1/models")["data"]
        most = found[0].get("max_model_len")
        if most is not None and most < length:
            raise ValueError(
                f"the vLLM server at {self.url} takes {most} tokens a row, expected {length}: "
                f"start it with --max-model-len {length}"
            )

    def load(self, name: str, folder: Path) -> None:
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def draw(
        self, name: str, prompts: Sequence[list[int]], how: How, seeds: Sequence[int]
    ) -> list[list[Drawn]]:
        own = dict(
            model=name, n=how.n, temperature=how.temperature, max_tokens=how.max_tokens,
            stop_token_ids=list(how.stop_token_ids), ignore_eos=True, logprobs=0, top_p=1.0,
            top_k=0, min_p=0.0, repetition_penalty=1.0, return_token_ids=True,
            return_tokens_as_token_ids=True,
        )  # fmt: skip
        ask = lambda ids, seed: self._ask(
            "/v1/completions", own | {"prompt": list(ids), "seed": seed}
        )
        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(prompts)))) as several:
            found = list(several.map(ask, prompts, seeds))
        return [
            self._choices(name, ids, how.n, one) for ids, one in zip(prompts, found, strict=True)
        ]

    def _choices(self, name: str, ids: list[int], n: int, found: dict[str, Any]) -> list[Drawn]:
        choices = sorted(found["choices"], key=lambda one: one["index"])
        if len(choices) != n or any(one.get("token_ids") is None for one in choices):
            raise RuntimeError(
                f"the vLLM server at {self.url} gave {len(choices)} completions for {n}, or no "
                "token_ids, which return_token_ids asks for: vLLM 0.10.2 is the first that knows it"
            )
        _same(name, found["model"], ids, choices[0].get("prompt_token_ids", ids))
        return [
            _drawn(
                one["token_ids"], one["logprobs"]["token_logprobs"], one["finish_reason"],
                one.get("stop_reason"),
            )
            for one in choices
        ]  # fmt: skip

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, parsed where it is JSON. Raises ConnectionError, RuntimeError with its text.

        A timeout is told as it is.
        """
        to = self.connect()
        try:
            data = None if body is None else json.dumps(body)
            how = ("GET" if body is None else "POST", self.path + path)
            to.request(*how, data, {"Content-Type": "application/json"})
            answer = to.getresponse()
            text = answer.read().decode()
        except TimeoutError as error:
            raise TimeoutError(
                f"the vLLM server at {self.url} took more than {self.timeout} s for {path}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"no vLLM server answers at {self.url} ({error}); start one with: {START}"
            ) from error
        finally:
            to.close()
        if answer.status != 200:
            hint = f"; was it started so: {START}" if "lora" in path else ""
            raise RuntimeError(
                f"the vLLM server at {self.url} refuses {path}: {answer.status} {text[:500]}{hint}"
            )
        return json.loads(text) if text.startswith("{") else text


def _same(name: str, by: str | None, ids: Sequence[int], read: Sequence[int] | None) -> None:
    """Raises RuntimeError where other adapters answered, or other tokens were read."""
    if by != name:
        raise RuntimeError(f"vLLM answered with the adapters {by!r}, asked for {name!r}")
    if list(read or ()) != list(ids):
        raise RuntimeError(f"vLLM read the tokens {list(read or ())[:20]}, given {list(ids)[:20]}")


def _drawn(ids: list[int], logprobs: list[float], how: str, why: int | str | None) -> Drawn:
    if not ids or len(ids) != len(logprobs) or not all(map(_finite, logprobs)):
        raise RuntimeError(
            f"vLLM gave {len(ids)} tokens with log-probabilities {logprobs[:20]}; expected a "
            "finite one for each"
        )
    if how not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion by {how!r}, expected 'stop' or 'length'")
    return Drawn(list(ids), list(logprobs), how, why)


def _finite(x: float | None) -> bool:
    return x is not None and math.isfinite(x)


class Sampler:
    """A policy's adapters in vLLM, version after version; `settings` and `initial` are PEFT's."""

    def __init__(self, host: Host, settings: Settings, initial: Params | None = None):
        self.host, self.settings, self.initial = host, settings, initial
        self.run, self.version = f"unsloth-jax-{uuid.uuid4().hex[:12]}", None
        self.home: Path | None = None

    def update(self, adapters: Params) -> Version:
        """Gives vLLM these adapters, and takes back those before. Raises as `peft_adapter.save`."""
        began, last = time.perf_counter(), self.version
        self.home = self.home or Path(tempfile.mkdtemp(prefix="unsloth_jax_vllm_"))
        number = 1 + (last.number if last else 0)
        name = f"{self.run}-{number}"
        peft_adapter.save(self.home / name, adapters, self.settings, self.initial)
        self.host.load(name, self.home / name)
        taken = time.perf_counter() - began
        moved = _values(self.home / name / peft_adapter.WEIGHTS)
        self.version = Version(number, name, self.home / name, moved, taken)
        if last is not None:
            self.host.unload(last.name)
            shutil.rmtree(last.folder, ignore_errors=True)
        return self.version

    def draw(
        self, prompts: Sequence[list[int]], how: How, seeds: Sequence[int]
    ) -> list[list[Drawn]]:
        """Completions of token ids by the newest version, a prompt's together."""
        return self.host.draw(self.version.name, prompts, how, seeds)

    def close(self) -> None:
        """Removes what was written. The base stays; the next `update` goes on."""
        if self.home is not None:
            shutil.rmtree(self.home, ignore_errors=True)
            self.home = None


def rank(settings: Settings, initial: Params | None) -> int:
    """The largest rank among adapters as they are written."""
    s = settings if initial is None else peft_adapter.doubled(settings)
    return max(s.rank, *s.rank_pattern.values()) if s.rank_pattern else s.rank


def check(settings: Settings, adapters: Params) -> None:
    """Raises ValueError for what is trained and no plain adapter of a linear layer."""
    pairs, whole = lora.parts(adapters)
    others = {
        "DoRA": settings.dora,
        "weights that are trained as they are": sorted(whole)[:5],
        "adapters of experts": sorted(peft_experts.modules(pairs))[:5],
    }
    there = [f"{what} {which}" for what, which in others.items() if which]
    if there:
        raise ValueError(
            f"vLLM takes plain adapters of linear layers, but there are {', '.join(there)}: draw "
            "in process, with use_vllm=False"
        )


def _values(path: Path) -> int:
    """Bytes of a safetensors file's values, its header aside."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header
