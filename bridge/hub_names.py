"""Hub names as Unsloth's users type them: which repo is read for a name and a width.

Rules, not a list of models: Unsloth names a copy in bitsandbytes' 4 bits after its 16-bit parent.
"""

import os
import re
from pathlib import Path

OWNER = "unsloth"
FOUR_BIT = re.compile(r"(unsloth/[^/]+?)(-unsloth)?-bnb-4bit", re.IGNORECASE)
# Parents that lie elsewhere, since Unsloth copied their 4-bit weights alone. By lower-case name.
PARENTS = {
    "unsloth/c4ai-command-r-08-2024": "CohereForAI/c4ai-command-r-08-2024",
    "unsloth/c4ai-command-r-plus-08-2024": "CohereForAI/c4ai-command-r-plus-08-2024",
    "unsloth/codellama-13b": "codellama/CodeLlama-13b-hf",
    "unsloth/codellama-34b": "codellama/CodeLlama-34b-hf",
    "unsloth/hermes-3-llama-3.1-405b": "NousResearch/Hermes-3-Llama-3.1-405B",
    "unsloth/llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "unsloth/llama-3-70b-instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "unsloth/meta-llama-3.1-405b": "meta-llama/Meta-Llama-3.1-405B",
    "unsloth/meta-llama-3.1-405b-instruct": "meta-llama/Meta-Llama-3.1-405B-Instruct",
    "unsloth/mistral-large-instruct-2407": "mistralai/Mistral-Large-Instruct-2407",
    "unsloth/solar-10.7b": "upstage/SOLAR-10.7B-v1.0",
}
# Owners of gated repos, and copies that are not called like what they are copies of.
GATED = ("meta-llama", "google", "mistralai", "CohereForAI", "CohereLabs")
COPIES = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-7b-chat-hf": "llama-2-7b-chat",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b-Instruct",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
}


def parent(name: str) -> str | None:
    """The 16-bit repo of one of Unsloth's 4-bit repos, None for any other name."""
    found = FOUR_BIT.fullmatch(name)
    return PARENTS.get(found[1].lower(), found[1]) if found else None


def read_as(name: str, fmt: str | None) -> str:
    """The name that is read where layers are to have the format `fmt`, None being 16 bits.

    That is `name`, or the parent of a 4-bit repo where no 4 bits are asked for. What is on this
    machine goes by its own name.
    """
    if fmt == "nf4" or os.path.exists(Path(name).expanduser()):
        return name
    return parent(name) or name


def copy_of(name: str) -> str | None:
    """What Unsloth's ungated copy of a gated repo is called by its rule, else None."""
    owner, _, model = name.partition("/")
    if owner not in GATED:
        return None
    return f"{OWNER}/{COPIES.get(name, model)}"
