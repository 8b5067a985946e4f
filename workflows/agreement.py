"""Whether llama.cpp, given a finished GGUF file, says what the merged model would have said.

llama.cpp continues fixed prompts greedily. The merged weights, as they were before any file was
written, score each of its tokens in float32: a token that is not their likeliest is a near tie that
rounding decided, or the file is wrong.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge import hf
from bridge.safetensors_file import Weight
from bridge.source import Header
from workflows import divergence, llama_cpp
from workflows.keywords import tell

if TYPE_CHECKING:
    from workflows.model import Model

NEW_TOKENS = 32
# By type of tensor, the most that a token of llama.cpp's may lie below the likeliest, in standard
# deviations of the scores: a floor, or so many times what bfloat16 makes of this model's scores.
# Random models of 12 layers reached 0.5 (F16), 5 (BF16) and 29 (Q8_0) times that. Other types
# answer otherwise too often to tell.
BOUNDS = {"F32": 0.005, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.5}
TIMES = {"F32": 0.02, "F16": 1.0, "BF16": 8.0, "Q8_0": 45.0}
VAGUE = 2.0  # a bound that anything keeps
FEW = 2  # texts by which a model's rounding is measured
# A mixture's router decides between experts whose scores may lie closer together than rounding
# moves them; its token is then another model's. Rounding is drawn that often, by type as so large a
# share of what each layer is given: twice what the type makes of weights and of activations, which
# llama.cpp rounds too (a random qwen3_moe's scores move by 0.025 deviations with Q8_0's weights
# alone, by 0.054 with this). F32 rounds nothing.
DRAWS = 32
NOISE = {"F32": 0.0, "F16": 0.0006, "BF16": 0.005, "Q8_0": 0.02}
REROUTED = 0.05  # the most of all tokens that other experts may explain


class Held(NamedTuple):
    """Weights that are computed when they are read, as a `bridge.source.Source`."""

    config: dict[str, Any]
    weights: Mapping[str, Weight]

    def headers(self) -> dict[str, Header]:
        return {name: Header(w.shape, w.dtype.name) for name, w in self.weights.items()}

    def read(self, name: str) -> np.ndarray:
        return self.weights[name].read()


class Scores(NamedTuple):
    """Of each token [B, N]: the likeliest one, and how far below it the token is, in deviations.

    `rounding` is the median over tokens of the first texts of what bfloat16 changes in the scores,
    root mean square.
    """

    likeliest: np.ndarray
    gap: np.ndarray
    rounding: float


class Agreement(NamedTuple):
    """Of one file: new tokens, those that are the merged model's likeliest, the largest gap.

    The gap is that of the tokens that no other choice of experts explains.
    """

    prompts: int
    new_tokens: int
    equal: int
    largest_gap: float
    bound: float | None  # None where a type has none, or rounding alone may change all answers
    rerouted: int = 0  # tokens of a mixture that lie below the bound if rounding picks its experts

    def facts(self) -> dict[str, Any]:
        return self._asdict()


def run(
    model: "Model",
    weights: Iterable[Weight],
    config: dict[str, Any],
    files: Mapping[Path, Iterable[str]],
    wanted: bool = True,
) -> dict[str, dict[str, Any]]:
    """What the manifest says of llama.cpp by file name, told too; `files` have their types.

    Nothing is run where it isn't wanted or can't be, which is told. Raises ValueError as `checked`.
    """
    why = _not_run(config, wanted)
    if why is not None:
        return _told(files, why)
    source = Held(config, {w.name: w for w in weights})
    try:
        found = checked(source, divergence.prompts(model), files)
    except llama_cpp.NotRun as error:
        return _told(files, str(error))
    for name, it in found.items():
        bound = "no bound here" if it.bound is None else f"at most {it.bound:.2f} is rounding"
        tell(
            f"{name}: llama.cpp's greedy tokens are the merged model's likeliest at {it.equal} of "
            f"{it.new_tokens} places, at worst {it.largest_gap:.3f} standard deviations below "
            f"({bound})" + (f"; {it.rerouted} more by other experts" if it.rerouted else "")
        )
    return {name: {"llama_cpp": it.facts()} for name, it in found.items()}


def _told(files: Iterable[Path], why: str) -> dict[str, dict[str, Any]]:
    tell(f"{', '.join(path.name for path in files)}: not run in llama.cpp: {why}")
    return {path.name: {"llama_cpp_not_run": why} for path in files}


def _not_run(config: dict[str, Any], wanted: bool) -> str | None:
    if not wanted:
        return "run_in_llama_cpp=False"
    # llama.cpp lets tokens see beyond a window, which GGUF's notes tell; most are far longer.
    windows = [w for w in hf.described(Held(config, {}))[1].windows if w is not None]
    room, needed = (
        min([config["max_position_embeddings"], *windows]),
        divergence.PROMPT + NEW_TOKENS,
    )
    if room < needed:
        return f"the model's context or window has {room} tokens, the check takes {needed}"
    return llama_cpp.absent()


def checked(
    source: Any, prompts: np.ndarray, files: Mapping[Path, Iterable[str]]
) -> dict[str, Agreement]:
    """llama.cpp's greedy answers to `prompts` [P, T], judged by `source`, by file name.

    Weights are read once, whatever the number of files. Raises ValueError naming file, prompt,
    place, both tokens, gap and bound for a gap that rounding does not explain, and where llama.cpp
    fails.
    """
    said = {path: llama_cpp.greedy(path, prompts.tolist(), NEW_TOKENS) for path in files}
    texts = [np.concatenate([prompts, answer.tokens], axis=1) for answer in said.values()]
    barred = sorted({token for answer in said.values() for token in answer.barred})
    scores = scored(source, np.concatenate(texts).astype(np.int32), prompts.shape[1], barred)
    out = {}
    for i, (path, types) in enumerate(files.items()):
        rows = slice(i * len(prompts), (i + 1) * len(prompts))
        mine = Scores(scores.likeliest[rows], scores.gap[rows], scores.rounding)
        bound = bound_of(types, scores.rounding)
        other = rerouted(source, texts[i], mine.gap, bound, barred, types)
        left = np.where(other, 0, mine.gap)
        _refuse(path.name, mine, left, said[path].tokens, bound)
        equal, largest = int((mine.gap == 0).sum()), float(left.max())
        sizes = len(prompts), mine.gap.size
        out[path.name] = Agreement(*sizes, equal, largest, bound, int(other.sum()))
    return out


def rerouted(
    source: Any,
    texts: np.ndarray,
    gap: np.ndarray,
    bound: float | None,
    barred: Sequence[int],
    types: Iterable[str],
) -> np.ndarray:
    """Which of the last tokens of `texts` [P, T] rounding explains by another choice of experts.

    These have a `gap` [P, N] over the bound in a mixture, and within it in a draw of rounding.
    All False where they are more than rounding turns over.
    """
    out = np.zeros(gap.shape, bool)
    noise = max(NOISE.get(kind, 0.0) for kind in types)
    mixture = getattr(hf.described(source)[1], "experts", 1) > 1
    if bound is None or not mixture or not noise or (gap > bound).sum() > REROUTED * gap.size:
        return out
    for row in np.flatnonzero((gap > bound).any(1)):
        drawn = np.repeat(texts[row : row + 1], DRAWS, 0).astype(np.int32)
        found = scored(source, drawn, texts.shape[1] - gap.shape[1], barred, noise)
        out[row] = (gap[row] > bound) & (found.gap.min(0) <= bound)
    return out


def bound_of(types: Iterable[str], rounding: float) -> float | None:
    """That of the coarsest type in a file, None where there is none."""
    kinds = set(types)
    if not kinds <= BOUNDS.keys():
        return None
    bound = max(max(BOUNDS[kind], TIMES[kind] * rounding) for kind in kinds)
    return None if bound > VAGUE else bound


def scored(
    source: Any, tokens: np.ndarray, start: int, barred: Sequence[int], noise: float = 0.0
) -> Scores:
    """The checkpoint `source` on tokens [B, T] from `start` on, each given all before it.

    `noise` is that of `divergence.parts`, another for each row. `barred` tokens count as
    impossible. Raises ValueError for scores that are not finite.
    """
    given = tokens[:, start:]
    best, mine = np.full(given.shape, -np.inf), np.full(given.shape, np.nan)
    likeliest, at = np.zeros_like(given), 0
    total, squares, count = np.zeros(given.shape), np.zeros(given.shape), 0
    changed = np.zeros(given[:FEW].shape)
    with jax.default_matmul_precision("highest"):
        run = lambda dtype, rows: divergence.parts(source, dtype, rows[:, :-1], start - 1, noise)
        both = zip(run(jnp.float32, tokens), run(jnp.bfloat16, tokens[:FEW]), strict=True)
        for part, rough in both:
            here = [i for i in range(part.shape[-1]) if at + i not in barred]
            some = part[..., here].astype(np.float64)
            top = np.asarray(here)[some.argmax(-1)]
            likeliest = np.where(some.max(-1) > best, at + top, likeliest)
            best = np.maximum(best, some.max(-1))
            total, squares = total + some.sum(-1), squares + np.square(some).sum(-1)
            changed += np.square(rough[..., here] - some[:FEW]).sum(-1)
            inside = (given >= at) & (given < at + part.shape[-1])
            place = np.where(inside, given - at, 0)[..., None]
            mine = np.where(inside, np.take_along_axis(part, place, -1)[..., 0], mine)
            count, at = count + len(here), at + part.shape[-1]
    deviation = np.sqrt(squares / count - np.square(total / count))
    gap = (best - mine) / deviation
    if not np.isfinite(gap).all():
        raise ValueError("the merged model's scores of llama.cpp's tokens are not finite")
    rounding = np.median(np.sqrt(changed / count) / deviation[:FEW])
    return Scores(likeliest, gap, float(rounding))


def _refuse(
    name: str,
    found: Scores,
    gap: np.ndarray,
    tokens: Sequence[Sequence[int]],
    bound: float | None,
) -> None:
    """Raises ValueError for a gap of those that are left over the bound."""
    if bound is None or gap.max() <= bound:
        return
    prompt, place = np.unravel_index(gap.argmax(), gap.shape)
    raise ValueError(
        f"{name}: llama.cpp says token {tokens[prompt][place]} where the merged model says "
        f"{found.likeliest[prompt, place]}: prompt {prompt + 1}, new token {place + 1}, "
        f"{found.gap[prompt, place]:.3f} standard deviations of the scores below it, rounding "
        f"explains {bound:.3f}; {(found.gap == 0).sum()} of {found.gap.size} tokens are equal; "
        f"{llama_cpp.LEFT_OUT}"
    )
