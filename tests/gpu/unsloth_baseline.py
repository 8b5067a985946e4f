"""What Unsloth does on this GPU, for a side-by-side: QLoRA steps and generation, random weights.

Needs unsloth, bitsandbytes and, for its fastest attention, xformers (PYTHONPATH may name their
folder). Prints and appends a line of JSON for each measurement; what is in the file is skipped.

    python tests/gpu/unsloth_baseline.py make --folder /dev/shm/llama-8b
    python tests/gpu/unsloth_baseline.py train --folder /dev/shm/llama-8b --output unsloth.jsonl
    python tests/gpu/unsloth_baseline.py generate --folder /dev/shm/llama-8b --output unsloth.jsonl

Each pair of attention and gradient checkpointing runs in a process of its own. Memory is torch's
peak after warm-up, weights included, and the pinned host memory beside it.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu import bnb_checkpoint

from workflows.bench import configs, lengths, rows

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    UNSLOTH_DISABLE_STATISTICS="1",
    UNSLOTH_COMPILE_LOCATION="/tmp/unsloth_cache",
)

MODES: dict[str, str | bool] = {"unsloth": "unsloth", "true": True, "false": False}
ATTENTIONS = ("xformers", "sdpa")
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
GIB = 2**30
START_S = 60  # a process that has less time than this is not started
MISSING = 3  # exit status of a process whose attention could not be had


class Case(NamedTuple):
    """One shape to train on; packed rows are given without padding, as Unsloth packs."""

    batch: int
    length: int
    packed: bool

    @property
    def size(self) -> int:
        return self.batch * self.length


def prepare(attention: str) -> None:
    """Makes `import unsloth` find xformers, or not; to be called before that import."""
    if attention == "sdpa":
        sys.modules["xformers"] = None  # the way to say that a package isn't there
        return
    # The wheel is built for CUDA 12's runtime, which a torch for CUDA 13 does not load.
    places = (Path(p) / "nvidia/cuda_runtime/lib/libcudart.so.12" for p in sys.path)
    library = next((p for p in places if p.exists()), None)
    if library is not None:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def roads() -> dict[str, Any]:
    """Which attention Unsloth takes for rows of one and of several documents, and what it found."""
    from unsloth.utils import attention_dispatch as dispatch

    taken = {
        "dense": dispatch.select_attention_backend(use_varlen=False),
        "packed": dispatch.select_attention_backend(use_varlen=True),
        "xformers": dispatch.HAS_XFORMERS,
        "flash_attn": dispatch.HAS_FLASH_ATTENTION,
        "torch_varlen": dispatch._TORCH_VARLEN_ATTN is not None,
    }
    if dispatch.HAS_XFORMERS:
        from xformers.ops import fmha

        taken["kernel"] = fmha.flash.FwOp.NAME
    return taken


def load(a: argparse.Namespace):
    """(FastLanguageModel, the model with its adapters, ready to train)."""
    import torch
    from unsloth import FastLanguageModel

    mode = MODES[a.modes]
    longest = max(case.length for case in cases(a))
    model, _ = FastLanguageModel.from_pretrained(
        str(a.folder), max_seq_length=longest, load_in_4bit=True, dtype=torch.bfloat16,
        use_gradient_checkpointing=mode,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=a.rank, lora_alpha=a.rank, lora_dropout=0, bias="none", random_state=3407,
        target_modules=TARGETS, use_gradient_checkpointing=mode, max_seq_length=longest,
    )  # fmt: skip
    model.for_training(use_gradient_checkpointing=mode)
    return FastLanguageModel, model


def batches(
    case: Case, vocabulary: int, steps: int, device: str = "cuda"
) -> Iterator[tuple[dict[str, Any], int]]:
    """(arguments of the model, how many of its tokens are no padding) for each step."""
    import torch

    bins = lengths.packed(case.batch, case.length)
    for step in range(steps):
        ids = torch.tensor(lengths.tokens(case.batch, case.length, vocabulary, step)).long()
        if not case.packed:
            yield {"input_ids": ids.to(device), "labels": ids.to(device)}, ids.numel()
            continue
        sizes = list(itertools.chain.from_iterable(next(bins)))
        # One row of whole documents: what Unsloth's collator makes of a packed batch.
        ids = ids.reshape(1, -1)[:, : sum(sizes)].to(device)
        positions = torch.cat([torch.arange(n) for n in sizes])[None].to(device)
        labels = ids.masked_fill(positions == 0, -100)
        counts = torch.tensor(sizes, dtype=torch.int32)
        packed = {"position_ids": positions, "packed_seq_lengths": counts}
        yield {"input_ids": ids, "labels": labels} | packed, ids.numel()


def measured(model, optimizer, case: Case, a: argparse.Namespace) -> dict[str, Any]:
    """Median step time, tokens/s and peaks of one case, or that it did not fit."""
    import torch

    seconds, speeds, losses = [], [], []
    vocabulary = configs.config(a.shape)["vocab_size"]
    try:
        for step, (batch, useful) in enumerate(batches(case, vocabulary, a.warmup + a.steps)):
            if step == a.warmup:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            speeds.append(useful / seconds[-1])
            losses.append(loss.item())
    except torch.OutOfMemoryError:
        return {"fits": False}
    return {
        "fits": True,
        "ms": statistics.median(seconds[a.warmup :]) * 1e3,
        "tokens_per_s": statistics.median(speeds[a.warmup :]),
        "all_ms": [round(s * 1e3, 1) for s in seconds],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "pinned_gib": pinned() / GIB,
        "losses": losses,
    }


def pinned() -> int:
    """Pinned host bytes at their peak, as torch's allocator holds them."""
    import torch

    return torch.cuda.host_memory_stats()["allocated_bytes.peak"]


def key(case: Case, attention: str, mode: str, a: argparse.Namespace) -> dict[str, Any]:
    what = {"who": "unsloth", "what": "train", "shape": a.shape, "rank": a.rank}
    return what | {"attention": attention, "policy": mode} | case._asdict()


def cases(a: argparse.Namespace) -> list[Case]:
    """Cases in the order of their size, so that buffers that grow are no larger than needed."""
    plain = [Case(*shape, False) for shape in lengths.shapes(a.shapes)] if a.shapes else []
    packed = [Case(*shape, True) for shape in lengths.shapes(a.packed)] if a.packed else []
    return sorted(plain + packed, key=lambda case: case.size)


def child(a: argparse.Namespace) -> int:
    """Measures every case that is not in the file yet, with one attention and one mode.

    MISSING where Unsloth does not take the attention that was asked for.
    """
    end = time.monotonic() + a.budget_s
    prepare(a.attention)
    taken = roads()
    print("attention:", taken, flush=True)
    if taken["xformers"] != (a.attention == "xformers"):
        return MISSING
    _, model = load(a)
    import torch
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    loaded = {"loaded_gib": torch.cuda.memory_allocated() / GIB, "roads": taken}
    for case in cases(a):
        what = key(case, a.attention, a.modes, a)
        if rows.find(rows.read(a.output), what) or time.monotonic() > end:
            continue
        found = what | measured(model, optimizer, case, a) | loaded | rows.facts()
        rows.append(a.output, found)
        print(json.dumps(found), flush=True)
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def train(a: argparse.Namespace) -> int:
    """A process for each pair of attention and mode with something left; 1 if one failed."""
    end, failed, missing = time.monotonic() + a.budget_s, 0, set()
    for attention, mode in itertools.product(a.attention.split(","), a.modes.split(",")):
        if attention not in ATTENTIONS or mode not in MODES:
            raise ValueError(f"{attention}, {mode}: known are {ATTENTIONS} and {list(MODES)}")
        known = rows.read(a.output)
        if attention in missing or all(
            rows.find(known, key(case, attention, mode, a)) for case in cases(a)
        ):
            continue
        left = end - time.monotonic()
        if left < START_S:
            print(f"no time left for {attention} with {mode}", flush=True)
            return 1
        options = ["--attention", attention, "--modes", mode, "--budget-s", str(left - 20)]
        passed = ["folder", "output", "shape", "shapes", "packed", "rank", "steps", "warmup"]
        for name in passed:
            options += [f"--{name}", str(getattr(a, name))]
        command = [sys.executable, __file__, "child", *options]
        try:
            status = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print(f"{attention} with {mode} was stopped: its time was up", flush=True)
            return 1
        if status == MISSING:
            print(f"{attention} could not be had", flush=True)
            missing.add(attention)
        failed |= status != 0
    return failed


def generate(a: argparse.Namespace) -> None:
    """Tokens/s of greedy decoding, the second of two runs, for each batch size."""
    import torch

    prepare("sdpa")
    a.modes = "unsloth"
    fast, model = load(a)
    fast.for_inference(model)
    vocabulary = configs.config(a.shape)["vocab_size"]
    for batch in map(int, a.batches.split(",")):
        ids = torch.tensor(lengths.tokens(batch, a.prompt, vocabulary, 0)).long().cuda()
        options = dict(max_new_tokens=a.new, min_new_tokens=a.new, do_sample=False)
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        what = {"who": "unsloth", "what": "generate", "shape": a.shape, "batch": batch}
        found = what | {"prompt": a.prompt, "new": a.new, "tokens_per_s": batch * a.new / seconds}
        rows.append(a.output, found | rows.facts())
        print(json.dumps(found), flush=True)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("verb", choices=["make", "train", "child", "generate"])
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--output", type=Path, default=Path("unsloth.jsonl"))
    p.add_argument("--tokenizer", type=Path, default=bnb_checkpoint.TOKENIZER)
    p.add_argument("--shape", default="llama-8b", help=f"of {list(configs.CONFIGS)} or a path")
    p.add_argument("--shapes", default="2x2048,4x2048,8x2048,1x8192,1x16384")
    p.add_argument("--packed", default="4x2048")
    p.add_argument("--modes", default="unsloth,true,false", help="gradient checkpointing")
    p.add_argument("--attention", default="xformers,sdpa")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--budget-s", type=float, default=540)
    p.add_argument("--batches", default="1,8,32")
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--new", type=int, default=128)
    return p.parse_args()


def main() -> int:
    a = arguments()
    if a.verb == "make":
        bnb_checkpoint.make(a.folder, a.shape, a.tokenizer)
    return {"train": train, "child": child, "generate": generate}.get(a.verb, lambda a: 0)(a) or 0


if __name__ == "__main__":
    sys.exit(main())
