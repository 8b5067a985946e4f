"""Makes tests/data/preference_losses.json: TRL's own losses of fixed log-probabilities.

python tests/oracles/preference_losses.py         (with trl, torch and transformers installed)

The trainers' methods run on stand-ins that hold the settings they read; models return the given
numbers. Gradients are torch's, by the log-probabilities or, for ORPO and CPO, by the scores.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

FILE = Path(__file__).parents[1] / "data" / "preference_losses.json"
N, T, V = 4, 7, 9  # pairs, tokens of a row, vocabulary
ANSWERS = [(2, 7), (1, 5), (4, 6), (3, 7), (2, 4), (1, 7), (3, 6), (2, 6)]  # chosen, then rejected
LABELS = [True, False, True, True, False, True, False, True]
DPO = [
    *[dict(loss_type=n) for n in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard")],
    *[dict(loss_type=n) for n in ("sigmoid_norm", "robust", "apo_zero", "apo_down")],
    dict(loss_type="sigmoid", beta=0.5),
    dict(loss_type="hinge", beta=0.7),
    dict(loss_type="ipo", beta=0.3),
    dict(loss_type="robust", label_smoothing=0.2),
    dict(loss_type="exo_pair", label_smoothing=0.05, beta=0.3),
]
CPO = [
    dict(loss_type="sigmoid"),
    dict(loss_type="sigmoid", label_smoothing=0.1, beta=0.3),
    dict(loss_type="hinge", cpo_alpha=0.5),
    dict(loss_type="ipo", cpo_alpha=0.0),
    dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.8, beta=2.0),
    dict(loss_type="simpo"),
    dict(loss_type="simpo", label_smoothing=0.2, beta=1.5),
]
KTO = [
    dict(),
    dict(beta=0.5, desirable_weight=1.5, undesirable_weight=0.6),
    dict(loss_type="apo_zero_unpaired", beta=0.3),
    dict(shift=-3.0),  # a mean below 0
]
DEFAULTS = dict(beta=0.1, label_smoothing=0.0)


def mask(rows) -> torch.Tensor:
    out = torch.zeros(len(rows), T, dtype=torch.long)
    for row, (start, end) in zip(out, rows, strict=True):
        row[start:end] = 1
    return out


def stand_in(**fields) -> SimpleNamespace:
    same = lambda x: x
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        is_encoder_decoder=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **fields,
    )


def answering(logps: torch.Tensor):
    """A model whose outputs are these log-probabilities [rows, T - 1]."""
    zero = torch.zeros_like(logps)
    outputs = dict(entropy=zero, mean_logits=zero, is_top1=zero.bool())
    return lambda **inputs: SimpleNamespace(log_probs=logps, **outputs)


def recorded(stub, loss, leaf) -> dict:
    loss.backward()
    metrics = {k: float(v[0]) for k, v in stub._metrics["eval"].items() if v}
    kept = {k: v for k, v in metrics.items() if k.split("/")[0] in ("rewards", "logps", "kl")}
    return {"loss": loss.item(), "grad": leaf.grad.tolist(), "metrics": kept}


def inputs(rng) -> dict[str, np.ndarray]:
    logps = -rng.exponential(1.5, (2 * N, T - 1)) * mask(ANSWERS)[:, 1:].numpy()
    reference = logps.sum(1) + rng.normal(0, 3, 2 * N)
    return {"logps": logps.astype(np.float32), "reference": reference.astype(np.float32)}


def dpo(data, settings) -> dict:
    fields = dict(loss_weights=[1.0], ld_alpha=None, f_divergence_type="reverse_kl")
    settings = DEFAULTS | settings
    stub = stand_in(
        loss_types=[settings["loss_type"]],
        beta=settings["beta"],
        label_smoothing=settings["label_smoothing"],
        use_weighting=False,
        **fields,
    )
    leaf = torch.tensor(data["logps"], requires_grad=True)
    reference = torch.tensor(data["reference"])
    batch = {
        "input_ids": torch.zeros(2 * N, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * N, T),
        "completion_mask": mask(ANSWERS),
        "ref_chosen_logps": reference[:N],
        "ref_rejected_logps": reference[N:],
    }
    loss = DPOTrainer._compute_loss(stub, answering(leaf), batch, False)
    return recorded(stub, loss, leaf)


def kto(data, settings) -> dict:
    settings = (
        dict(loss_type="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, shift=0.0)
        | settings
    )
    shift = settings.pop("shift")
    stub = stand_in(calculate_KL=settings["loss_type"] == "kto", **settings)
    stub._compute_kl_logps = lambda model, batch: torch.tensor(data["kl_logps"]) + shift
    leaf = torch.tensor(data["logps"], requires_grad=True)
    batch = {
        "input_ids": torch.zeros(2 * N, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * N, T),
        "completion_mask": mask(ANSWERS),
        "label": torch.tensor(LABELS),
        "ref_logps": torch.tensor(data["reference"]),
        "ref_KL_logps": torch.tensor(data["kl_reference"]),
    }
    loss = KTOTrainer._compute_loss(stub, answering(leaf), batch, False)
    return recorded(stub, loss, leaf)


def on_scores(trainer, data, **settings) -> dict:
    """ORPO's or CPO's loss of scores [2 N, T, V] by its trainer's own forward and metrics."""
    stub = stand_in(pad_token_id=0, padding_value=0, **settings)
    for name in ("odds_ratio_loss", "cpo_loss", "concatenated_forward"):
        if hasattr(trainer, name):
            setattr(stub, name, getattr(trainer, name).__get__(stub))
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(stub, name, getattr(trainer, name))
    leaf = torch.tensor(data["scores"], requires_grad=True)
    ids = torch.tensor(data["ids"])
    ends = [end for _, end in ANSWERS]
    there = torch.tensor([[int(t < end) for t in range(T)] for end in ends])
    labels = torch.where(mask(ANSWERS) == 1, ids, -100)
    batch = {}
    for name, side in (("chosen", slice(0, N)), ("rejected", slice(N, 2 * N))):
        batch |= {f"{name}_input_ids": ids[side], f"{name}_attention_mask": there[side]}
        batch[f"{name}_labels"] = labels[side]
    model = lambda *args, **kwargs: SimpleNamespace(logits=leaf)
    loss, metrics = trainer.get_batch_loss_metrics(stub, model, batch, "train")
    loss.backward()
    kept = {k: v for k, v in metrics.items() if not k.startswith("logits")}
    return {"loss": loss.item(), "grad": leaf.grad.tolist(), "metrics": kept}


def main() -> None:
    rng = np.random.default_rng(16)
    data = inputs(rng)
    data["kl_logps"] = (data["reference"] + rng.normal(1, 1, 2 * N)).astype(np.float32)
    data["kl_reference"] = data["reference"]
    data["scores"] = rng.normal(0, 2, (2 * N, T, V)).astype(np.float32)
    data["ids"] = rng.integers(1, V, (2 * N, T))
    cpo = dict(loss_type="sigmoid", cpo_alpha=1.0, simpo_gamma=0.5, alpha=0.0)
    case = lambda settings, result: {"settings": settings, **result}
    results = {
        "dpo": [case(s, dpo(data, s)) for s in DPO],
        "kto": [case(s, kto(data, s)) for s in KTO],
        "orpo": [
            case(s, on_scores(ORPOTrainer, data, **s)) for s in ({"beta": 0.1}, {"beta": 0.4})
        ],
        "cpo": [case(s, on_scores(CPOTrainer, data, **(DEFAULTS | cpo | s))) for s in CPO],
    }
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    given = {k: v.tolist() for k, v in data.items()} | {"answers": ANSWERS, "labels": LABELS}
    rounded = json.loads(
        json.dumps({"versions": versions, "given": given, **results}),
        parse_float=lambda x: float(f"{float(x):.8g}"),
    )
    FILE.write_text(json.dumps(rounded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
