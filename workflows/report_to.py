"""Metrics to tensorboard, wandb, trackio and mlflow, by the names that transformers gives them."""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

PROJECT = "huggingface"  # transformers' name for it where none is given
Write = Callable[[dict[str, float], int], None]


def names(asked: str | Sequence[str] | None) -> list[str]:
    """Programs that take metrics: none for None and "none", those installed for "all".

    Raises ValueError for an unknown one, ImportError for one whose package is not installed.
    """
    given = [asked] if isinstance(asked, str) else list(asked or [])
    if given in ([], ["none"]):
        return []
    if given == ["all"]:
        return [name for name in KNOWN if _installed(name)]
    unknown = [name for name in given if name not in KNOWN]
    if unknown:
        raise ValueError(f"report_to names {unknown}, known: {['none', 'all', *KNOWN]}")
    lacking = [name for name in given if not _installed(name)]
    if lacking:
        raise ImportError(f"report_to={asked!r} needs a package: pip install {' '.join(lacking)}")
    return list(dict.fromkeys(given))


def _installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    # A folder of that name, such as wandb's own logs, is found too: it has no file.
    return found is not None and found.origin is not None


@contextmanager
def reporting(args: Any, config: Mapping[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A context that gives `report(row)`, for a row of the log; `config` describes the run.

    `args` has report_to, run_name, project, logging_dir and output_dir.
    """
    with ExitStack() as opened:
        writers = [opened.enter_context(KNOWN[n](args, config)) for n in names(args.report_to)]

        def report(row: dict[str, Any]) -> None:
            metrics = renamed(row)
            for write in writers if metrics else []:
                write(metrics, row["step"])

        yield report


def renamed(row: Mapping[str, Any]) -> dict[str, float]:
    """loss as train/loss, eval_loss as eval/loss; the step and rows of samples are left out."""
    if "samples" in row:
        return {}
    numbers = {k: float(v) for k, v in row.items() if isinstance(v, Real) and k != "step"}
    name = lambda k: f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}"
    return {name(k): v for k, v in numbers.items()}


@contextmanager
def _tensorboard(args: Any, config: Mapping[str, Any]) -> Iterator[Write]:
    """Event files in logging_dir, by default `runs` in output_dir."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = Path(args.logging_dir or Path(args.output_dir or ".") / "runs")
    if args.run_name:
        folder = folder / args.run_name
    folder.mkdir(parents=True, exist_ok=True)
    out = EventFileWriter(str(folder))

    def write(metrics: dict[str, float], step: int) -> None:
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in metrics.items()]
        out.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        out.flush()

    try:
        yield write
    finally:
        out.close()


@contextmanager
def _wandb(args: Any, config: Mapping[str, Any]) -> Iterator[Write]:
    """One run of Weights & Biases; its own environment variables count (WANDB_MODE, ...)."""
    import wandb

    run = wandb.init(project=args.project, name=args.run_name, config=dict(config))
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    try:
        yield lambda metrics, step: run.log({**metrics, "train/global_step": step})
    finally:
        run.finish()


@contextmanager
def _trackio(args: Any, config: Mapping[str, Any]) -> Iterator[Write]:
    """One run of trackio, on this machine."""
    import trackio

    trackio.init(project=args.project or PROJECT, name=args.run_name, config=dict(config))
    try:
        yield lambda metrics, step: trackio.log({**metrics, "train/global_step": step})
    finally:
        trackio.finish()


@contextmanager
def _mlflow(args: Any, config: Mapping[str, Any]) -> Iterator[Write]:
    """One run of mlflow; its own environment variables count (MLFLOW_TRACKING_URI, ...)."""
    import mlflow

    with mlflow.start_run(run_name=args.run_name):
        # A parameter of mlflow has 6000 characters at most.
        mlflow.log_params({name: str(value)[:6000] for name, value in config.items()})
        yield lambda metrics, step: mlflow.log_metrics(metrics, step=step)


KNOWN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
