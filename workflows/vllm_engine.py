"""vLLM as what draws GRPO's completions: adapters moved after each update, and probed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

from bridge import vllm
from unsloth_jax import data
from unsloth_jax.dims import Params
from workflows import grpo_objective
from workflows.generate import Stopwatch
from workflows.grpo_config import GRPOConfig
from workflows.grpo_prompts import Prompt
from workflows.grpo_rows import Layout
from workflows.model import Model
from workflows.objective import embedded
from workflows.rollout import Completion, Counts, Rollout
from workflows.run import short_hash
from workflows.sampling_params import SamplingParams

PROBED = 16  # tokens of the probe


@dataclass
class VLLM:
    """An engine whose sampler gets each version of the adapters before it draws.

    After each move a probe is drawn: its tokens' log-probabilities must be the learner's within
    `limit` nats, else RuntimeError.
    """

    sampler: vllm.Sampler
    model: Model
    temperature: float | int
    limit: float | int
    probe: list[int]
    told: dict[str, float] = field(default_factory=dict)
    held: str | None = None  # the hash of the adapters that vLLM has

    def draw(
        self, adapters: Params, prompts: Sequence[Prompt], settings: SamplingParams, seed: int
    ) -> Rollout:
        clock = Stopwatch()
        self.sync(adapters)
        aside = clock()
        how = vllm.How(settings.n, settings.temperature, settings.max_tokens, self.model.stop_ids())
        # vLLM counts up from a prompt's seed for its completions.
        seeds = [(seed << 20) + i * settings.n for i in range(len(prompts))]
        found = self.sampler.draw([one.ids for one in prompts], how, seeds)
        groups = [[_completion(one) for one in group] for group in found]
        tokens = sum(len(one.tokens) for group in groups for one in group)
        read = sum(len(one.ids) for one in prompts)
        return Rollout(groups, Counts(read, tokens, 0), None, dict(self.told), aside)

    def sync(self, adapters: Params) -> None:
        """Gives vLLM these adapters, unless it has them, and compares a probe."""
        now = short_hash(adapters)
        if now == self.held:
            self.told |= {"vllm/sync_bytes": 0, "vllm/sync_seconds": 0.0}
            return
        self.held = None
        version = self.sampler.update(adapters)
        self.told = {
            "vllm/adapter_version": version.number,
            "vllm/sync_bytes": version.bytes,
            "vllm/sync_seconds": round(version.seconds, 4),
            "vllm/probe_difference": self._probed(adapters, version),
        }
        self.held = now

    def close(self) -> None:
        self.held = None
        self.sampler.close()

    def _probed(self, adapters: Params, version: vllm.Version) -> float:
        """The largest difference over the probe's tokens, nats."""
        how = vllm.How(1, self.temperature, PROBED)
        [[drawn]] = self.sampler.draw([self.probe], how, [version.number])
        gap = float(np.abs(self._learners(adapters, drawn.tokens) - drawn.logprobs).max())
        if not gap <= self.limit:
            raise RuntimeError(
                f"vLLM with version {version.number} of the adapters and the learner differ by "
                f"{gap:.4f} nats over a probe of {len(drawn.tokens)} tokens (vllm_probe_limit="
                f"{self.limit}): it has other adapters, another base (a 4-bit one here, 16 bits "
                f"there), or tells log-probabilities in another mode than {vllm.MODE}. The "
                "completions would not be the policy's"
            )
        return gap

    def _learners(self, adapters: Params, tokens: list[int]) -> np.ndarray:
        """The learner's log-probabilities of tokens after the probe."""
        size = len(self.probe), PROBED
        layout = Layout(1, 1, 1, size, data.rounded(sum(size), data.STEP))
        batch = layout.laid([self.probe], [tokens], [[1] * len(tokens)], {}, {})
        batch = embedded(self.model.params, batch)._replace(beside=None)
        logps, _ = self._scored(adapters, self.model.params, batch)
        return np.asarray(logps)[0, 0, : len(tokens)]

    @cached_property
    def _scored(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        m = self.model
        return grpo_objective.of_each(m.family, m.config, m.scale, self.temperature)


def made(model: Model, args: GRPOConfig, length: int, probe: list[int]) -> VLLM:
    """The engine that `args` ask for; `length` are a row's tokens, `probe` is a prompt's ids.

    Raises ImportError without vLLM, ConnectionError without the server, ValueError for adapters
    that vLLM can't take and a model that is no Hugging Face folder.
    """
    if model.peft is None:
        raise ValueError("use_vllm=True moves adapters, but all weights of the model are trained")
    vllm.check(model.peft, model.adapters)
    host: Any
    if args.vllm_mode == "server":
        url = args.vllm_server_base_url
        url = url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        host = vllm.Server(url, args.vllm_server_timeout)
        host.check(length)
    else:
        host = _in_process(model, args, length)
    sampler = vllm.Sampler(host, model.peft, model.initial)
    limit = args.vllm_probe_limit
    return VLLM(sampler, model, args.temperature, limit, probe[: length - PROBED])


def _in_process(model: Model, args: GRPOConfig, length: int) -> vllm.InProcess:
    folder = getattr(model.source, "folder", None)
    if folder is None:
        raise ValueError(f"vLLM reads Hugging Face folders; {model.name} is none")
    return vllm.in_process(
        folder,
        dtype=str(np.dtype(model.dtype)),
        rank=vllm.rank(model.peft, model.initial),
        length=args.vllm_max_model_length or length,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        model_impl=args.vllm_model_impl,
        **(args.vllm_options or {}),
    )


def _completion(one: vllm.Drawn) -> Completion:
    # Nothing is filtered, so that what tokens are drawn from is what the learner knows.
    return Completion(one.tokens, one.logprobs, one.logprobs, one.finish_reason, one.stop_reason)
