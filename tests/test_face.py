"""Unsloth's names: signatures, defaults, keywords; answers and logits against transformers."""

import inspect
import io
import json
import runpy
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import torch
import transformers

import unsloth_jax
from bridge import tokenizer as text
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth_jax.sample import Sampling
from workflows import chat, face
from workflows.model import Model
from workflows.plan import CHECKPOINTING

NOTEBOOKS = Path(__file__).parent / "notebooks"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEW = 16
PROMPTS = ["What is the capital of France?", "one two", "def add(a, b):\n    return a +"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture(scope="module")
def model(folder):
    return tiny_chat.load(folder)[0]


@pytest.fixture(scope="module")
def theirs(folder):
    return tiny_chat.reference(folder)


# Keywords and defaults of Unsloth's signatures; None stands for torch.save.
LOAD = dict(
    max_seq_length=2048, dtype=None, load_in_4bit=True, load_in_8bit=False, load_in_16bit=False,
    full_finetuning=False, token=None, device_map="sequential", rope_scaling=None,
    fix_tokenizer=True, trust_remote_code=False, use_gradient_checkpointing="unsloth",
    resize_model_vocab=None, revision=None, use_exact_model_name=False, offload_embedding=False,
    float32_mixed_precision=None, fast_inference=False, gpu_memory_utilization=0.5,
    float8_kv_cache=False, random_state=3407, max_lora_rank=64, disable_log_stats=True,
    qat_scheme=None, load_in_fp8=False, unsloth_tiled_mlp=False, text_only=False,
    quantization_config=None, num_labels=None, id2label=None, label2id=None, config=None,
    cache_dir=None, attn_implementation="sdpa", local_files_only=False, subfolder=None,
    variant=None, gguf_file=None, unsloth_vllm_standby=False,
)  # fmt: skip
PEFT = dict(
    r=16, target_modules=SEVEN, lora_alpha=16, lora_dropout=0.0, bias="none",
    layers_to_transform=None, layers_pattern=None, finetune_last_n_layers=None,
    use_gradient_checkpointing="unsloth", random_state=3407, max_seq_length=2048, use_rslora=False,
    modules_to_save=None, init_lora_weights=True, loftq_config={},
    temporary_location="_unsloth_temporary_saved_buffers", qat_scheme=None, target_parameters=None,
    ensure_weight_tying=False, use_dora=False,
)  # fmt: skip
CONFIG = dict(
    output_dir=None, logging_steps=1, logging_nan_inf_filter=False, per_device_train_batch_size=4,
    gradient_accumulation_steps=2, weight_decay=0.001, warmup_ratio=0.1, seed=3407,
    optim="adamw_8bit", learning_rate=5e-5, per_device_eval_batch_size=4,
    eval_accumulation_steps=2, torch_empty_cache_steps=250, report_to="none", bf16=False,
    fp16=False, auto_find_batch_size=False, dataloader_pin_memory=True, padding_free=None,
    max_seq_length=None, vllm_sampling_params=None, unsloth_num_chunks=-1,
    unsloth_logit_chunk_multiplier=None, unsloth_grpo_mini_batch=None,
    embedding_learning_rate=None, q_galore_config=None, gradient_checkpointing=True,
    model_init_kwargs=None, chat_template_path=None, dataset_text_field="text",
    dataset_kwargs=None, dataset_num_proc=None, eos_token=None, pad_token=None, packing=False,
    packing_strategy="bfd", pad_to_multiple_of=None, eval_packing=None, completion_only_loss=None,
    assistant_only_loss=False, loss_type="nll", activation_offloading=False, num_train_epochs=3,
    max_steps=-1, lr_scheduler_type="linear", eval_strategy="no", save_strategy="no",
    save_total_limit=None, max_grad_norm=1.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
    neftune_noise_alpha=None, label_smoothing_factor=0.0, push_to_hub=False,
)  # fmt: skip
MERGED = dict(
    save_method="merged_16bit", push_to_hub=False, token=None, is_main_process=True,
    state_dict=None, save_function=None, max_shard_size="5GB", safe_serialization=True,
    variant=None, save_peft_format=True, tags=None,
    temporary_location="_unsloth_temporary_saved_buffers", maximum_memory_usage=0.75,
    datasets=None, calibration_dataset=None, num_calibration_samples=512, max_seq_length=2048,
)  # fmt: skip
GGUF = dict(
    quantization_method="fast_quantized", first_conversion=None, push_to_hub=False, token=None,
    private=None, is_main_process=True, state_dict=None, save_function=None, max_shard_size="5GB",
    safe_serialization=True, variant=None, save_peft_format=True, tags=None,
    temporary_location="_unsloth_temporary_saved_buffers", maximum_memory_usage=0.85,
    save_method=None, imatrix_file=None, merge_is_disposable=True,
)  # fmt: skip
SIGNATURES = {
    FastLanguageModel.from_pretrained: LOAD | {"model_name": "unsloth/Llama-3.2-1B-Instruct"},
    FastLanguageModel.get_peft_model: PEFT | {"target_modules": tuple(SEVEN)},
    Model.save_pretrained_merged: MERGED | {"tokenizer": None},
    Model.save_pretrained_gguf: GGUF | {"tokenizer": None},
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_what_a_signature_names_has_unsloths_default(function):
    given = inspect.signature(function).parameters
    named = {name: p.default for name, p in given.items() if p.default is not p.empty}
    theirs = SIGNATURES[function]
    ours = {"base", "overwrite", "memory_budget", "run_in_llama_cpp"}
    assert {n: theirs[n] for n in named.keys() - ours} == {n: named[n] for n in named.keys() - ours}


def test_the_config_has_unsloths_defaults():
    made = vars(SFTConfig())
    assert {n: v for n, v in made.items() if n in CONFIG} == {
        n: CONFIG[n] for n in made if n in CONFIG
    }
    others = (
        "max_length warmup_steps save_steps truncation memory_budget matmul_dtype eval_steps "
        "eval_on_start lr_scheduler_kwargs load_best_model_at_end metric_for_best_model "
        "greater_is_better loraplus_lr_ratio optim_args train_sampling_strategy group_by_length "
        "run_name project logging_dir sample_prompts sample_steps sample_max_new_tokens "
        "router_aux_loss_coef"
    )
    assert made.keys() - CONFIG.keys() == set(others.split())
    assert vars(SFTConfig(**CONFIG)) == made


def test_every_reference_keyword_with_its_default_is_taken(folder, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(str(folder), **(LOAD | {"max_seq_length": 64}))
    assert model.quantized
    assert FastLanguageModel.get_peft_model(model, **PEFT) is model
    model.save_pretrained_merged(tmp_path / "m", None, **MERGED)
    model.save_pretrained_gguf(tmp_path / "g", None, **GGUF)
    assert (tmp_path / "g" / "model.Q8_0.gguf").exists()
    SFTTrainer(
        model=model, args=SFTConfig(**CONFIG), train_dataset=tiny_chat.TEXTS, eval_dataset=None,
        processing_class=None, compute_loss_func=None, compute_metrics=None, callbacks=None,
        optimizers=(None, None), optimizer_cls_and_kwargs=None, formatting_func=None,
        preprocess_logits_for_metrics=None, peft_config=None, data_collator=None,
    )  # fmt: skip


REFUSED = {
    "from_pretrained": dict(
        load_in_fp8="block", fast_inference=True,
        rope_scaling={"type": "linear"}, qat_scheme="int4", num_labels=2, trust_remote_code=True,
        float32_mixed_precision=False, offload_embedding=True, quantization_config={},
        text_only=True,
        unsloth_tiled_mlp="arctic", gguf_file="x.gguf", config={}, float8_kv_cache=True,
    ),
    "get_peft_model": dict(
        bias="all", loftq_config={"loftq_bits": 8}, qat_scheme="int4",
        layers_pattern="h", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2},
    ),
    "SFTConfig": dict(
        push_to_hub=True, activation_offloading=True, q_galore_config=1,
    ),
    "SFTTrainer": dict(compute_loss_func=len, model_init=len),
    "save_pretrained": dict(push_to_hub=True, state_dict={}, selected_adapters=["x"]),
    "save_pretrained_merged": dict(push_to_hub=True, token="x", tags=["x"], datasets=["x"]),
    "save_pretrained_gguf": dict(
        push_to_hub=True, first_conversion="f16", imatrix_file="x", save_method="lora",
    ),
    "generate": dict(num_beams=2, num_return_sequences=True, no_repeat_ngram_size=3, typical_p=0.5),
}  # fmt: skip


def call(where: str, model: Model, folder: Path, **keywords):
    return {
        "from_pretrained": lambda **k: FastLanguageModel.from_pretrained(str(folder), **k),
        "get_peft_model": lambda **k: FastLanguageModel.get_peft_model(model, **k),
        "SFTConfig": SFTConfig,
        "SFTTrainer": lambda **k: SFTTrainer(model=model, **k),
        "save_pretrained": lambda **k: model.save_pretrained("never", **k),
        "save_pretrained_merged": lambda **k: model.save_pretrained_merged("never", **k),
        "save_pretrained_gguf": lambda **k: model.save_pretrained_gguf("never", **k),
        "generate": lambda **k: model.generate([[3]], **k),
    }[where](**keywords)


@pytest.mark.parametrize(
    "where, name, value", [(w, n, v) for w, k in REFUSED.items() for n, v in k.items()]
)
def test_a_later_feature_is_refused_by_name(model, folder, where, name, value):
    with pytest.raises(ValueError, match=f"{where}: {name}=.* is not supported yet; supported"):
        call(where, model, folder, **{name: value})


UNKNOWN = {
    "from_pretrained": ("load_in_4bits", "load_in_4bit"),
    "get_peft_model": ("lora_alfa", "lora_alpha"),
    "SFTConfig": ("learning_rates", "learning_rate"),
    "SFTTrainer": ("train_data", "train_dataset"),
    "save_pretrained": ("save_dir", "save_directory"),
    "save_pretrained_merged": ("save_methods", "save_method"),
    "save_pretrained_gguf": ("quantisation_method", "quantization_method"),
    "generate": ("top_kk", "top_k"),
}


@pytest.mark.parametrize("where", UNKNOWN)
def test_an_unknown_keyword_names_the_nearest(model, folder, where):
    wrong, right = UNKNOWN[where]
    with pytest.raises(TypeError, match=f"{where} got an unknown keyword '{wrong}'.*'{right}'"):
        call(where, model, folder, **{wrong: 1})


def test_a_keyword_without_effect_says_why_once(capsys):
    for _ in range(2):
        SFTConfig(disable_tqdm=True, data_seed=7)
    assert capsys.readouterr().out.splitlines() == [
        "unsloth_jax: SFTConfig(disable_tqdm=True) has no effect: the progress bar shows only in a "
        "terminal",
        "unsloth_jax: SFTConfig(data_seed=7) has no effect: seed decides",
    ]


BAD_CONFIGS = [
    (dict(optim="sgdm"), "optim 'sgdm' .*adamw_8bit"),
    (dict(lr_scheduler_type="wave"), "wave.*cosine"),
    (dict(save_strategy="best"), "save_strategy 'best'.*steps"),
    (dict(learning_rate=-1), "learning_rate must be at least 0"),
    (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be at least 1"),
    (dict(num_train_epochs=0), "max_steps or num_train_epochs over 0"),
]


@pytest.mark.parametrize("given, message", BAD_CONFIGS, ids=str)
def test_settings_without_meaning_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**given)


DTYPES = [
    (None, "float32"), ("bfloat16", "bfloat16"), (np.float16, "float16"),
    (jnp.bfloat16, "bfloat16"), (np.dtype("float32"), "float32"), (torch.float16, "float16"),
]  # fmt: skip


@pytest.mark.parametrize("given, name", DTYPES, ids=str)
def test_a_dtype_is_a_name_or_an_array_dtype(given, name):
    assert face.compute_dtype(given) == jnp.dtype(name)


def test_an_unknown_dtype_and_a_missing_gpu_are_refused(folder):
    with pytest.raises(ValueError, match="float64.*supported.*bfloat16"):
        FastLanguageModel.from_pretrained(str(folder), dtype="float64")
    with pytest.raises(RuntimeError, match="asks for a GPU, but JAX sees only"):
        FastLanguageModel.from_pretrained(str(folder), device_map="cuda:0")
    assert unsloth_jax.is_bfloat16_supported() is True


def test_the_package_gives_the_names_of_the_face():
    for name in ("FastLanguageModel", "SFTTrainer", "SFTConfig", "get_chat_template",
                 "train_on_responses_only", "standardize_sharegpt"):  # fmt: skip
        assert callable(getattr(unsloth_jax, name)) and name in dir(unsloth_jax)
    with pytest.raises(AttributeError, match="no attribute 'FastModels'; it has .*SFTConfig"):
        _ = unsloth_jax.FastModels


BAD_ADAPTERS = [
    (dict(r=0), TypeError, "r must be a positive integer, got 0"),
    (dict(r=True), TypeError, "r must be a positive integer"),
    (dict(lora_alpha=0), ValueError, "lora_alpha must be over 0"),
    (dict(lora_alpha=-3), ValueError, "lora_alpha must be over 0"),
    (dict(use_rslora="yes"), TypeError, "use_rslora"),
    (dict(random_state=None), TypeError, "random_state"),
    (dict(target_modules=None), TypeError, "target_modules"),
    (dict(target_modules=["nothing"]), ValueError, "nothing.*q_proj"),
    (dict(target_modules=".*(q_proj|embed_tokens)"), ValueError, "embedding.*not supported, name"),
    (dict(init_lora_weights="corda"), ValueError, "corda.*pissa"),
    (dict(init_lora_weights="pissa", use_dora=True), ValueError, "use_dora=True with .*pissa"),
    (dict(lora_dropout=1), ValueError, "lora_dropout must be from 0 to below 1, got 1"),
    (dict(lora_dropout="no"), TypeError, "lora_dropout"),
    (dict(modules_to_save="lm_head"), TypeError, "modules_to_save must be a list of names"),
    (dict(target_parameters="down_proj"), TypeError, "target_parameters must be a list of names"),
    (dict(modules_to_save=["heads"]), ValueError, "modules_to_save=.*there is no module .'heads'"),
    (dict(modules_to_save=["q_proj"]), ValueError, "q_proj.*have adapters: choose one"),
    (dict(use_gradient_checkpointing="never"), ValueError, "unsloth.*'never'"),
    (dict(layers_to_transform=[0], finetune_last_n_layers=1), ValueError, "not both"),
    (dict(layers_to_transform=[7]), ValueError, "7"),
]


@pytest.mark.parametrize("given, error, message", BAD_ADAPTERS, ids=str)
def test_adapter_settings_without_meaning_are_refused(model, given, error, message):
    with pytest.raises((error, jaxtyping_error(error)), match=message):
        FastLanguageModel.get_peft_model(model, **given)
    assert model.adapters is None


def jaxtyping_error(error: type) -> type:
    """What the shape checks of the tests raise before our own, for a wrong Python type."""
    import jaxtyping

    return jaxtyping.TypeCheckError if error is TypeError else error


def test_the_last_layers_are_counted_from_the_end(folder):
    model, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(model, r=2, finetune_last_n_layers=1)
    assert model.peft.layers == (1,)
    assert FastLanguageModel.for_training(FastLanguageModel.for_inference(model)) is model
    before = model.memory
    on, off = CHECKPOINTING[True], CHECKPOINTING[False]
    assert FastLanguageModel.for_training(model).memory == before != off
    assert FastLanguageModel.for_training(model, "auto").memory == CHECKPOINTING["auto"]
    assert FastLanguageModel.for_training(model).memory == CHECKPOINTING["auto"]
    assert FastLanguageModel.for_training(model, False).memory == off
    assert FastLanguageModel.for_training(model).memory == on
    for upload in (model.push_to_hub, model.push_to_hub_merged, model.push_to_hub_gguf):
        with pytest.raises(ValueError, match="uploads to the hub are not supported yet"):
            upload("me/model", token="x")


@pytest.fixture(scope="module")
def ragged(model):
    """(ids, mask) of prompts of several lengths, padded on the left."""
    tokenizer = text.load(model.tokenizer_folder)
    tokenizer.padding_side = "left"
    got = tokenizer(PROMPTS, padding=True, return_tensors="np")
    assert len({int(row.sum()) for row in got["attention_mask"]}) == 3
    return got["input_ids"], got["attention_mask"]


def to_torch(*arrays):
    return [torch.tensor(np.asarray(a)) for a in arrays]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_those_of_transformers_where_the_mask_is_on(model, theirs, ragged, side):
    ids, mask = ragged
    if side == "right":
        ids, mask = (
            np.stack([np.roll(r, -int(n)) for r, n in zip(x, (mask == 0).sum(1), strict=True)])
            for x in (ids, mask)
        )
    with torch.no_grad():
        expected = theirs(*to_torch(ids, mask)).logits.numpy()
    got = model(ids, mask)
    assert got.dtype == np.float32 and got.shape == expected.shape
    on = mask.astype(bool)
    assert np.abs(got - expected)[on].max() < 1e-4 * expected[on].std()


def test_logits_refuse_ids_and_masks_that_do_not_fit(model):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\), input_ids \(1, 3\)"):
        model([[3, 4, 5]], [[1, 1]])
    with pytest.raises(ValueError, match="outside the vocabulary of 482"):
        model([[3, 482]])
    with pytest.raises(ValueError, match=r"rows of one length over 0, got lengths \[1, 2\]"):
        model([[3], [3, 4]])
    with pytest.raises(TypeError, match="expected integers"):
        model([[1.5, 2.0]])


def answered(model, theirs, ids, mask, **options):
    with torch.no_grad():
        expected = theirs.generate(
            *to_torch(ids), attention_mask=to_torch(mask)[0], do_sample=False,
            max_new_tokens=NEW, pad_token_id=tiny_chat.EOS, **options,
        )  # fmt: skip
    got = model.generate(ids, mask, max_new_tokens=NEW, **options)
    return got, expected.numpy()


def test_greedy_answers_of_a_ragged_batch_equal_those_of_transformers(model, theirs, ragged):
    got, expected = answered(model, theirs, *ragged)
    assert got.dtype == np.int32 and np.array_equal(got, expected)
    # The token in the middle of the first answer ends it; the other rows go on.
    end = int(expected[0, ragged[0].shape[1] + NEW // 2])
    shorter, expected = answered(model, theirs, *ragged, eos_token_id=end)
    assert np.array_equal(shorter, expected)
    assert shorter[0, -1] == tiny_chat.EOS != end and (shorter[0] == end).any()


def test_ids_may_be_lists_arrays_or_torch_tensors(model, ragged):
    ids, mask = ragged
    wanted = model.generate(ids, mask, max_new_tokens=NEW)
    tensors = dict(zip(("input_ids", "attention_mask"), to_torch(ids, mask), strict=True))
    lists = dict(inputs=ids.tolist(), attention_mask=mask.tolist())
    rows = dict(input_ids=[*map(np.asarray, ids)], attention_mask=jnp.asarray(mask))
    for given in (tensors, lists, rows):
        assert np.array_equal(model.generate(max_new_tokens=NEW, **given), wanted)
    with pytest.raises(ValueError, match="give input_ids"):
        model.generate(max_new_tokens=NEW)


@pytest.fixture(scope="module")
def prompt(model):
    return np.asarray([text.encode(model.tokenizer, PROMPTS[0]).ids])


def streamed(model, prompt, **options) -> tuple[np.ndarray, str]:
    with redirect_stdout(io.StringIO()) as out:
        shown = transformers.TextStreamer(model.tokenizer, skip_prompt=True)
        got = model.generate(prompt, max_new_tokens=NEW, streamer=shown, **options)
    return got[0, prompt.shape[1] :], out.getvalue()


def test_a_stream_is_the_answer_as_text(model, theirs, prompt):
    tokens, shown = streamed(model, prompt)
    with torch.no_grad():
        expected = theirs.generate(*to_torch(prompt), do_sample=False, max_new_tokens=NEW)
    assert np.array_equal(tokens, expected[0, prompt.shape[1] :].numpy())
    assert shown == model.tokenizer.decode(tokens) + "\n"


def test_a_stop_string_ends_answer_and_stream(model, theirs, prompt):
    whole, _ = streamed(model, prompt)
    stop = model.tokenizer.decode(whole[5:7])
    tokens, shown = streamed(model, prompt, stop_strings=stop, tokenizer=model.tokenizer)
    with torch.no_grad():
        expected = theirs.generate(
            *to_torch(prompt), do_sample=False, max_new_tokens=NEW, stop_strings=[stop],
            tokenizer=model.tokenizer,
        )  # fmt: skip
    assert np.array_equal(tokens, expected[0, prompt.shape[1] :].numpy())
    assert 0 < len(tokens) < NEW and shown == model.tokenizer.decode(tokens) + "\n"


def test_draws_repeat_with_their_seed(model, prompt):
    draw = lambda seed: streamed(model, prompt, do_sample=True, temperature=1.5, seed=seed)[0]
    assert np.array_equal(draw(1), draw(1)) and not np.array_equal(draw(1), draw(2))
    coldest = streamed(model, prompt, do_sample=True, temperature=1.5, top_k=1)[0]
    assert np.array_equal(coldest, streamed(model, prompt)[0])


BAD_REQUESTS = [
    (dict(max_new_tokens=125), "pass max_seq_length=128"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    (dict(do_sample=True, temperature=-1.0), "temperature must be at least 0"),
    (dict(do_sample=True, top_p=1.5), r"top_p must be in \(0, 1\]"),
    (dict(repetition_penalty=0.0), "repetition_penalty must be over 0"),
]


@pytest.mark.parametrize("given, message", BAD_REQUESTS, ids=str)
def test_requests_without_meaning_are_refused(model, prompt, given, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **({"max_new_tokens": 4} | given))


def test_a_reply_in_the_terminal_is_the_text_without_its_end(model, capsys):
    said = chat.reply(model, [{"role": "user", "content": "one"}], Sampling(0.0), NEW, seed=0)
    assert capsys.readouterr().out == said + "\n"
    ids = text.ids(
        model.tokenizer, [{"role": "user", "content": "one"}], add_generation_prompt=True
    )
    (answer,) = model.answers([ids], max_new_tokens=NEW, sampling=Sampling(0.0))
    kept = answer.tokens[:-1] if answer.stopped else answer.tokens
    assert said == model.tokenizer.decode(kept)
    with pytest.raises(ValueError, match="the conversation has .* tokens, max_seq_length is 128"):
        chat.reply(model, [{"role": "user", "content": "one " * 200}], Sampling(0.0), NEW, seed=0)


def notebook(name: str, folder: Path, place: Path, monkeypatch) -> dict:
    """The variables of a notebook that ran where the model's folder is called `chat`."""
    (place / "chat").symlink_to(folder)
    monkeypatch.chdir(place)
    return runpy.run_path(str(NOTEBOOKS / f"{name}.py"))


def test_the_alpaca_notebook_runs(folder, tmp_path, monkeypatch):
    seen = notebook("alpaca", folder, tmp_path, monkeypatch)
    losses = [row["loss"] for row in seen["trainer"].log_history]
    assert len(losses) == 8 == seen["trainer_stats"].global_step
    assert losses[-1] < 0.6 * losses[0]
    assert seen["text"][0].startswith("### Instruction:\nWrite the next number")
    assert (tmp_path / "outputs" / "metrics.jsonl").exists()


def test_the_conversation_notebook_runs(folder, tmp_path, monkeypatch):
    seen = notebook("conversation", folder, tmp_path, monkeypatch)
    assert seen["learnt"] == "Paris.<|im_end|>\n"
    assert seen["trainer"].log_history[-1]["loss"] < 0.3
    assert seen["answer"].startswith("Paris.<|im_end|>")


def test_the_saving_notebook_runs(folder, tmp_path, monkeypatch):
    seen = notebook("saving", folder, tmp_path, monkeypatch)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*") if "chat/" not in str(p)}
    assert files >= {
        "lora_model/adapter_model.safetensors", "lora_model/tokenizer.json",
        "merged/model.safetensors", "adapters/adapter_config.json", "gguf/model.Q8_0.gguf",
        "gguf_small/model.Q4_K_M.gguf", "gguf_full/model.F16.gguf", "gguf_full/model.Q5_K_M.gguf",
    }  # fmt: skip
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), seen["model"].adapters,
                         seen["again"].adapters)  # fmt: skip
    assert jax.tree.all(equal) and seen["again"].quantized


def test_the_notebooks_say_which_lines_they_changed():
    for path in NOTEBOOKS.glob("*.py"):
        head, marked = path.read_text().split("\n\n")[0], path.read_text().count("  ##\n")
        assert "double hash" in head and "return_tensors" in head and marked >= 4, path.name


@pytest.mark.parametrize("device_map", [0, "cuda:0", {"": 0}, {"": "cuda:0"}], ids=str)
def test_a_gpu_that_is_asked_for_in_any_form_has_to_be_there(folder, device_map):
    with pytest.raises(RuntimeError, match="asks for a GPU"):
        FastLanguageModel.from_pretrained(str(folder), device_map=device_map)


@pytest.mark.parametrize("device_map", ["nonsense", "tpu", "cuda:", True, 5.5, [], {"": "disk"}])
def test_what_is_no_device_is_refused_with_those_that_are(folder, device_map):
    with pytest.raises(ValueError, match="device_map names .*; expected None, 'auto', 'sequent"):
        FastLanguageModel.from_pretrained(str(folder), device_map=device_map)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, "balanced_low_0"])
def test_devices_that_a_cpu_satisfies_pass(device_map):
    face.require_device(device_map)


WIDTHS = [
    dict(load_in_4bit=True, load_in_8bit=True),
    dict(load_in_4bit=True, load_in_16bit=True),
    dict(load_in_4bit=True, load_in_fp8="block"),
    dict(load_in_16bit=True, load_in_8bit=True),
]


@pytest.mark.parametrize("given", WIDTHS, ids=str)
def test_two_widths_asked_for_at_once_are_refused_by_both_names(folder, given):
    (one, a), (other, b) = given.items()
    with pytest.raises(ValueError) as error:
        FastLanguageModel.from_pretrained(str(folder), **given)
    assert all(f"{name}={value!r}" in str(error.value) for name, value in given.items())
    assert "expected one width of ['load_in_4bit'" in str(error.value)
    if one == "load_in_4bit":  # given by place
        with pytest.raises(ValueError, match=f"load_in_4bit=True and {other}="):
            FastLanguageModel.from_pretrained(str(folder), 64, None, True, **{other: b})


def test_one_width_beside_the_default_is_no_clash(folder):
    for given in (dict(load_in_16bit=True), dict(load_in_16bit=True, load_in_4bit=False)):
        model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **given)
        assert not model.quantized
    given = dict(load_in_4bit=True, load_in_16bit=False, load_in_8bit=False, load_in_fp8=None)
    assert FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **given)[0].quantized


NAMES = [
    (dict(model_name=None), TypeError, "model_name must be str, got None"),
    (dict(model_name=5), TypeError, "model_name must be str, got 5"),
    (dict(model_name=b"x"), TypeError, "model_name must be str, got b'x'"),
    (dict(model_name=["x"]), TypeError, "model_name must be str, got .'x'."),
    (dict(model_name=""), ValueError, "model_name must be a text that names something, got ''"),
    (dict(model_name="a\0b"), ValueError, "model_name must be a text that names something"),
    (dict(revision=5), TypeError, "revision must be str | None, got 5"),
    (dict(revision=""), ValueError, "revision must be a text that names something"),
    (dict(cache_dir=5), TypeError, "cache_dir must be str | None, got 5"),
    (dict(token=5), TypeError, "token must be str | bool | None, got 5"),
    (dict(local_files_only=None), TypeError, "local_files_only must be bool, got None"),
    (dict(load_in_8bit=None), TypeError, "load_in_8bit must be bool, got None"),
    (dict(load_in_16bit=None), TypeError, "load_in_16bit must be bool, got None"),
]


def unchecked(function):
    """A function without the tests' own checks of annotations, which users don't have."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("given, error, message", NAMES, ids=str)
def test_what_names_no_model_is_refused_before_it_is_looked_for(
    folder, monkeypatch, given, error, message
):
    monkeypatch.setattr(face.hub, "find", lambda *args, **options: pytest.fail("looked for it"))
    load = unchecked(FastLanguageModel.from_pretrained)
    with pytest.raises(error, match=f"from_pretrained: {message}".replace("|", r"\|")):
        load(**{"model_name": str(folder)} | given)


PEFT_SLIPS = [
    (dict(model=None), TypeError, "model must be Model, got None"),
    (dict(model=("model", len)), TypeError, "model must be Model, got a tuple of str, builtin"),
    (dict(r="16"), TypeError, "r must be a positive integer, got '16'"),
    (dict(r=16.0), TypeError, "r must be a positive integer, got 16.0"),
    (dict(r=10**9), ValueError, "r must be at most 128, the model's widest matrix, got 10+"),
    (dict(lora_alpha=float("inf")), ValueError, "lora_alpha must be finite"),
    (dict(random_state=2**70), ValueError, "random_state must be from"),
    (dict(init_lora_weights=[]), TypeError, "init_lora_weights must be bool | str, got ..$"),
    (dict(use_gradient_checkpointing=[]), ValueError, "must be one of .*got ..$"),
]


@pytest.mark.parametrize("given, error, message", PEFT_SLIPS, ids=str)
def test_slips_in_adapter_settings_are_refused_by_name(model, given, error, message):
    with pytest.raises(error, match=message.replace(" | ", r" \| ")):
        unchecked(FastLanguageModel.get_peft_model)(**{"model": model} | given)
    assert model.adapters is None


@pytest.mark.parametrize(
    "function", [FastLanguageModel.for_inference, FastLanguageModel.for_training]
)
def test_what_is_no_model_has_no_modes(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be Model, got None"):
        unchecked(function)(None)


def test_a_rank_may_be_numpys(folder):
    adapt = unchecked(FastLanguageModel.get_peft_model)
    model = adapt(tiny_chat.load(folder)[0], r=np.int64(4))
    assert type(model.peft.rank) is int and model.peft.rank == 4


def with_settings(folder: Path, place: Path, **settings) -> Path:
    """A copy of the folder with this generation_config.json."""
    shutil.copytree(folder, place)
    ends = dict(eos_token_id=tiny_chat.EOS, pad_token_id=tiny_chat.EOS)
    (place / "generation_config.json").write_text(json.dumps(ends | settings))
    return place


# Settings of the file; an end of 5 stands for the token at that place of the plain answer.
IN_THE_FILE = [
    dict(repetition_penalty=1.7),
    dict(do_sample=False, temperature=0.6, top_k=20, top_p=0.9),
    dict(temperature=0.6, top_p=0.9),
    dict(do_sample=True, top_k=1),
    dict(do_sample=True, top_k=50, top_p=1e-6),
    dict(do_sample=True, min_p=1.0),
    dict(eos_token_id=[tiny_chat.EOS, 5]),
    dict(eos_token_id=[5]),
]


@pytest.mark.parametrize("settings", IN_THE_FILE, ids=str)
def test_settings_of_the_checkpoints_file_give_transformers_answer(
    model, folder, prompt, tmp_path, settings
):
    plain = model.generate(prompt, max_new_tokens=NEW)[0, prompt.shape[1] :]
    if "eos_token_id" in settings:
        ends = [int(plain[x]) if x == 5 else x for x in settings["eos_token_id"]]
        settings = {"eos_token_id": ends}
    place = with_settings(folder, tmp_path / "m", **settings)
    with torch.no_grad():
        expected = tiny_chat.reference(place).generate(*to_torch(prompt), max_new_tokens=NEW)
    got = tiny_chat.load(place)[0].generate(prompt, max_new_tokens=NEW)
    assert np.array_equal(got, expected)
    if "repetition_penalty" in settings or "eos_token_id" in settings:
        assert not np.array_equal(got[0, prompt.shape[1] :], plain)


LENGTHS = [
    dict(max_new_tokens=5), dict(max_length=20), dict(max_length=24),
    dict(max_length=24, max_new_tokens=3),
]  # fmt: skip


@pytest.mark.parametrize("settings", LENGTHS, ids=str)
def test_the_length_of_the_checkpoints_file_is_transformers_and_what_is_asked_stands_above_it(
    model, folder, prompt, tmp_path, settings
):
    place = with_settings(folder, tmp_path / "m", **settings)
    theirs, (ours, _) = tiny_chat.reference(place), tiny_chat.load(place)
    for asked in ({}, {"max_new_tokens": 7}, {"max_length": prompt.shape[1] + 6}):
        got = ours.generate(prompt, **asked)
        if settings.get("max_length") == 20 and not asked:
            # transformers' own default of 20 in all is nobody's wish.
            assert np.array_equal(got, model.generate(prompt))
            continue
        # There a file's max_new_tokens stands above a max_length that was asked for.
        lengths = {"max_new_tokens": None} | asked if "max_length" in asked else asked
        with torch.no_grad():
            expected = theirs.generate(*to_torch(prompt), do_sample=False, **lengths)
        assert np.array_equal(got, expected)


def test_other_decoding_in_the_checkpoints_file_is_refused(folder, prompt, tmp_path):
    model, _ = tiny_chat.load(with_settings(folder, tmp_path / "m", num_beams=4))
    with pytest.raises(ValueError, match="generation_config.json: num_beams=4 is not supported"):
        model.generate(prompt, max_new_tokens=2)
    assert model.generate(prompt, max_new_tokens=2, num_beams=1).shape == (1, prompt.shape[1] + 2)


@pytest.mark.parametrize("given", [dict(streamer="x"), dict(tokenizer=5)], ids=str)
def test_what_shows_no_answer_is_refused_before_it_is_made(model, prompt, given):
    with pytest.raises(TypeError, match=f"generate: {next(iter(given))} must have"):
        model.generate(prompt, max_new_tokens=2, **given)


LOAD_WRONG = [
    (dict(max_seq_length=0), ValueError),
    (dict(max_seq_length=None), TypeError),
    (dict(load_in_4bit="no"), TypeError),
]


@pytest.mark.parametrize("given, error", LOAD_WRONG, ids=str)
def test_loading_settings_without_meaning_are_refused(folder, given, error):
    with pytest.raises((error, jaxtyping_error(error)), match=next(iter(given))):
        FastLanguageModel.from_pretrained(str(folder), **given)


@pytest.mark.parametrize(
    "where, given, error, message",
    [
        ("save_pretrained_gguf", dict(quantization_method=None), TypeError, "a name or several"),
        ("save_pretrained_gguf", dict(quantization_method=[None]), TypeError, "known: .*q4_k_m"),
        ("save_pretrained_gguf", dict(tokenizer=3), TypeError, "tokenizer must be .*got 3"),
        ("save_pretrained_merged", dict(tokenizer="x"), TypeError, "tokenizer must be .*got 'x'"),
        ("save_pretrained_merged", dict(overwrite="x"), TypeError, "overwrite must be bool"),
        ("save_pretrained_merged", dict(save_directory=None), TypeError, "save_directory must be"),
        ("save_pretrained", dict(save_directory=3), TypeError, "save_directory must be str, got 3"),
        ("save_pretrained_gguf", dict(save_directory=""), ValueError, "must be a text that names"),
    ],
)
def test_what_nothing_can_be_saved_to_is_refused_by_name(tmp_path, where, given, error, message):
    model = tiny_chat.adapted(tiny_chat.save(tmp_path / "model"))
    save = unchecked(getattr(type(model), where))
    with pytest.raises(error, match=message):
        save(model, **({"save_directory": tmp_path / "out"} | given))
    assert not (tmp_path / "out").exists()


def test_a_model_tells_its_trainable_parameters_and_its_device(tmp_path, capsys):
    model = tiny_chat.adapted(tiny_chat.save(tmp_path / "model"))
    model.print_trainable_parameters()
    trained = sum(x.size for x in jax.tree.leaves(model.adapters))
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,} || all params: ")
    assert model.device == "cpu"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'; supported"),
        ({"rope_theta": 5.0}, r"config has rope_theta=5.0 and rope_parameters=\{"),
    ],
)
def test_config_fields_that_contradict_the_weights_or_each_other_are_refused(
    tmp_path, fields, message
):
    folder = tiny_chat.save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        tiny_chat.load(folder)
