"""Plans: exact parts, estimates beside compiled figures, the ladder, budgets, and who asks them."""

import json
import re
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_chat
import transformers

from unsloth_jax import (
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    layer_memory,
    optim,
    plan,
    train,
)
from unsloth_jax.leaves import Hosted
from unsloth_jax.plan import GIB, Budget
from unsloth_jax.remat import KEPT, Memory
from workflows import machine
from workflows import plan as planning
from workflows.bench import plan_accuracy, rows
from workflows.bench.plan_accuracy import Case

COMPILED = Path(__file__).parents[1] / "docs" / "performance" / "plan_compiled.json"
LLAMA, QWEN, MIXTURE = "llama-8b", "qwen3-0.6b", "qwen3-30b-a3b"
WITHOUT_GPU = json.loads((Path(__file__).parent / "data" / "plans_for_h100.json").read_text())


@cache
def job(batch: int = 2, length: int = 2048, shape: str = LLAMA, rank: int = 16) -> plan.Job:
    return plan_accuracy.job(Case(batch, length, Memory(), rank, shape))


@cache
def committed() -> list[dict]:
    return json.loads(COMPILED.read_text()) if COMPILED.exists() else []


def test_estimates_are_within_15_percent_of_every_committed_compiled_figure():
    assert len(committed()) >= 12, "python -m workflows.bench.plan_accuracy --compile, on a GPU"
    for row in committed():
        rows.check(row)
        case = Case(**(row["case"] | {"memory": Memory(**row["case"]["memory"])}))
        found = plan.estimate(plan_accuracy.job(case), case.memory)
        assert found.total / GIB == pytest.approx(row["compiled"]["total"], rel=0.15), row["name"]
        assert found.host / GIB == pytest.approx(row["compiled"]["host"], rel=0.15, abs=0.01)


# GiB on the device by XLA's plan for an H100 (docs/performance.md): attention's rows are the peak.
LONG = {200_000: 21.3, 350_208: 33.4}


@pytest.mark.parametrize("length", LONG)
def test_estimates_of_long_rows_are_within_15_percent_of_xlas_plan(length):
    memory = Memory("offload", tiles=64, host_embedding=True)
    found = plan.estimate(plan_accuracy.job(Case(1, length, memory, rank=32)), memory)
    assert found.total / GIB == pytest.approx(LONG[length], rel=0.15)


@cache
def shaped(shape: str) -> tuple:
    fields = WITHOUT_GPU["shapes"][shape]
    family, c, params = planning.shapes(fields, "bfloat16", "nf4")
    return family, c, params, planning.states(params, plan_accuracy.RULE)


def described(name: str) -> tuple[plan.Job, Memory]:
    """A row of the plans that XLA made for an H100: what is trained, and how."""
    shape, size, policy, rank = name.split()
    return plan.Job(*shaped(shape), int(rank), *map(int, size.split("x"))), plan.named(policy)


@pytest.mark.parametrize("name", WITHOUT_GPU["rows"])
def test_estimates_of_mixtures_and_hybrids_are_within_10_percent_of_xlas_plan_for_an_h100(name):
    here, memory = described(name)
    found, row = plan.estimate(here, memory), WITHOUT_GPU["rows"][name]
    assert found.total / GIB == pytest.approx(row["gib"], rel=0.1)
    assert found.host / GIB == pytest.approx(row["host_gib"], rel=0.1, abs=0.01)


def test_the_estimate_of_a_mixtures_step_is_within_2_percent_of_what_a_gpu_took():
    (row,) = json.loads((COMPILED.parent / "mixture_step.json").read_text())
    assert "2x2048, full" in row["name"]
    taken, pinned = map(float, row["memory"].split(" + "))
    found = plan.estimate(job(shape=MIXTURE), Memory("full"))
    assert found.total / GIB == pytest.approx(taken, rel=0.02) and pinned == found.host == 0


# The same of Qwen3-30B-A3B: 16 for D, 32 for q, 4 for k or v; of experts nothing is kept.
MIXED_BY_HAND = {
    "offload": 0, "full": 16, "attention": 16 + 32 + 4 + 4 + 32.5, "mlp": 16,
    "none": 16 + 32 + 4 + 4 + 32.5 + 16,
}  # fmt: skip


@pytest.mark.parametrize("keep", KEPT)
def test_residuals_of_a_mixture_are_those_of_attention_alone(keep):
    found = plan.estimate(job(shape=MIXTURE), Memory(keep))
    assert found.residuals == 48 * MIXED_BY_HAND[keep] * 2**20


def test_widths_are_those_of_the_weights():
    found = layer_memory.feed(described("llama4-maverick-cut 2x2048 mlp 16")[0])
    dense, expert, width = 16384, 8192, 5120
    assert found.gates == found.ups == 6 * dense + 6 * expert and found.widest == dense
    assert found.largest == 32 * 2 * expert * width and found.inner == 2 * expert
    assert found.experts == 32 * 3 * expert * width
    plain = layer_memory.feed(job())
    assert plain == (32 * 14336, 32 * 14336, 14336, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.TINY)
def test_of_every_family_dense_mlps_are_kept_and_experts_are_not(name):
    kind, own = tiny.TINY[name]
    fields = getattr(transformers, f"{kind}Config")(**own).to_dict()
    family, c, params = planning.shapes(fields, "bfloat16", "nf4")
    here = plan.Job(
        family, c, params, planning.states(params, plan_accuracy.RULE, "all-linear"), 4, 2, 128
    )
    found, mixed = layer_memory.feed(here), hasattr(c, "experts")
    assert bool(found.experts) == bool(found.inner) == mixed
    if not mixed:
        gates = 0 if fields["model_type"] == "starcoder2" else c.layers * c.mlp_width
        assert found == (gates, c.layers * c.mlp_width, c.mlp_width, 0, 0, 0)
    totals = [plan.estimate(here, memory).total for memory in plan.ladder(here)]
    assert totals == sorted(set(totals), reverse=True)


def test_only_joined_pairs_and_layers_of_several_kinds_are_held_twice():
    assert layer_memory.copies(job(), Memory()) == 0
    joined = 48 * 128 * 16 * (2048 + 2 * 768) * 4  # a of [r, D] and b of [2 F, r], float32
    assert layer_memory.copies(job(shape=MIXTURE), Memory()) == joined
    assert layer_memory.copies(job(shape=MIXTURE), Memory("none", unroll=True)) == 0
    here, full = described("gpt-oss-20b 2x2048 full 16")
    assert layer_memory.copies(here, full) == plan.size(here.states(16).trainable)


# MiB a layer keeps of 4096 tokens, by hand: 32 for D, 8 for k or v, 112 for F, 0.5 of statistics.
BY_HAND = {
    "offload": 0, "full": 32, "attention": 32 + 32 + 8 + 8 + 32.5, "mlp": 32 + 2 * 112,
    "none": 32 + 32 + 8 + 8 + 32.5 + 32 + 2 * 112,
}  # fmt: skip


@pytest.mark.parametrize("keep", KEPT)
def test_residuals_are_what_the_policy_keeps(keep):
    found = plan.estimate(job(), Memory(keep))
    assert found.residuals == 32 * BY_HAND[keep] * 2**20
    assert found.host == (32 * 32 * 2**20 if keep == "offload" else 0)


def test_parameters_adapters_and_optimizer_are_those_of_the_arrays_themselves():
    small = job(2, 128, "tiny", 4)
    made = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), small.params)
    optimizer = plan_accuracy.RULE
    state = train.start(plan_accuracy.lora.init(jax.random.key(0), made, 4), optimizer)
    held = lambda node: sum(x.nbytes for x in jax.tree.leaves(node))
    found = plan.estimate(small, Memory())
    assert found.parameters == held(made) and found.optimizer == held(state.opt)
    assert found.adapters == found.gradients == held(state.trainable)
    assert found.total == sum(found[:7]) and str(found).startswith(plan.gib(found.total))


def test_a_table_on_the_host_leaves_the_device_and_its_rows_come_with_the_batch():
    table, tokens = 128256 * 4096 * 2, 2 * 2048
    plain, hosted = (plan.estimate(job(), Memory(host_embedding=on)) for on in (False, True))
    assert plain.parameters - hosted.parameters == table == hosted.host
    assert hosted.batch - plain.batch == tokens * 4096 * 2


def test_accumulation_holds_a_second_gradient_and_more_rank_more_of_both():
    one = plan.estimate(job(), Memory())
    two = plan.estimate(job()._replace(accumulation=2), Memory())
    more = plan.estimate(job()._replace(rank=32), Memory())
    assert two.gradients == 2 * one.gradients and two.batch == 2 * one.batch
    assert more.adapters == 2 * one.adapters and more.parameters == one.parameters


def test_a_compiled_plan_has_the_compilers_total_and_exact_parts():
    small = job(2, 128, "tiny", 4)._replace(platform="cpu")
    memory = Memory("full", host_embedding=True)
    step = plan_accuracy.step(small, memory)
    found, guess = plan.compiled(step, small, memory), plan.estimate(small, memory)
    assert found.source == "compiled" and guess.source == "estimated"
    parts = "parameters adapters optimizer gradients residuals batch host".split()
    assert [getattr(found, p) for p in parts] == [getattr(guess, p) for p in parts]
    assert found.host == small.params["model"]["embed_tokens"]["weight"].size * 2
    assert 0 < found.temporaries < found.total


@pytest.mark.parametrize(
    "shape, batch, length",
    [(LLAMA, 8, 2048), (LLAMA, 1, 65536), (QWEN, 4, 2048), (MIXTURE, 8, 2048)],
)
def test_every_rung_of_the_ladder_is_leaner_than_the_one_before(shape, batch, length):
    here = job(batch, length, shape)
    rungs = plan.ladder(here)
    totals = [plan.estimate(here, memory).total for memory in rungs]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals) >= 4
    assert [m.keep for m in rungs][0] == "none" and rungs[-1].keep == "offload"
    assert [m.unroll for m in rungs] == [m.keep == "none" for m in rungs]
    assert all(length * batch % m.tiles == 0 for m in rungs)
    assert any(m.host_embedding for m in rungs) == (shape != QWEN)
    assert not any(m.host_embedding for m in plan.ladder(job(2, 65536)))


def test_tiles_divide_every_bucket_and_stay_away_from_short_rows():
    assert plan.ladder(job(4, 2048))[-1].tiles == 1
    assert plan.ladder(job(8, 2048))[-1].tiles == 2
    assert plan.ladder(job(1, 200_000))[-1].tiles == 32
    assert plan.ladder(job(1, 20_001))[-1].tiles == 1
    odd = plan.ladder(job(3, 8000))[-1].tiles
    assert odd > 1 and all(3 * length % odd == 0 for length in range(64, 8001, 64))


def test_a_rung_is_named_by_what_it_changes():
    assert plan.title(Memory()) == "full"
    assert (
        plan.title(Memory("offload", 4, 256, True, True)) == "offload+host+tiles4+chunk256+unroll"
    )


def test_a_head_smaller_than_its_scores_gets_smaller_chunks():
    chunks = [m.chunk for m in plan.ladder(job(4, 512, QWEN))]
    assert chunks[0] == 512 > chunks[-1]


def test_a_cpu_has_no_host_to_move_things_to():
    rungs = plan.ladder(job()._replace(platform="cpu"))
    assert [m.keep for m in rungs] == ["none", "mlp", "attention", "full"]
    assert not any(m.host_embedding or m.tiles > 1 for m in rungs)


@pytest.mark.parametrize("place", range(7))
def test_auto_takes_the_fastest_rung_that_fits(place):
    here = job(8, 2048)
    rung = plan.ladder(here)[place]
    size = plan.estimate(here, rung).total
    assert plan.choose(here, Budget(size, 2**50)) == (rung, plan.estimate(here, rung))


def test_pinned_memory_counts_too():
    lean = plan.estimate(job(8), plan.ladder(job(8))[-1])
    with pytest.raises(ValueError, match="1.00 GiB on the host"):
        plan.choose(job(8), Budget(lean.total, GIB))


def test_the_compilers_word_counts_more_than_the_estimate():
    here, asked = job(), []

    def confirm(memory):
        asked.append(memory)
        found = plan.estimate(here, memory)
        return found._replace(temporaries=found.temporaries + GIB * (len(asked) < 2))

    fits = plan.estimate(here, plan.ladder(here)[0]).total
    memory, _ = plan.choose(here, Budget(fits, 2**50), confirm=confirm)
    assert memory == plan.ladder(here)[1] and asked == list(plan.ladder(here)[:2])


def test_a_single_policy_is_refused_on_the_compilers_word_only():
    here, full = job(), Memory("full")
    size = plan.estimate(here, full).total
    less = lambda memory: plan.estimate(here, memory)._replace(temporaries=0, residuals=0)
    assert plan.choose(here, Budget(int(size / 1.1), 0), [full], less)[0] == full
    with pytest.raises(ValueError, match="don't fit"):
        plan.choose(here, Budget(int(size / 1.3), 0), [full], less)


def test_what_an_error_says_would_fit_does_fit():
    here = job(8, 16384, rank=64)
    room = Budget(12 * GIB, 2**50)
    with pytest.raises(ValueError) as error:
        plan.choose(here, room)
    said = str(error.value)
    assert "8 x 16384 tokens with rank 64 don't fit into 12.00 GiB" in said
    length = int(re.search(r"rows of ([\d,]+) tokens", said)[1].replace(",", ""))
    batch = int(re.search(r"a batch of (\d+)", said)[1])
    assert 0 < length < 16384 and length % 64 == 0 and 0 < batch < 8
    for other in (here._replace(length=length), here._replace(batch=batch)):
        plan.choose(other, room)
    for other in (here._replace(length=length + 64), here._replace(batch=batch + 1)):
        with pytest.raises(ValueError, match="don't fit"):
            plan.choose(other, room)


def test_a_policy_that_does_not_fit_is_told_of_the_leanest():
    with pytest.raises(ValueError, match='use_gradient_checkpointing="unsloth" \\('):
        plan.choose(job(), Budget(7 * GIB, 2**50), [Memory("none")])
    with pytest.raises(ValueError, match="What would fit: nothing"):
        plan.choose(job(), Budget(GIB, 2**50))


SIZES = [(2**30, 2**30), (0.5, 500), (1.0, 1000), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29),
         ("80gb", 80 * 10**9), ("700MB", 7 * 10**8)]  # fmt: skip


@pytest.mark.parametrize("asked, expected", SIZES, ids=str)
def test_a_budget_is_bytes_a_share_or_a_text(asked, expected):
    assert planning.size(asked, 1000) == expected


@pytest.mark.parametrize("asked", [0, -5, 1.5, 0.0, "many", "1.2.3GB", "24", True, float("nan")])
def test_a_budget_that_means_nothing_is_refused(asked):
    with pytest.raises(ValueError, match="memory_budget must be bytes, a share"):
        planning.check_budget(asked)


def test_a_share_needs_a_device_that_reports_its_memory():
    with pytest.raises(ValueError, match="does not report its memory"):
        planning.budget(0.5)
    assert planning.budget(None) is None and planning.budget("24GB").host == pytest.approx(
        machine.host_free(), rel=0.5
    )


def test_the_host_share_of_a_budget_is_what_xla_would_pin(monkeypatch):
    monkeypatch.setenv(machine.PINNED, "1")
    assert planning.budget("24GB").host == 2**30 < machine.host_free()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plan_accuracy.SHAPES[LLAMA]))
    return path


def test_the_command_marks_the_fastest_rung_that_fits(config, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    for model in (config, config.parent):
        planning.main([str(model), "--batch", "8", "--gpu", "48GB"])
        lines = capsys.readouterr().out.splitlines()
        assert "budget: 22.35 GiB, 50% of 48GB" in lines[1]
        marked = [line.split() for line in lines if line.startswith("*")]
        assert [line[1] for line in marked] == ["attention+host"] and marked[0][-1] == "yes"
        assert [line.split()[-1] for line in lines[3:]] == ["no"] * 3 + ["yes"] * 4
        assert all("estimated" in line for line in lines[3:])


def test_the_command_says_what_would_fit(config, capsys):
    line = [str(config), "--max-seq-length", "32768", "--memory-budget", "8GB", "--rank", "64"]
    with pytest.raises(SystemExit, match="What would fit: rows of .* tokens"):
        planning.main(line)
    assert "*" not in capsys.readouterr().out


@pytest.mark.parametrize("line", [["--batch", "0"], ["--compile"], ["--optimizer", "no"]], ids=str)
def test_the_command_refuses_what_it_cannot_do(config, line):
    with pytest.raises(SystemExit):
        planning.main([str(config), *line])


def test_a_model_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json at"):
        planning.main([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="'mamba' is not supported; supported: .*llama"):
        planning.main([str(tmp_path)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"))


def trained(folder, asked, budget=None, **changes):
    model, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(
        model, r=4, use_gradient_checkpointing=asked, memory_budget=budget
    )
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, max_length=64)
    options |= dict(max_steps=2, learning_rate=2e-2, optim="adamw_torch") | changes
    return model, SFTTrainer(
        model=model, train_dataset=tiny_chat.MESSAGES, args=SFTConfig(**options)
    )


def test_a_budget_that_no_plan_meets_raises_before_anything_is_allocated(folder):
    model, run = trained(folder, "auto", "1KB")
    before = {id(x) for x in jax.live_arrays()}
    with pytest.raises(ValueError, match="don't fit into 0.00 GiB"):
        run.train()
    assert {id(x) for x in jax.live_arrays()} <= before and not run.log_history
    run.args.memory_budget = "24GB"
    assert run.train().global_step == 2


def test_auto_says_which_plan_it_took(folder, capsys):
    _, run = trained(folder, "auto", memory_budget="26GB")
    run.train()
    said = [x for x in capsys.readouterr().out.splitlines() if "memory plan" in x]
    assert said == [x for x in said if "(estimated): none," in x and "of 24.21 GiB" in x] != []


@pytest.mark.parametrize("asked, keep", [("auto", "full"), ("unsloth", "full"), (True, "full"),
                                         (False, "none")])  # fmt: skip
def test_a_cpu_without_a_budget_computes_layers_again_or_keeps_them(folder, asked, keep, capsys):
    model, run = trained(folder, asked)
    here = planning.job_of(model, plan_accuracy.RULE, run._batches())
    assert planning.rungs(model.memory, here)[-1] == Memory(keep)
    assert here.length == 64 and here.platform == "cpu"
    assert "memory plan" not in capsys.readouterr().out


def test_a_table_in_host_memory_trains_alike_and_comes_back(folder):
    losses = []
    for memory in (Memory("full"), Memory("full", host_embedding=True)):
        model, run = trained(folder, True)
        model.memory, table = memory, np.asarray(model.params["model"]["embed_tokens"]["weight"])
        run.train()
        losses.append([row["loss"] for row in run.log_history])
        back = model.params["model"]["embed_tokens"]["weight"]
        assert isinstance(back, jax.Array) and (np.asarray(back) == table).all()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_inside_a_run_the_table_is_not_on_the_device(folder):
    model, run = trained(folder, True)
    model.memory = Memory("full", host_embedding=True)
    optimizer = optim.make("adamw_torch", optim.schedule("constant", 1e-3, 0, 1))
    with planning.prepared(model, optimizer, run._batches(), 2):
        assert isinstance(model.params["model"]["embed_tokens"]["weight"], Hosted)


@pytest.mark.parametrize("budget", ["much", -1, 3.5])
def test_a_budget_without_meaning_is_refused_by_both_faces(folder, budget):
    model, _ = tiny_chat.load(folder)
    with pytest.raises(ValueError, match="memory_budget must be"):
        FastLanguageModel.get_peft_model(model, memory_budget=budget)
    with pytest.raises(ValueError, match="memory_budget must be"):
        SFTConfig(memory_budget=budget)
    assert model.adapters is None


@pytest.mark.slow
def test_the_script_compiles_each_case_once_and_measures_it(tmp_path, capsys):
    output = tmp_path / "compiled.json"
    plan_accuracy.main(["--tiny", "--compile", "--output", str(output)])
    written = json.loads(output.read_text())
    assert [row["name"] for row in written] == [case.name for case in plan_accuracy.TINY]
    for row in written:
        rows.check(row)
        assert row["ours"] == row["compiled"]["total"] > row["compiled"]["temporaries"] > 0
    plan_accuracy.main(["--tiny", "--compile", "--output", str(output)])
    assert json.loads(output.read_text()) == written
    capsys.readouterr()
    plan_accuracy.main(["--tiny", "--alone", plan_accuracy.TINY[0].name])
    seen = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert seen["compiled"] == written[0]["ours"] and seen["peak_gib"] is None
