"""Importing and training leave every other library as it was."""

import subprocess
import sys

import child_process

CODE = (
    child_process.PRELUDE
    + """
import datasets, flax, numpy, optax, peft, safetensors, torch, transformers, tiny_chat
OTHERS = ("torch", "transformers", "peft", "jax", "flax", "optax", "datasets", "numpy")

def values():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in OTHERS or module is None:
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found |= {(name, key, k): id(v) for k, v in list(vars(value).items())}
    return found

folder = tiny_chat.save(Path(sys.argv[1]))
other = tiny_chat.reference(folder)
before = values()
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
model, tokenizer = tiny_chat.load(folder)
FastLanguageModel.get_peft_model(model, r=4)
args = SFTConfig(
    max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_length=64,
    save_strategy="no", output_dir=sys.argv[2],
)
SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=tiny_chat.MESSAGES, args=args).train()
model.save_pretrained_merged(sys.argv[2] + "/merged", tokenizer)
after = values()
functions = lambda key: callable(getattr(sys.modules[key[0]], key[1], None))
changed = sorted(k for k in before if k in after and before[k] != after[k] and functions(k))
print("compared", len(before))
print("changed", [".".join(key) for key in changed])
"""
)


def test_importing_and_training_change_nothing_of_other_libraries(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model"), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    compared, changed = (line for line in done.stdout.splitlines() if line.startswith("c"))
    assert int(compared.split()[1]) > 10_000
    assert changed == "changed []"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
