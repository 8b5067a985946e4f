"""Settings of adapters that mean nothing are refused with what was given."""

import pytest
import tiny_chat

from unsloth_jax import FastLanguageModel, SFTConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return FastLanguageModel.from_pretrained(tiny_chat.save(tmp_path_factory.mktemp("m")), 256)[0]


@pytest.mark.parametrize(
    "settings, error, said",
    [
        ({"target_modules": "(q_proj"}, ValueError, r"'\(q_proj' is no regular expression"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a number, got nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, settings, error, said):
    with pytest.raises(error, match=said):
        FastLanguageModel.get_peft_model(model, **settings)


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2"])
def test_a_moment_that_never_forgets_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be from 0 to below 1, got 1.0"):
        SFTConfig(**{name: 1.0})
