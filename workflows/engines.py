"""What draws completions for GRPO: token ids of prompts in, `rollout.Rollout` out, no text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax

from unsloth_jax import lora, tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Hosted
from workflows import machine, plan, rollout
from workflows.grpo_prompts import Prompt
from workflows.model import Model
from workflows.rollout import Rollout
from workflows.sampling_params import SamplingParams

SLOTS = 256


@runtime_checkable
class Engine(Protocol):
    """Draws `settings.n` completions of each prompt from the policy with these adapters."""

    def draw(
        self, adapters: Params, prompts: Sequence[Prompt], settings: SamplingParams, seed: int
    ) -> Rollout:
        """The completions, a prompt's together."""

    def close(self) -> None:
        """Gives back what a run held."""


@dataclass
class InProcess:
    """Our own sampler, which reads the learner's weights; nothing moves."""

    model: Model
    slots: int | None = None  # completions at once; None: all, at most 256
    budget: int | float | str | None = None  # memory_budget; None: the model's

    def draw(
        self, adapters: Params, prompts: Sequence[Prompt], settings: SamplingParams, seed: int
    ) -> Rollout:
        m = self.model
        return rollout.run(
            m.family, m.config, live(m, adapters), [one.ids for one in prompts], settings,
            stop_ids=m.stop_ids(), seed=seed,
            slots=self.slots or min(SLOTS, len(prompts) * settings.n),
            memory=memory(m, self.budget),
        )  # fmt: skip

    def close(self) -> None:
        pass


def memory(m: Model, budget: int | float | str | None = None) -> int | None:
    """Bytes of the device that a memory_budget, by default the model's, leaves to the process."""
    asked = m.memory_budget if budget is None else budget
    return None if asked is None else plan.size(asked, machine.device_limit())


def live(m: Model, adapters: Params) -> Params:
    """The model's parameters with these adapters attached, all on the device."""
    return lora.attach(on_device(m.params), adapters, m.scale)


def on_device(params: Params) -> Params:
    """The parameters, an embedding table in host memory as an array of the device."""
    back = lambda path, leaf: jax.device_put(leaf.table) if isinstance(leaf, Hosted) else leaf
    return tree.map_paths(back, params)
