"""GRPOConfig: SFTConfig's loop, the settings of Unsloth's and TRL's GRPO."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from unsloth_jax import advantages, policy
from workflows.keywords import say, typed
from workflows.preference_config import ABSENT as PREFERENCES_ABSENT
from workflows.preference_config import LATER as PREFERENCES_LATER
from workflows.preference_config import LOSS
from workflows.sampling_params import SamplingParams
from workflows.sft_config import CHOICES, CONFIG_IGNORED, RANGES, SFTConfig

IN_PROCESS = "the sampler reads the learner's own weights"
IGNORED = CONFIG_IGNORED | {
    "ds3_gather_for_generation": IN_PROCESS,
    "cache_implementation": IN_PROCESS,
    "use_transformers_paged": IN_PROCESS,
    "vllm_group_port": "adapters move as files",
    "log_multimodal": "there are no images",
    "cast_lm_head_to_fp32": "scores are float32",
    "unsloth_grpo_mini_batch": "per_device_train_batch_size is the micro-batch",
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "use_adaptive_entropy alone reads it",
    ),
    "ref_model_mixup_alpha": "the reference stays as it is",
    "ref_model_sync_steps": "the reference stays as it is",
}
LATER = {
    name: values
    for name, values in PREFERENCES_LATER.items()
    if name not in ("unsloth_grpo_mini_batch", "tools")
} | {
    "vllm_sampling_params": (None,),
    "vllm_enable_sleep_mode": (False,),
    "vllm_structured_outputs_regex": (None,),
    "entropy_coef": (0.0,),
    "use_adaptive_entropy": (False,),
    "generation_kwargs": (None, {}),
    "max_tool_calling_iterations": (None,),
    "use_transformers_continuous_batching": (False,),
    "log_completions_hub_repo": (None,),
    "log_unique_prompts": (False,),
    "transformers_continuous_batching_config": (None, {}),
    "train_sampling_strategy": ("random",),
    "vllm_importance_sampling_cap": (None,),
}
POSITIVE = 1e-9
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
UNFILTERED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
OF_VLLM = (
    "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
    "vllm_server_timeout", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size",
    "vllm_max_model_length", "vllm_model_impl", "vllm_options", "vllm_probe_limit",
)  # fmt: skip


@dataclass(init=False)
class GRPOConfig(SFTConfig):
    """How to train with GRPO; where Unsloth's and TRL's defaults differ, they are Unsloth's.

    Args:
        prompts_per_step: prompts whose completions one optimizer step learns from; by default what
            per_device_train_batch_size times gradient_accumulation_steps completions are, rounded
            up. Given it, per_device_train_batch_size is a memory knob alone: completions that are
            in memory at once.
        num_generations: completions of a prompt, at least 2.
        max_completion_length: tokens of a completion.
        max_prompt_length: tokens of a prompt; None takes what max_completion_length leaves.
        drop_long_prompts: leaves out longer prompts instead of raising.
        steps_per_generation: micro-batches that are sampled at once, as in TRL; whole optimizer
            steps. generation_batch_size says the same in completions.
        num_iterations: how often what was sampled is learnt from.
        temperature, top_p, top_k, min_p, repetition_penalty: of the sampler. Log-probabilities
            that are learnt from are at this temperature and know no filter.
        loss_type: "bnpo", "grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo".
            As in Unsloth, "dapo" sets mask_truncated_completions and epsilon_high=0.28,
            "dr_grpo" scale_rewards="none", unless they are given.
        importance_sampling_level: "token", or "sequence" (GSPO, with loss_type "grpo").
        beta: weight of the KL divergence from the policy as it stood when the trainer was made.
        kl_on_flat_groups: whether that counts where a group's rewards are equal.
        epsilon, epsilon_high, delta: where ratios are clipped.
        scale_rewards: "group" (or True), "batch", "none" (or False).
        multi_objective_aggregation: "sum_then_normalize", or "normalize_then_sum" (GDPO).
        reward_weights: of the reward functions; by default 1.
        reward_timeout: seconds that the functions may take for one batch; None for no limit.
        mask_truncated_completions: completions that the length ended are not learnt from.
        truncated_in_statistics: whether these count in means and deviations, as in TRL.
        top_entropy_quantile: the share of tokens, those of highest entropy, that are learnt from.
        vllm_importance_sampling_correction, vllm_importance_sampling_mode,
            vllm_importance_sampling_clip_max, vllm_importance_sampling_clip_min: weights of the
            learner's over the sampler's distribution, filters included, as TRL has them for vLLM.
        off_policy_mask_threshold: leaves out bad completions this far, in nats a token, from their
            sampler.
        use_bias_correction_kl: multiplies the KL estimate by the ratio.
        shuffle_dataset: prompts come in an order of their own each epoch.
        rollout_slots: completions that are sampled at once; None takes all of a step, at most 256.
        alarms: stops with advice where most completions are cut off, no group has a signal, or
            sampler and learner drift apart.
        stop_at_kl, stop_at_length: stops where a step's mean KL divergence (nats a token) or length
            (tokens a completion) is over it.
        log_completions: the log keeps all completions of a generation, num_completions_to_print of
            them at most; else the best and the worst two of every tenth.
        num_generations_eval: completions of a held-out prompt; None takes num_generations, or 1
            where eval_temperature is 0.
        eval_temperature: of evaluations' completions; 0 is greedy, None takes temperature.
        per_device_eval_batch_size: completions that an evaluation draws and scores at once; None
            takes what training does. It changes no number.
        load_best_model_at_end: as in SFTConfig; metric_for_best_model is then "reward".
        use_vllm: draws with vLLM, which gets the adapters after each update. It tells a token's
            log-probability after filters only, so that there may be none.
        vllm_mode: "colocate", in this process, or "server".
        vllm_server_base_url, vllm_server_host, vllm_server_port, vllm_server_timeout: where the
            server is, seconds that it may take for an answer.
        vllm_gpu_memory_utilization, vllm_tensor_parallel_size, vllm_max_model_length,
            vllm_model_impl: of vLLM in this process; vllm_options are more keywords of `vllm.LLM`.
        vllm_probe_limit: nats by which a probe's log-probabilities in vLLM may differ from the
            learner's after an update, before the run ends.
    """

    prompts_per_step: int | None = None
    num_generations: int = 8
    max_completion_length: int = 512
    max_prompt_length: int | None = None
    drop_long_prompts: bool = False
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    num_iterations: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    loss_type: str = "bnpo"
    importance_sampling_level: str = "token"
    beta: float = 0.001
    kl_on_flat_groups: bool = True
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    scale_rewards: str | bool = "group"
    multi_objective_aggregation: str = "sum_then_normalize"
    reward_weights: list | tuple | None = None
    reward_timeout: float | None = None
    mask_truncated_completions: bool = False
    truncated_in_statistics: bool = True
    top_entropy_quantile: float = 1.0
    vllm_importance_sampling_correction: bool = False
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    off_policy_mask_threshold: float | None = None
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    shuffle_dataset: bool = True
    chat_template_kwargs: Mapping | None = None
    rollout_slots: int | None = None
    alarms: bool = True
    log_completions: bool = False
    num_completions_to_print: int | None = None
    stop_at_kl: float | None = None
    stop_at_length: float | None = None
    num_generations_eval: int | None = None
    eval_temperature: float | None = None
    per_device_eval_batch_size: int | None = None
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_max_model_length: int | None = None
    vllm_model_impl: str = "vllm"
    vllm_options: Mapping | None = None
    vllm_probe_limit: float = 0.05

    absent: ClassVar[tuple[str, ...]] = (
        *(name for name in PREFERENCES_ABSENT if name != LOSS), "train_sampling_strategy",
    )  # fmt: skip
    judged_by: ClassVar[str] = "reward"
    ignored: ClassVar[Mapping[str, str]] = IGNORED
    later: ClassVar[Mapping[str, tuple]] = LATER
    choices: ClassVar[Mapping[str, Iterable]] = {
        name: known for name, known in CHOICES.items() if name != LOSS
    } | {
        LOSS: policy.LOSSES,
        "importance_sampling_level": policy.LEVELS,
        "vllm_importance_sampling_mode": policy.MISMATCH,
        "scale_rewards": (*advantages.SCALES, True, False),
        "multi_objective_aggregation": advantages.AGGREGATIONS,
        "vllm_mode": ("colocate", "server"),
        "vllm_model_impl": ("vllm", "transformers", "auto"),
    }
    ranges: ClassVar[Mapping[str, tuple]] = RANGES | {
        "prompts_per_step": (1, None), "num_generations": (2, None),
        "max_completion_length": (1, None), "max_prompt_length": (1, None),
        "steps_per_generation": (1, None), "generation_batch_size": (1, None),
        "num_iterations": (1, None), "temperature": (POSITIVE, None), "beta": (0, None),
        "top_entropy_quantile": (POSITIVE, 1), "reward_timeout": (POSITIVE, None),
        "rollout_slots": (1, None), "num_completions_to_print": (1, None),
        "num_generations_eval": (1, None), "eval_temperature": (0, None),
        "stop_at_kl": (POSITIVE, None), "stop_at_length": (POSITIVE, None),
        "vllm_server_port": (1, 65535), "vllm_server_timeout": (POSITIVE, None),
        "vllm_gpu_memory_utilization": (POSITIVE, 1), "vllm_tensor_parallel_size": (1, None),
        "vllm_max_model_length": (1, None), "vllm_probe_limit": (POSITIVE, None),
    }  # fmt: skip

    def __init__(self, **given: Any):
        told = {"dapo": dict(mask_truncated_completions=True, epsilon_high=0.28),
                "dr_grpo": dict(scale_rewards="none")}  # fmt: skip
        kind = given.get(LOSS, type(self).loss_type)
        own = told.get(kind, {}) if isinstance(kind, str) else {}
        more = {name: value for name, value in own.items() if name not in given}
        if more:
            say(f"loss_type={kind!r} sets {more}, as in Unsloth")
        super().__init__(**(given | more))
        self.scale_rewards = {True: "group", False: "none"}.get(
            self.scale_rewards, self.scale_rewards
        )

    def _check_loss(self) -> None:
        policy.check(self.policy_loss)
        self.sampling()
        self.sampling_eval()
        weights = {f"reward_weights[{n}]": x for n, x in enumerate(self.reward_weights or ())}
        typed("GRPOConfig", weights, dict.fromkeys(weights, float))
        if self.stop_at_kl is not None and not self.beta:
            raise ValueError(f"GRPOConfig: stop_at_kl={self.stop_at_kl} needs a beta over 0")
        self._check_vllm()
        updates = self.updates
        if self.vllm_importance_sampling_correction and self.loss_type == "vespo":
            if not self.vllm_importance_sampling_mode.startswith("token"):
                raise ValueError(
                    "GRPOConfig: loss_type='vespo' sums weights of tokens; expected "
                    "vllm_importance_sampling_mode 'token_truncate' or 'token_mask', got "
                    f"{self.vllm_importance_sampling_mode!r}"
                )
        if self.save_strategy == "steps" and self.save_steps % updates:
            raise ValueError(
                f"GRPOConfig: save_steps={self.save_steps} cuts what {updates} updates learn "
                f"from; expected a multiple of {updates}"
            )

    def _check_vllm(self) -> None:
        if not self.use_vllm:
            plain = {name: getattr(type(self), name) for name in OF_VLLM}
            given = [name for name in OF_VLLM if getattr(self, name) != plain[name]]
            if given:
                say(f"GRPOConfig: {', '.join(given)} have no effect: {IN_PROCESS}")
            return
        filters = {name: getattr(self, name) or 0 for name in UNFILTERED}
        filters["top_k"] = max(filters["top_k"], 0)  # -1 keeps all, as 0 does
        wrong = [f"{name}={x!r}" for name, x in filters.items() if x != UNFILTERED[name]]
        if wrong:
            raise ValueError(
                f"GRPOConfig: {', '.join(wrong)} with use_vllm=True: vLLM tells a token's "
                "log-probability after filters and penalties only, and the learner needs the one "
                f"before; expected {UNFILTERED}, or use_vllm=False"
            )

    @property
    def policy_loss(self) -> policy.Loss:
        """Which loss is lowered."""
        own = {name: getattr(self, name) for name in policy.Loss._fields}
        return policy.Loss(**own)

    def sampling(self) -> SamplingParams:
        """How a prompt's completions are drawn; raises ValueError where they can't be."""
        own = {name: getattr(self, name) or 0 for name in SAMPLED}
        return SamplingParams(n=self.num_generations, max_tokens=self.max_completion_length, **own)

    def sampling_eval(self) -> SamplingParams:
        """How an evaluation draws completions; raises ValueError where they would be the same."""
        heat, asked = self.eval_temperature, self.num_generations_eval
        how = self.sampling()
        if heat is None:
            return replace(how, n=asked or how.n)
        if heat == 0 and (asked or 1) > 1:
            raise ValueError(
                f"GRPOConfig: num_generations_eval={asked} greedy completions of a prompt would "
                "be the same; expected 1 where eval_temperature=0"
            )
        return replace(how, n=asked or (how.n if heat else 1), temperature=heat)

    @property
    def prompts_a_step(self) -> int:
        """Prompts that an optimizer step learns from."""
        if self.prompts_per_step is not None:
            return self.prompts_per_step
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return -(-rows // self.num_generations)

    @property
    def steps_a_generation(self) -> int:
        """Optimizer steps' worth of completions that are sampled at once."""
        micro = self.steps_per_generation
        if self.generation_batch_size is not None:
            if micro is not None:
                raise ValueError(
                    "GRPOConfig: generation_batch_size and steps_per_generation say the same; "
                    "expected one of them"
                )
            rows = self.prompts_a_step * self.num_generations
            return self._whole("generation_batch_size", self.generation_batch_size, rows)
        if micro is None:
            return 1
        return self._whole("steps_per_generation", micro, self.gradient_accumulation_steps)

    def _whole(self, name: str, given: int, step: int) -> int:
        if given % step:
            raise ValueError(
                f"GRPOConfig: {name}={given} is no whole number of optimizer steps, of which each "
                f"takes {step}"
            )
        return given // step

    @property
    def updates(self) -> int:
        """Optimizer steps from one generation to the next."""
        return self.steps_a_generation * self.num_iterations
