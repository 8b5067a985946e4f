"""Rows of preferences: what is read, cut, laid side by side, and what is refused by its index."""

import difflib
import re
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import optax
import preference_runs
import pytest
import tiny_chat
import transformers
import trl
from preference_runs import IMPLICIT, JUDGED, TALKS, TEXTS, said
from trl.experimental.cpo import CPOConfig as TheirCPO
from trl.experimental.orpo import ORPOConfig as TheirORPO

import unsloth_jax
from unsloth_jax import plan, preference
from unsloth_jax.data import Row
from unsloth_jax.remat import PLAIN
from workflows.pair_batches import JudgedBatches, PairBatches, turned
from workflows.pairs import Cut, Judged, Pair, judged, paired, pairs, shortened
from workflows.plan import job_of
from workflows.preference_config import own_names
from workflows.preference_objective import tokens_a_pair

PAGE = Path(__file__).parents[1] / "docs" / "preference.md"
KINDS = ("DPO", "ORPO", "CPO", "KTO")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(tiny_chat.TOKENIZER)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_chat.save(tmp_path_factory.mktemp("model"))
    return preference_runs.fresh(tiny_chat.load(folder)[0])


def config(kind: str):
    return getattr(unsloth_jax, f"{kind}Config")


def made(kind: str, model, rows, **settings):
    args = config(kind)(max_length=64, **settings)
    return getattr(unsloth_jax, f"{kind}Trainer")(model=model, args=args, train_dataset=rows)


def words(tokenizer, row: Row) -> str:
    return tokenizer.decode([t for t, on in zip(row.tokens, row.mask, strict=True) if on])


@pytest.mark.parametrize("rows", [TEXTS, TALKS, IMPLICIT], ids=["texts", "talks", "implicit"])
def test_the_answers_with_their_end_are_learnt_and_the_prompt_is_shared(tokenizer, rows):
    for row, given in zip(pairs(rows, tokenizer, Cut(64)), TEXTS, strict=True):
        for side in ("chosen", "rejected"):
            said = words(tokenizer, getattr(row, side))
            assert said.strip() == given[side].strip() + "<|im_end|>"
        at = row.chosen.mask.index(1)
        assert at == row.rejected.mask.index(1)
        assert row.chosen.tokens[:at] == row.rejected.tokens[:at] and at > 2


def test_a_prompt_given_as_text_beside_whole_conversations_is_found_in_them(tokenizer):
    whole = [row | {"prompt": text["prompt"]} for row, text in zip(IMPLICIT, TEXTS, strict=True)]
    assert pairs(whole, tokenizer, Cut(64)) == pairs(TALKS, tokenizer, Cut(64))
    sharegpt = {
        side: [{"from": m["role"], "value": m["content"]} for m in IMPLICIT[0][side]]
        for side in ("chosen", "rejected")
    }
    assert pairs([sharegpt], tokenizer, Cut(64)) == pairs(TALKS[:1], tokenizer, Cut(64))


def test_an_implicit_prompt_of_text_ends_before_the_space(tokenizer):
    row = {"chosen": "Sky is blue.", "rejected": "Sky is green."}
    assert paired(row) == ("Sky is", " blue.", " green.")


def test_pairs_are_taken_apart_for_kto_chosen_ones_first_as_in_trl(tokenizer):
    apart = judged(TEXTS[:2], tokenizer, Cut(64))
    whole = pairs(TEXTS[:2], tokenizer, Cut(64))
    assert [one.desirable for one in apart] == [True, True, False, False]
    sides = [*(pair.chosen for pair in whole), *(pair.rejected for pair in whole)]
    assert [one.answer for one in apart] == sides
    assert [one.desirable for one in judged(JUDGED, tokenizer, Cut(64))] == [
        row["label"] for row in JUDGED
    ]


ROW = Row([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])
CUTS = [
    (Cut(9), Row(ROW.tokens, ROW.mask)),
    (Cut(4), Row([5, 6, 7, 8], [0, 0, 1, 1])),
    (Cut(2), None),
    (Cut(4, keep_end=True), Row([6, 7, 8, 9], [0, 1, 1, 1])),
    (Cut(9, prompt=1), Row([6, 7, 8, 9], [0, 1, 1, 1])),
    (Cut(9, completion=2), Row([5, 6, 7, 8], [0, 0, 1, 1])),
    (Cut(3, prompt=1, completion=1), Row([6, 7], [0, 1])),
]


@pytest.mark.parametrize("cut, expected", CUTS, ids=str)
def test_rows_are_cut_as_asked(cut, expected):
    assert shortened(ROW, cut) == expected


def test_what_is_cut_and_left_out_is_said_and_nothing_left_is_an_error(tokenizer, model, capsys):
    long = {"prompt": "one two three " * 30, "chosen": " four", "rejected": " five"}
    kept = pairs([*TEXTS, long], tokenizer, Cut(48))
    assert len(kept) == len(TEXTS)
    assert "1 of 9 rows are left out: their prompts fill max_length=48" in capsys.readouterr().out
    assert len(pairs([long], tokenizer, Cut(48, prompt=8))) == 1
    with pytest.raises(ValueError, match="each of the 1 rows has a prompt of max_length=48"):
        pairs([long], tokenizer, Cut(48))
    tail = {"prompt": "one", "chosen": " two" * 60, "rejected": " five"}
    assert len(pairs([tail], tokenizer, Cut(48))[0].chosen.tokens) == 48
    assert "1 of 1 rows fill max_length=48; what is longer was cut" in capsys.readouterr().out
    args = unsloth_jax.DPOConfig(max_length=None)
    with pytest.raises(ValueError, match="row 8: .* more than the model's max_seq_length=128"):
        unsloth_jax.DPOTrainer(
            model, args=args, train_dataset=[*TEXTS, long | {"chosen": "x" * 90}]
        )


def numbered(count: int) -> list[Pair]:
    row = lambda n, size: Row([n] * (2 + size), [0, 0, *[1] * size])
    return [Pair(row(2 * n, n + 1), row(2 * n + 1, n + 2)) for n in range(count)]


def test_both_answers_of_a_pair_stand_in_one_micro_batch_and_a_partial_step_is_filled():
    batches = PairBatches(numbered(5), 4, 2, 128, False, None)
    assert (batches.steps(0), batches.widest, batches.documents(9)) == (2, 64, 1)
    first, last = batches.epoch(0)
    assert first.tokens.shape == (2, 4, 64)
    assert first.tokens[:, :, 0].tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
    assert last.tokens[:, :, 0].tolist() == [[8, 0, 9, 0], [0, 0, 0, 0]]
    assert last.weights.sum(-1).tolist() == [[5, 0, 6, 0], [0, 0, 0, 0]]
    assert tokens_a_pair(first, False).tolist() == [2.5, 2.5]  # 1 + 2 + 3 + 4 tokens of 4 pairs
    assert tokens_a_pair(first, True).tolist() == [3.5, 3.5]  # and one more a prompt: it is told


def test_the_order_is_of_the_seed_or_of_the_data_set(model):
    order = lambda **how: [
        int(n) for b in made("DPO", model, TEXTS, **how)._batches().epoch(0)
        for n in b.tokens.sum(2).flatten()
    ]  # fmt: skip
    fixed = order(train_sampling_strategy="sequential")
    one, again, other = order(), order(), order(seed=1)
    assert one == again and len({*map(tuple, (one, other, fixed))}) == 3
    assert sorted(one) == sorted(fixed) == sorted(other)
    assert config("KTO")().train_sampling_strategy == "sequential"  # as in TRL


def test_answers_are_turned_by_one_within_a_step():
    rows = [Row([n, n, 10 + n], [0, 0, 1]) for n in range(3)]
    assert turned(rows, 9) == [
        Row([0, 0, 12], [0, 0, 1]), Row([1, 1, 10], [0, 0, 1]), Row([2, 2, 11], [0, 0, 1]),
    ]  # fmt: skip
    items = [Judged(row, n != 1) for n, row in enumerate(rows)]
    batch = JudgedBatches(items, 4, 2, 64, False, None).step(items)
    assert batch.tokens[:, :, 2].tolist() == [[10, 11, 12, 10], [12, 0, 11, 0]]
    assert batch.beside["desirable"].tolist() == [[True, False], [True, False]]
    alone = JudgedBatches(items, 2, 2, 64, False, None, turned=False).step(items)
    assert alone.tokens.shape == (2, 2, 64)


PROMPT = said("user", "one two")
BAD_PAIRS = [
    (dict(prompt="a", chosen="b"), "row 1: columns .* expected 'prompt', 'chosen' and 'rejected'"),
    (dict(prompt="a", chosen="b", rejected=None), r"row 1: .*None in \['rejected'\]"),
    (dict(chosen="b", rejected="c"), "row 1: there is no 'prompt', .* nothing in common"),
    (dict(prompt="a", chosen="b", rejected="b"), "row 1: 'chosen' and 'rejected' are the same"),
    (dict(prompt="a", chosen="b", rejected=said("assistant", "c")), "row 1: .*both be text or"),
    (dict(prompt=PROMPT, chosen="b", rejected="c"), "row 1: 'prompt' is messages, .* are text"),
    (dict(chosen="a b", rejected="a b c"), "row 1: one of .* is the beginning of the other"),
    (IMPLICIT[0] | {"prompt": "else"}, "row 1: 'prompt' 'else' is no prefix of 'chosen'"),
    (
        IMPLICIT[0] | {"prompt": TALKS[0]["prompt"]},
        "row 1: 'chosen' begins with the messages of 'prompt', which would stand there twice",
    ),
    (dict(prompt=PROMPT, chosen=PROMPT[:0], rejected=said("assistant", "c")), "row 1: .*no token"),
    (
        dict(prompt=PROMPT, chosen=said("user", "b"), rejected=said("assistant", "c")),
        "row 1: no token to learn",
    ),
]


@pytest.mark.parametrize("row, message", BAD_PAIRS, ids=[m for _, m in BAD_PAIRS])
@pytest.mark.parametrize("kind", ["DPO", "ORPO"])
def test_a_row_that_is_no_pair_is_named_with_what_is_accepted(model, kind, row, message):
    with pytest.raises((ValueError, TypeError), match=message):
        made(kind, model, [TEXTS[0], row])


BAD_VERDICTS = [
    (dict(prompt="a", completion="b"), "row 1: .*expected 'prompt', 'completion' .* 'label'"),
    (dict(prompt="a", completion="b", label="yes"), "row 1: 'label' must be True or False"),
    (
        dict(prompt="a", completion=said("user", "x"), label=True),
        "row 1: 'prompt' and 'completion'",
    ),
]


@pytest.mark.parametrize("row, message", BAD_VERDICTS, ids=[m for _, m in BAD_VERDICTS])
def test_a_row_without_a_verdict_is_named(model, row, message):
    with pytest.raises(ValueError, match=message):
        made("KTO", model, [JUDGED[0], row])


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_class_are_refused(model, label):
    with pytest.raises(ValueError, match=f"all 8 labels are {label}: .*add rows with label"):
        made("KTO", model, [row | {"label": label} for row in JUDGED])


def test_weights_that_do_not_suit_the_data_are_said_with_those_that_do(model, capsys):
    rows = [row | {"label": n < 6} for n, row in enumerate(JUDGED)]
    made("KTO", model, rows)
    wanted = "6 desirable and 2 undesirable rows: take desirable_weight from 0.33 to 0.44, or"
    assert f"{wanted} undesirable_weight from 2.25 to 3.00" in capsys.readouterr().out
    made("KTO", model, rows, undesirable_weight=2.5)
    assert "desirable and" not in capsys.readouterr().out


def test_steps_of_one_kind_of_answers_are_said_with_the_remedy(model, capsys):
    many = [row | {"prompt": f"{row['prompt']} {n}"} for n in range(2) for row in TEXTS]
    made("KTO", model, many)
    assert "4 of 4 steps have answers of one kind only" in capsys.readouterr().out
    made("KTO", model, many, train_sampling_strategy="random")
    made("KTO", model, JUDGED)
    assert "of one kind only" not in capsys.readouterr().out


@pytest.mark.parametrize("kind, rows", [("DPO", TEXTS), ("ORPO", TEXTS), ("KTO", JUDGED)])
def test_the_memory_plan_knows_the_shapes_of_a_step(kind, rows, model):
    run = made(kind, model, rows, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    batches = run._batches()
    ready = run.objective.ready(1, next(batches.epoch(0)))
    beside = run.objective.beside(batches.accumulation, batches.batch)
    job = job_of(model, optax.sgd(0.1), batches)._replace(beside=beside)
    shape = lambda x: (x.shape, np.dtype(x.dtype).name)
    assert jax.tree.map(shape, ready) == jax.tree.map(shape, plan.batches(job, PLAIN))
    assert ready.tokens.shape == (2, 6, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_loss_type_is_refused_with_the_nearest(kind):
    known = {"DPO": preference.DPO, "CPO": preference.CPO, "KTO": preference.KTO}
    wrong = {"DPO": "sigmoyd", "CPO": "simpoo", "KTO": "kto_"}
    if kind not in known:
        with pytest.raises(TypeError, match="unknown keyword 'loss_typ'"):
            config(kind)(loss_typ="x")
        return
    (near, *_) = difflib.get_close_matches(wrong[kind], known[kind])
    with pytest.raises(ValueError, match=f"{kind} loss_type .*{wrong[kind]}.*nearest: {near}"):
        config(kind)(loss_type=wrong[kind])


BAD_SETTINGS = [
    ("DPO", dict(loss_type=["sigmoid", "ipo"], loss_weights=[1.0]), "a weight for each"),
    ("DPO", dict(loss_type="hinge", label_smoothing=0.1), "'hinge' has no label_smoothing"),
    ("DPO", dict(loss_type="exo_pair"), "label_smoothing of 'exo_pair'"),
    ("DPO", dict(beta=0.0), "DPOConfig: beta must be at least"),
    ("DPO", dict(truncation_mode="keep"), "DPOConfig: truncation_mode 'keep' is not supported"),
    ("DPO", dict(f_divergence_type="js_divergence"), "DPOConfig: f_divergence_type='js_diver"),
    ("DPO", dict(packing=True), "DPOConfig: packing=True is not supported yet"),
    ("ORPO", dict(group_by_length=True), "ORPOConfig: group_by_length=True is not supported yet"),
    ("KTO", dict(neftune_noise_alpha=5), "KTOConfig: neftune_noise_alpha=5 is not supported yet"),
    ("CPO", dict(alpha=0.5), "CPOConfig: alpha=0.5 is not supported yet"),
    ("KTO", dict(per_device_train_batch_size=1, gradient_accumulation_steps=1), "a step of one"),
]


@pytest.mark.parametrize("kind, settings, message", BAD_SETTINGS, ids=str)
def test_settings_that_mean_nothing_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        config(kind)(**settings)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_other_trainers_are_unknown(kind):
    for name in ("completion_only_loss", "assistant_only_loss", "dataset_text_field"):
        with pytest.raises(TypeError, match=f"{kind}Config got an unknown keyword '{name}'"):
            config(kind)(**{name: True})


def test_a_reference_model_is_refused_with_the_reason(model):
    with pytest.raises(ValueError, match="ref_model=Model is not supported, expected None: the"):
        unsloth_jax.DPOTrainer(model, model, train_dataset=TEXTS)
    with pytest.raises(TypeError, match="DPOTrainer got an unknown keyword 'refmodel'"):
        unsloth_jax.DPOTrainer(model, train_dataset=TEXTS, refmodel=None)


THEIRS = {"DPO": trl.DPOConfig, "KTO": trl.KTOConfig, "ORPO": TheirORPO, "CPO": TheirCPO}
SHARED = {f.name for f in fields(trl.SFTConfig)} & {f.name for f in fields(trl.RewardConfig)}
USED = {
    "DPO": "beta label_smoothing loss_type loss_weights max_length precompute_ref_log_probs "
    "truncation_mode",
    "KTO": "beta desirable_weight loss_type max_length undesirable_weight",
    "ORPO": "beta max_length",
    "CPO": "beta cpo_alpha label_smoothing loss_type max_length simpo_gamma",
}
ACCEPTED = {
    "DPO": "dataset_num_proc discopop_tau f_alpha_divergence_coef padding_free "
    "precompute_ref_batch_size ref_model_mixup_alpha ref_model_sync_steps",
    "KTO": "dataset_num_proc precompute_ref_batch_size precompute_ref_log_probs "
    "ref_model_mixup_alpha ref_model_sync_steps",
    "ORPO": "dataset_num_proc max_completion_length padding_value",
    "CPO": "dataset_num_proc max_completion_length",
}
REFUSED = {
    "DPO": "activation_offloading disable_dropout f_divergence_type ld_alpha model_init_kwargs "
    "pad_to_multiple_of pad_token router_aux_loss_coef sync_ref_model trust_remote_code "
    "use_weighting",
    "KTO": "activation_offloading disable_dropout model_init_kwargs pad_to_multiple_of "
    "router_aux_loss_coef sync_ref_model trust_remote_code",
    "ORPO": "disable_dropout generate_during_eval is_encoder_decoder model_init_kwargs "
    "trust_remote_code",
    "CPO": "alpha disable_dropout generate_during_eval is_encoder_decoder model_init_kwargs "
    "trust_remote_code",
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_lists_decide_each_setting_that_trls_config_adds(kind):
    """Used, accepted with a reason, or refused unless it asks for nothing."""
    ours, plain = config(kind), {f.name for f in fields(transformers.TrainingArguments)}
    added = {f.name for f in fields(THEIRS[kind])} - plain
    used = added & set(own_names(ours))
    accepted = (added & set(ours.ignored)) - used
    refused = (added & set(ours.later)) - used - accepted
    assert added == used | accepted | refused
    wanted = [set(lists[kind].split()) for lists in (USED, ACCEPTED, REFUSED)]
    assert [used, accepted, refused] == wanted
    assert all(len(ours.ignored[name]) > 10 for name in accepted)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_the_loss_are_trls(kind, tmp_path):
    theirs, ours = THEIRS[kind](output_dir=str(tmp_path), bf16=False), config(kind)()
    for name in USED[kind].split():
        got = getattr(ours, name)
        got = list(got) if isinstance(got, tuple) else got
        assert got == getattr(theirs, name), name
    later = config(kind).later
    for name in REFUSED[kind].split():
        assert getattr(theirs, name) in (*later[name], {}), name
    assert ours.train_sampling_strategy == theirs.train_sampling_strategy


def test_combined_losses_are_the_weighted_sum(model):
    args = unsloth_jax.DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[0.8, 1], rpo_alpha=2)
    assert args.weighted == [("sigmoid", 0.8), ("sft", 1.0), ("sft", 2)]
    assert unsloth_jax.DPOConfig().weighted == [("sigmoid", 1.0)]
    smooth = unsloth_jax.DPOConfig(loss_type=["robust", "bco_pair"], label_smoothing=0.2)
    assert smooth.label_smoothing == 0.2
    assert np.isclose(unsloth_jax.CPOConfig(loss_type="simpo", cpo_alpha=0).simpo_gamma, 0.5)


@pytest.mark.slow
def test_the_pages_examples_run(tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    folder = tiny_chat.save(tmp_path)
    code = "\n".join(blocks).replace('"path/to/model"', repr(str(folder)))
    exec(compile(code.replace("r=16", "r=4"), PAGE.name, "exec"), {})
    assert len(blocks) == 4 and capsys.readouterr().out.count("adapters sha256") == 4
