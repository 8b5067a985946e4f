"""What the trainers share: one run from rows to adapters, with the names of transformers."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bridge.checkpoint import Checkpoints
from unsloth_jax.data import Row
from unsloth_jax.plan import Plan
from unsloth_jax.train import start
from workflows import (
    batching,
    diagnose,
    evaluate,
    facts,
    output_folder,
    plan,
    progress,
    report_to,
    run_page,
    samples,
    streams,
    updates,
    user_metrics,
)
from workflows.batching import Batches, Steps
from workflows.callbacks import Callbacks, State, checked
from workflows.generate import Stopwatch
from workflows.keywords import say
from workflows.model import Model
from workflows.objective import SFT, Objective
from workflows.rows import Shown
from workflows.run import Run, Saving, resumed, short_hash
from workflows.sft_config import SFTConfig
from workflows.speaking import say_pieces
from workflows.user_metrics import Measured
from workflows.watch import Watch

TENTH = 0.1  # of a run: how often an eval_dataset is evaluated where nothing says, as in Unsloth


class TrainOutput(NamedTuple):
    """What `train` returns, in transformers' words."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


class Trainer:
    """What trainers of adapters share, from a data set's rows to the last step.

    A trainer says how rows are made (`_rows`, `_stream`) and what is lowered (`objective`).
    """

    objective: Objective = SFT
    optimizers: tuple[Any, Any] = (None, None)  # see updates.handed
    user: Measured = Measured()  # metrics of the user's own

    def __init__(
        self,
        model: Model,
        args: SFTConfig,
        tokenizer: Any,
        train_dataset: Any,
        eval_dataset: Any,
        callbacks: Sequence[Any] | None,
    ):
        self._trainable(model, args)
        if train_dataset is None:
            raise ValueError(f"{type(self).__name__} needs a train_dataset")
        self.model, self.args, self.tokenizer = model, args, tokenizer
        say_pieces(tokenizer)
        # Rows, or how a pass over a stream makes them.
        self.rows = self._stream(train_dataset) or self._rows(train_dataset)
        self.eval_rows = self._held_out(eval_dataset)
        self._settle_evaluation()
        self.state = State(logging_steps=self.args.logging_steps)
        self.callbacks = checked(callbacks)
        self._calls()("on_init_end")

    def _trainable(self, model: Model, args: SFTConfig) -> None:
        """Raises ValueError where nothing would be trained, or not as the adapters ask."""
        trainable(model)
        dropout = model.peft.dropout if model.peft else 0
        if dropout != self.objective.dropout:
            raise ValueError(
                f"{type(self).__name__} draws no dropout, but the adapters have lora_dropout="
                f"{dropout}: make them with lora_dropout=0"
            )
        if self.optimizers[0] is None:
            updates.rates(args, model.adapters)

    def _rows(self, dataset: Any) -> list[Row]:
        """All rows of a data set."""
        raise TypeError(f"{type(self).__name__} does not say how rows are made")

    def _stream(self, dataset: Any) -> streams.Rows | None:
        """How each pass over a streaming data set makes rows; None where all are made at once."""
        return None

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """The rows of the last run: one a logged step, one an evaluation."""
        return self.state.log_history

    @property
    def train_dataset(self) -> Shown:
        """The rows that are trained on, as dictionaries of token ids and labels."""
        if callable(self.rows):
            raise ValueError("train_dataset is streamed: its rows are not known before they come")
        return Shown(self.rows)

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, an object or a class. Raises as SFTTrainer's `callbacks`."""
        self.callbacks += checked([callback])

    def _held_out(self, given: Any) -> dict[str, list[Any]]:
        """Rows by the data set's name, "" for a single one."""
        return evaluate.of_sets(given, self._rows)

    def _settle_evaluation(self) -> None:
        """Fills in when evaluations happen; raises ValueError where there is nothing for them."""
        a, there = self.args, bool(self.eval_rows)
        asked = {name: getattr(a, name) for name in ("eval_strategy", "load_best_model_at_end")}
        asked |= {"lr_scheduler_type": a.lr_scheduler_type if a.follows else False}
        asked = [f"{name}={value!r}" for name, value in asked.items() if value not in ("no", False)]
        if asked and not there:
            raise ValueError(f"{type(a).__name__}: {', '.join(asked)} need an eval_dataset")
        if there and a.eval_strategy == "no":
            a.eval_strategy, a.eval_steps = "steps", a.eval_steps or TENTH
            say(f"eval_dataset is evaluated every {a.eval_steps:g} of the run (eval_strategy)")
        if there and a.eval_steps is None:
            a.eval_steps = a.logging_steps

    def _check_metric(self, more: bool) -> None:
        """Raises ValueError for a metric_for_best_model that no evaluation will give."""
        name = self.args.metric_for_best_model
        if name is not None and self.eval_rows:
            sets = [named(one) for one in self.eval_rows]
            evaluate.check(name, sets, self.objective, more)

    def _calls(self) -> Callbacks:
        beside = {"model": self.model, "processing_class": self.tokenizer}
        return Callbacks(self.callbacks, self.args, self.state, beside=beside)

    @property
    def length(self) -> int:
        """Tokens a row may have."""
        asked = self.args.max_seq_length or self.args.max_length or self.model.max_seq_length
        if asked > self.model.max_seq_length:
            say(f"rows have at most the model's max_seq_length={self.model.max_seq_length} tokens")
        return min(asked, self.model.max_seq_length)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Runs the steps that are left; on any exit `model.adapters` is the last finite state.

        The model takes the trainer's tokenizer, so that exports hold the template trained with.

        `resume_from_checkpoint` True continues the newest checkpoint of output_dir, a path that of
        another folder. Raises ValueError where it does not fit, FileExistsError where a new run's
        output_dir holds checkpoints, FloatingPointError for a loss that is not finite.
        """
        source = output_folder.continued(self._folder(), resume_from_checkpoint)
        a, m = self.args, self.model
        if writes := a.output_dir is not None or a.save_strategy != "no":
            output_folder.check_writable(self._folder())
        # What is saved and what answers takes the template that was trained with.
        m.tokenizer = self.tokenizer
        (batches, known), total = self._known(self._batches()), self.total_steps()
        optimizer, rate = updates.optimizer(a, total, m.adapters, self.optimizers)
        clock = Stopwatch()
        plans: list[Plan] = []
        how = a.memory_budget, self.objective, plans.append
        prepared = plan.prepared(m, optimizer, batches, total, *how)
        with m.multiplied_in(a.matmul_dtype), prepared as step:
            state, found = start(m.adapters, optimizer), None
            if source is not None:
                found = resumed(source, state, known)
                state = found.state
            before = short_hash(state.trainable)
            own = output_folder.owns(self._folder(), source)
            if own:
                output_folder.set_aside(self._folder(), int(state.step))
            elif writes:
                output_folder.refuse_to_mix(self._folder(), int(state.step))
            self.log_history.clear()
            kept = int(state.step) if own else 0
            file = self._metrics_file()
            self.log_history.extend(progress.rows(file, kept))
            page = self._page(batches, total, kept, plans)
            shown, reporting = progress.bar(total, file, kept), report_to.reporting(a, vars(a))
            with shown as show, page as drawn, reporting as report:
                out = self.log_history.append, show, drawn, report
                log = lambda row: [each(row) for each in out]
                watch = self._watch(total, log)
                saving = self._saving(batches, known, watch.notes)
                of = m.family, m.config, m.scale, self.objective, batches.documents(total)
                find = diagnose.first_bad_layer(*of)
                run = watch.run = Run(
                    step, state, m.params, batches, rate, total, watch.logged, a.logging_steps,
                    saving, find, watch.after, watch.saved, self.objective,
                )  # fmt: skip
                if found is not None:
                    watch.go_on(found.notes, found.best)
                try:
                    with run:
                        watch.begin()
                        run()
                finally:
                    m.adapters = run.state.trainable
                watch.end()
        progress.adapters(before, short_hash(m.adapters))
        return _output(int(run.state.step), run.losses, clock())

    def evaluate(
        self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and perplexity of the adapters as they are, on eval_dataset or the trainer's own.

        Raises ValueError where there is neither.
        """
        held_out = self.eval_rows if eval_dataset is None else self._held_out(eval_dataset)
        if not held_out:
            raise ValueError("evaluate: the trainer has no eval_dataset and none was given")
        return self._evaluator(held_out, metric_key_prefix)(self.model.adapters)

    def _evaluator(self, held_out: dict[str, list[Any]], prefix: str = "eval") -> Callable:
        """fn(adapters) -> metrics of all data sets."""
        a = self.args
        size = min(a.per_device_eval_batch_size, a.per_device_train_batch_size)
        packing = a.packing if a.eval_packing is None else a.eval_packing
        made = lambda some: self._made(some, size, 1, packing, None)
        sets = {named(name, prefix): made(some) for name, some in held_out.items()}
        found = evaluate.evaluator(self.model, sets, self.objective)
        return user_metrics.beside(found, self.model, sets, self.user)

    def _watch(self, total: int, log: Callable) -> Watch:
        """What goes on between the steps of one run."""
        s, a = self.state, self.args
        s.max_steps, s.train_batch_size = total, a.per_device_train_batch_size
        s.num_train_epochs = math.ceil(total / self._batches().steps(0))
        s.best_metric, s.best_global_step, s.epoch = None, None, 0.0
        measured = self._evaluator(self.eval_rows) if self.eval_rows else None
        drawn = None
        if a.sample_prompts:
            drawn = samples.sampler(self.model, a.sample_prompts, a.sample_max_new_tokens)
        return Watch(a, self.model, self._calls(), total, measured, log, sampled=drawn)

    def _batches(self) -> Steps:
        a = self.args
        sizes = a.per_device_train_batch_size, a.gradient_accumulation_steps
        if callable(self.rows):
            multiple = batching.width_multiple(a)
            how = *sizes, self.length, a.packing, a.max_steps, multiple
            return streams.Streamed(self.rows, *how)
        return self._made(self.rows, *sizes, a.packing, a.seed)

    def _made(
        self, rows: Sequence[Any], batch: int, accumulation: int, packing: bool, seed: int | None
    ) -> Batches:
        """The batches of some rows; `seed` None leaves them in their order."""
        order = {"seed": None} if seed is None else batching.order(self.args)
        return Batches(rows, batch, accumulation, self.length, packing, **order)

    def _digest(self, rows: Sequence[Any]) -> str:
        return facts.digest(rows)

    def total_steps(self) -> int:
        """Optimizer steps of a whole run."""
        a = self.args
        if a.max_steps > 0:
            return a.max_steps
        return math.ceil(self._batches().steps(0) * a.num_train_epochs)

    def _folder(self) -> Path:
        return Path(self.args.output_dir or "unsloth_training_checkpoints")

    def _metrics_file(self) -> Path | None:
        return None if self.args.output_dir is None else self._folder() / "metrics.jsonl"

    def _page(self, batches: Any, total: int, kept: int, plans: list[Plan]) -> Any:
        """The context that keeps output_dir's report.html; one that does nothing without it."""
        if self.args.output_dir is None:
            return nullcontext(lambda row: None)
        self.state.global_step = kept
        shown = run_page.facts(self, batches, plans)
        return run_page.Page(self._folder(), shown, total, kept, lambda: self.state.global_step)

    def _saving(self, batches: Any, known: dict[str, Any], notes: Callable) -> Saving:
        every = self.args.save_steps if self.args.save_strategy == "steps" else None
        if self.args.save_strategy == "epoch":
            every = batches.steps(0)
        checkpoints = Checkpoints(self._folder(), self.args.save_total_limit)
        return Saving(checkpoints, every, known, notes)

    def _known(self, batches: Any) -> tuple[Any, dict[str, Any]]:
        """The batches, and what a run that goes on must have in common with this one."""
        if isinstance(batches, streams.Streamed):
            first, batches = batches.begun()
            return batches, self._facts(facts.streamed(self, first))
        return batches, self._facts({"data": self._digest(self.rows)})

    def _facts(self, data: dict[str, Any]) -> dict[str, Any]:
        return facts.of(self, self.total_steps(), data)


def named(name: str, prefix: str = "eval") -> str:
    """What stands before the metrics of an evaluation set."""
    return f"{prefix}_{name}" if name else prefix


def _output(done: int, losses: list[float], seconds: float) -> TrainOutput:
    loss = float(np.mean(losses)) if losses else float("nan")
    speed = len(losses) / seconds
    metrics = {"train_runtime": seconds, "train_steps_per_second": speed, "train_loss": loss}
    return TrainOutput(done, loss, metrics)


def trainable(model: Model) -> None:
    """Raises ValueError where the model has nothing to train."""
    if model.adapters is None:
        raise ValueError("the model has no adapters; call FastLanguageModel.get_peft_model")
    if not jax.tree.leaves(model.adapters):
        p = model.peft
        named = f": target_modules={p.targets} in layers {p.layers}" if p else ""
        raise ValueError(f"the model's adapters are empty{named}, no weight to train")
