"""Rates, optimizers and their settings, from SFTConfig to a step's update."""

import jax
import numpy as np
import optax
import peft
import pytest
import tiny_chat
import torch

from bridge import tokenizer as text
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, lora, tree
from unsloth_jax import plan as memory_plan
from unsloth_jax.remat import Memory
from workflows import adapting, moving, peft_config, plan, updates

SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-3,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64, weight_decay=0.0,
)  # fmt: skip
ROWS = tiny_chat.MESSAGES[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def base(folder):
    return tiny_chat.load(folder)[0]


def fresh(base, **adapters):
    base.adapters = None
    return FastLanguageModel.get_peft_model(base, **{"r": 4} | adapters)


def trainer(model, given=None, **changes) -> SFTTrainer:
    args = SFTConfig(**(SAME | changes))
    return SFTTrainer(model=model, train_dataset=ROWS, args=args, **given or {})


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_every_group_moves_at_its_own_rate(folder):
    model = tiny_chat.load(folder)[0]
    fresh(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    model.adapters = jax.tree.map(lambda x: x + 0.01, model.adapters)
    before = tree.flatten(jax.tree.map(np.asarray, model.adapters))
    how = dict(learning_rate=1e-3, embedding_learning_rate=2e-4, loraplus_lr_ratio=16.0)
    trainer(model, max_steps=1, **how).train()
    # Adam's first step is the rate itself wherever the gradient is far above eps.
    moved = {p: np.abs(np.asarray(x) - before[p]).max() for p, x in
             tree.flatten(model.adapters).items()}  # fmt: skip
    rates = {".a": 1e-3, ".b": 16e-3, "embed_tokens.weight": 2e-4, "lm_head.weight": 2e-4}
    assert len(moved) == 4
    for path, size in moved.items():
        (wanted,) = (rate for end, rate in rates.items() if path.endswith(end))
        assert size == pytest.approx(wanted, rel=1e-2), path


def test_rates_that_nothing_would_learn_at_are_refused(base, folder):
    with pytest.raises(ValueError, match="embedding_learning_rate=1e-05, but neither"):
        trainer(fresh(base), embedding_learning_rate=1e-5)
    whole, _ = tiny_chat.load(folder, full_finetuning=True)
    with pytest.raises(ValueError, match="loraplus_lr_ratio=16.* has no adapters"):
        trainer(whole, loraplus_lr_ratio=16)
    with pytest.raises(ValueError, match="embedding_learning_rate follows .* which is 0"):
        SFTConfig(learning_rate=0, embedding_learning_rate=1e-5)


BY_NAME = {
    "muon": {}, "lion_8bit": {}, "adamw_8bit": {}, "adamw_torch": {}, "adafactor": {},
    "lion_32bit": {}, "sgd": dict(optim_args="momentum=0.9,nesterov=True"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in ("muon",) else pytest.param(n, marks=pytest.mark.slow) for n in BY_NAME]
)
def test_optimizers_by_name_train_and_go_on_bitwise(base, tmp_path, name):
    how = dict(optim=name, max_steps=3, weight_decay=0.01, **BY_NAME[name])
    start = fresh(base, r=32, lora_alpha=32).adapters
    run = trainer(base, output_dir=str(tmp_path), save_strategy="steps", save_steps=2, **how)
    run.train()
    assert len(run.log_history) == 3 and all(np.isfinite(r["loss"]) for r in run.log_history)
    wanted, base.adapters = base.adapters, start
    again = trainer(base, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint_2"))
    assert same(wanted, base.adapters) and not same(start, wanted)
    assert again.log_history[-1]["loss"] == run.log_history[-1]["loss"]


def test_settings_of_an_optimizer_are_checked_and_stand_in_checkpoints(base):
    read = updates.arguments("momentum=0.9, nesterov=True,how=plain")
    assert read == {"momentum": 0.9, "nesterov": True, "how": "plain"}
    assert updates.arguments(None) == {} and updates.arguments({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="expected name=value parts, got 'momentum'"):
        updates.arguments("momentum")
    run = trainer(fresh(base), optim="sgd", optim_args="momentums=0.9", max_steps=1)
    with pytest.raises(ValueError, match="'momentums' is not supported; nearest: momentum"):
        run.train()
    facts = run._facts({})
    names = {"optim_args", "embedding_learning_rate", "loraplus_lr_ratio", "initial pairs"}
    assert names <= facts.keys() and facts["optim_args"] == "momentums=0.9"


def test_an_optax_transformation_takes_the_steps_that_it_is_handed(base):
    model = fresh(base)
    before = jax.tree.map(np.asarray, model.adapters)
    given = dict(optimizers=(optax.sgd(0.0), lambda step: 0.125 + 0 * step))
    run = trainer(model, given, max_steps=2, learning_rate=0.5)
    with pytest.raises(RuntimeError, match="the first step changed nothing in"):
        run.train()
    assert same(before, model.adapters)
    run = trainer(model, dict(optimizers=(optax.adam(1e-2), None)), max_steps=1)
    run.train()
    assert not same(before, model.adapters) and run.log_history[0]["learning_rate"] > 0


def test_optimizers_of_other_kinds_are_refused(base):
    rule = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for given in ((rule, None), (None, 3), [None, None]):
        with pytest.raises(TypeError, match="optimizers must be .*optax.GradientTransformation"):
            updates.handed(given)
    assert updates.handed((None, None)) == updates.handed(None) == (None, None)


def test_a_matrix_that_stands_still_is_named(folder):
    model = tiny_chat.load(folder)[0]
    fresh(model, modules_to_save=["lm_head", "norm"], target_modules=["q_proj"])
    marks = moving.marks(model.adapters)
    assert [*marks] == ["lm_head.weight"]
    b = {p: x + 1 if p.endswith(".b") else x for p, x in tree.flatten(model.adapters).items()}
    with pytest.raises(RuntimeError, match=r"changed nothing in \['lm_head.weight'\]"):
        moving.check(marks, tree.unflatten(b))
    table = b["lm_head.weight"]
    moving.check(marks, tree.unflatten(b | {"lm_head.weight": table.at[3, 5].add(1e-6)}))
    with pytest.raises(RuntimeError, match=r"q_proj.b', 'lm_head"):
        moving.check(marks, model.adapters)


CONFIGS = {
    "defaults": {},
    "plain": dict(r=4, lora_alpha=32, target_modules=["k_proj", "v_proj"], use_rslora=True),
    "regex": dict(r=2, target_modules=r".*\.mlp\.(up|down)_proj", lora_dropout=0.1),
    "dora": dict(r=4, target_modules="all-linear", use_dora=True, modules_to_save=["norm"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_peft_config_gives_the_adapters_that_peft_makes_of_it(folder, tmp_path, name):
    model = tiny_chat.load(folder)[0]
    given = peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS[name])
    SFTTrainer(model=model, train_dataset=ROWS, args=SFTConfig(**SAME), peft_config=given)
    theirs = peft.get_peft_model(tiny_chat.reference(folder), given)
    count, _ = theirs.get_nb_trainable_parameters()
    assert sum(x.size for x in jax.tree.leaves(model.adapters)) == count
    config = theirs.peft_config["default"]
    scale = {m.scaling["default"] for m in theirs.modules() if hasattr(m, "lora_A")}
    assert scale == {model.scale} and model.peft.dropout == config.lora_dropout
    assert (model.peft.rank, model.peft.dora) == (config.r, config.use_dora)
    assert peft_config.keywords(given) == peft_config.keywords(given.to_dict())


def test_fields_of_a_peft_config_that_are_not_supported_are_named(base):
    for fields, message in (
        ({"bias": "all"}, "peft_config: bias='all' is not supported yet"),
        ({"rank_pattern": {"q_proj": 2}}, "peft_config: rank_pattern="),
        ({"peft_type": "IA3"}, "peft_config: peft_type='IA3'"),
        ({"ranks": 3}, "peft_config: ranks=3"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_config.keywords(fields)
    with pytest.raises(TypeError, match="peft_config must be PEFT's LoraConfig or a dictionary"):
        peft_config.keywords(5)
    with pytest.raises(TypeError, match="already has adapters with"):
        SFTTrainer(fresh(base), train_dataset=ROWS, peft_config={"r": 7})


def test_tokens_and_a_template_of_the_config_go_into_a_copy_of_the_tokenizer(base, tmp_path):
    given, spoken = fresh(base).tokenizer, "{% for m in messages %}{{ m.content }}|{% endfor %}"
    before = text.state(given)
    (tmp_path / "own.jinja").write_text(spoken)
    run = trainer(base, eos_token="<|im_start|>", pad_token="<|im_start|>",
                  chat_template_path=str(tmp_path / "own.jinja"))  # fmt: skip
    own = run.tokenizer
    assert (own.eos_token, own.pad_token, own.chat_template) == (
        "<|im_start|>", "<|im_start|>", spoken,
    )  # fmt: skip
    assert own is not given and text.state(given) == before
    assert "?|The capital" in own.decode(run.rows[0].tokens)
    assert trainer(base).tokenizer is given
    with pytest.raises(ValueError, match="eos_token='<x>' is no token of the tokenizer"):
        trainer(base, eos_token="<x>")
    with pytest.raises(ValueError, match="chat_template_path=.* must be a .jinja file"):
        trainer(base, chat_template_path=str(tmp_path))


def test_a_plan_knows_the_keys_of_batches_and_of_whole_training(base, folder):
    quiet, noisy = trainer(fresh(base)), trainer(base, neftune_noise_alpha=5)
    for run in (quiet, noisy):
        job = plan.job_of(base, optax.sgd(1.0), run._batches(), run.objective.draws)
        planned = memory_plan.batches(job, Memory("full"))
        ready = run.objective.ready(1, next(run._batches().epoch(0)))
        assert (planned.key is None) == (run is quiet)
        kinds = (jax.tree.map(lambda x: (x.shape, str(x.dtype)), b) for b in (planned, ready))
        assert next(kinds) == next(kinds)
    whole, _ = tiny_chat.load(folder, full_finetuning=True)
    job = plan.job_of(whole, optax.adam(1.0), trainer(whole)._batches())
    found = memory_plan.estimate(job, Memory("full"))
    count = sum(x.size for x in jax.tree.leaves(whole.adapters))
    assert (found.parameters, found.adapters) == (0, 4 * count)
    assert "all weights trained don't fit" in memory_plan.refusal(job, memory_plan.Budget(1, 1))
    assert not memory_plan.hostable(whole.params)


def test_a_plan_for_other_ranks_has_their_shapes(base):
    model = fresh(base, use_dora=True, layers_to_transform=[0])
    shapes = adapting.of_rank(model.adapters, 9)
    wanted = fresh(base, use_dora=True, layers_to_transform=[0], r=9).adapters
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, wanted)
    assert lora.parts(shapes)[1] == {}
