"""Makes tests/data/preference_trainers.json: runs of TRL's trainers with PEFT, step by step.

PYTHONPATH=.:tests python tests/oracles/preference_trainers.py    (with trl and peft installed)

Float32 on a CPU, rows in their order, the adapters that `preference_runs.model` starts from.
"""

import json
import tempfile
from pathlib import Path

import datasets
import peft
import preference_runs
import tiny_chat
import transformers
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

FILE = Path(__file__).parents[1] / "data" / "preference_trainers.json"
THEIRS = {
    "DPO": (trl.DPOTrainer, trl.DPOConfig),
    "KTO": (trl.KTOTrainer, trl.KTOConfig),
    "ORPO": (ORPOTrainer, ORPOConfig),
    "CPO": (CPOTrainer, CPOConfig),
}
CPU = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
    disable_tqdm=True, seed=1,
)  # fmt: skip
KEPT = ("loss", "grad_norm", "learning_rate", "nll_loss", "log_odds", "rewards/", "logps/", "kl")


def trainer(kind: str, rows: list[dict], settings: dict, folder: Path, output: Path):
    """TRL's trainer of the tiny model with the start's adapters."""
    made, config = THEIRS[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind in ("ORPO", "CPO"):
        tokenizer.bos_token = None  # these two would put one before text whose tokenizer has none
    base = tiny_chat.reference(folder)
    model = peft.PeftModel.from_pretrained(base, output / "start", is_trainable=True)
    args = config(output_dir=str(output / "out"), **(preference_runs.LOOP | CPU | settings))
    data = datasets.Dataset.from_list(rows)
    return made(model=model, args=args, train_dataset=data, processing_class=tokenizer)


def steps(run) -> list[dict[str, float]]:
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if k.startswith(KEPT)} for row in rows]


def ids(run) -> list[dict[str, list[int]]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: row[name] for name in names} for row in run.train_dataset]


def main() -> None:
    output = Path(tempfile.mkdtemp())
    folder = tiny_chat.save(output / "model")
    preference_runs.model(folder).save_pretrained(output / "start")
    made = lambda kind, rows, settings: trainer(kind, rows, settings, folder, output)
    runs = {name: steps(made(*run)) for name, run in preference_runs.RUNS.items()}
    shapes = {"texts": preference_runs.TEXTS, "talks": preference_runs.TALKS}
    shapes["implicit"] = preference_runs.IMPLICIT
    tokens = {name: ids(made("DPO", rows, {})) for name, rows in shapes.items()}
    versions = {m.__name__: m.__version__ for m in (trl, peft, transformers)}
    found = {"versions": versions, "runs": runs, "ids": tokens}
    rounded = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.8g}"))
    FILE.write_text(json.dumps(rounded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
