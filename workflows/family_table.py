"""Writes the table of docs/families.md from what `make figures` measured.

python -m workflows.family_table docs/families.md
"""

import json
import re
import sys
from pathlib import Path

from unsloth_jax.models import FAMILIES
from workflows.marked import between

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
LINES = "<!-- lines: begin -->", "<!-- lines: end -->"
SIZED = ("ministral3", "cohere2", "mixtral", "qwen3_next")  # files whose lengths the page tells
FIGURES = Path(__file__).parents[1] / "docs" / "results" / "parity.json"
# Column -> how the figure's name begins; behind it stands the model_type.
MEASURED = {
    "logits": "logits against transformers",
    "packed": "packed rows against separate ones",
    "decode": "scores through the cache",
    "LoRA gradients": "gradient of every LoRA pair against PEFT",
    "4-bit file": "logits of bitsandbytes' 4-bit file",
    "PEFT": "our adapter's logits in PEFT",
    "merge": "logits of merged weights",
}
TOLD = {
    "deepseek_v3": "whole keys and values in the cache, not the latent; heads of 192: on a GPU "
    "attention goes through XLA, with all scores in memory; layers that predict further tokens "
    "are left out of files; no fp8 files; no GGUF of Moonlight's tokenizer",
    "exaone4": "GGUF with windows for 64 layers alone, as llama.cpp has it",
    "falcon_h1": "no adapter for Mamba's `out_proj`, which PEFT refuses; read from GGUF with "
    "factors of 1",
    "gemma": "heads of 256: on a GPU attention goes through XLA, with all scores in memory",
    "gemma2": "soft-caps: on a GPU attention goes through XLA, with all scores in memory",
    "gemma3_text": "text only; heads of 256, as gemma",
    "glm4_moe": "layers that predict further tokens are left out of files",
    "gpt_oss": "MXFP4 is dequantized when read, and not written; Unsloth's bnb-4bit files, whose "
    "experts are linear modules, are refused; in GGUF no MXFP4, and llama.cpp rounds the ends "
    "of yarn's ramp, which is told",
    "llama": "see [performance](performance.md)",
    "llama4_text": "text only; as transformers: experts in bitsandbytes' files one by one or in 16 "
    "bits; no adapters or 4 bits of routers",
    "ministral3": "text only",
    "phi3": "LongRoPE's factors by a document's length; no windows in GGUF, which is told",
    "qwen3_5_text": "text only; `mtp` weights are left alone, as in transformers",
    "qwen3_next": "`mtp` weights are left alone, as in transformers",
    "starcoder2": "dropout of the base, 0.1 in its configs, is not applied; windows as phi3",
}


def figures(path: Path = FIGURES) -> dict[str, dict[str, float]]:
    """{model_type: {column: the worst that was measured}}."""
    out: dict[str, dict[str, float]] = {name: {} for name in FAMILIES}
    for row in json.loads(path.read_text())["figures"]:
        for column, start in MEASURED.items():
            found = re.fullmatch(f"{re.escape(start)}, (\\w+)(, .*)?", row["what"])
            if found and found[1] in out:
                own = out[found[1]]
                own[column] = max(row["measured"], own.get(column, 0.0))
    return out


def table(path: Path = FIGURES) -> str:
    """A line a family; raises ValueError for one that lacks a figure."""
    lines = ["| family | models | " + " | ".join(MEASURED) + " | GGUF | limits |"]
    lines.append("|---" * (len(MEASURED) + 4) + "|")
    for name, own in figures(path).items():
        missing = [column for column in MEASURED if column not in own]
        if missing:
            raise ValueError(f"{path} has no figures of {name} for {missing}: run `make figures`")
        models = FAMILIES[name].__doc__.splitlines()[0].partition(":")[0]
        gguf = getattr(FAMILIES[name], "GGUF_ARCH", "refused")
        cells = [f"{own[column]:.1e}" for column in MEASURED]
        told = TOLD.get(name, "none known")
        lines.append("| " + " | ".join([f"`{name}`", models, *cells, gguf, told]) + " |")
    return "\n".join(lines) + "\n"


def filled(text: str, path: Path = FIGURES) -> str:
    """The page with its table anew; raises ValueError where it has no place."""
    count = lambda name: len(Path(FAMILIES[name].__file__).read_text("utf-8").splitlines())
    lengths = ", ".join(f"{count(name)} lines (`{name}`)" for name in SIZED)
    return between(between(text, BEGIN, END, f"\n\n{table(path)}\n"), *LINES, lengths)


def main(line: list[str]) -> None:
    (name,) = line
    page = Path(name)
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
