"""Names that Unsloth's users type: which repo is read, and where that differs from Unsloth's."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny_chat
from huggingface_hub.errors import GatedRepoError
from test_hub import COMMIT

from bridge import hub, hub_names
from unsloth_jax import FastLanguageModel
from workflows import dry_run, keywords, widths

FOUR, EIGHT, SIXTEEN = "nf4", "int8", None

# Unsloth's own cases (its tests/test_get_model_name.py): name, whether 4 bits are asked for, its
# answer. Names are compared as Unsloth does, whatever their case.
SAME = [
    ("mistralai/Ministral-8B-Instruct-2410", True, "mistralai/Ministral-8B-Instruct-2410"),
    ("unsloth/Kimi-K2-Instruct", False, "unsloth/Kimi-K2-Instruct"),
    ("nonexistent-user/nonexistent-model-123", True, "nonexistent-user/nonexistent-model-123"),
    ("google/gemma-3-random-prototype-123", True, "google/gemma-3-random-prototype-123"),
    ("imdatta0/nanoqwen-fp8", True, "imdatta0/nanoqwen-fp8"),
    ("imdatta0/nanoqwen-bf16", True, "imdatta0/nanoqwen-bf16"),
    ("unsloth/llama-2-7b-bnb-4bit", True, "unsloth/llama-2-7b-bnb-4bit"),
    ("unsloth/llama-2-7b-bnb-4bit", False, "unsloth/llama-2-7b"),
    ("unsloth/gpt-oss-20b-bf16", True, "unsloth/gpt-oss-20b-bf16"),
    ("unsloth/gpt-oss-20b-unsloth-bnb-4bit", False, "unsloth/gpt-oss-20b"),
    ("unsloth/gpt-oss-20b-bnb-4bit", True, "unsloth/gpt-oss-20b-bnb-4bit"),
]
# Where Unsloth reads another repo and we the one that was named (docs/decisions.md).
QUANTIZED_HERE = [  # a 16-bit name with 4 bits: quantized here, Unsloth reads its 4-bit copy
    ("meta-llama/Llama-2-7b-hf", "unsloth/llama-2-7b-bnb-4bit"),
    ("meta-llama/Llama-2-7b-chat-hf", "unsloth/llama-2-7b-chat-bnb-4bit"),
    ("meta-llama/Llama-3.3-70B-Instruct", "unsloth/Llama-3.3-70B-Instruct-unsloth-bnb-4bit"),
    ("Qwen/Qwen3-8B", "unsloth/Qwen3-8B-unsloth-bnb-4bit"),
    ("mistralai/Ministral-3-3B-Instruct-2512",
     "unsloth/Ministral-3-3B-Instruct-2512-unsloth-bnb-4bit"),
    ("allenai/Olmo-3-7B-Instruct", "unsloth/Olmo-3-7B-Instruct-unsloth-bnb-4bit"),
    ("allenai/Olmo-3-7B-Think", "unsloth/Olmo-3-7B-Think-unsloth-bnb-4bit"),
    ("allenai/Olmo-3-32B-Think", "unsloth/Olmo-3-32B-Think-unsloth-bnb-4bit"),
    ("agentica-org/DeepScaleR-1.5B-Preview",
     "unsloth/DeepScaleR-1.5B-Preview-unsloth-bnb-4bit"),
    ("google/gemma-2-9b", "unsloth/gemma-2-9b-bnb-4bit"),
    ("openai/gpt-oss-20b", "unsloth/gpt-oss-20b-unsloth-bnb-4bit"),
    ("unsloth/gpt-oss-20b", "unsloth/gpt-oss-20b-unsloth-bnb-4bit"),
]  # fmt: skip
AS_NAMED = [  # a vendor's 16-bit repo: the vendor's own, Unsloth reads its copy
    ("meta-llama/Llama-2-7b-hf", "unsloth/llama-2-7b"),
    ("meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B-Instruct"),
    ("Qwen/Qwen3-8B", "unsloth/Qwen3-8B"),
    ("mistralai/Ministral-3-3B-Instruct-2512", "unsloth/Ministral-3-3B-Instruct-2512"),
    ("allenai/Olmo-3-7B-Instruct", "unsloth/Olmo-3-7B-Instruct"),
    ("allenai/Olmo-3-7B-Think", "unsloth/Olmo-3-7B-Think"),
    ("allenai/Olmo-3-32B-Think", "unsloth/Olmo-3-32B-Think"),
    ("agentica-org/DeepScaleR-1.5B-Preview", "unsloth/DeepScaleR-1.5B-Preview"),
    ("openai/gpt-oss-20b", "unsloth/gpt-oss-20b"),
]
NOT_READ = [  # repos in fp8, a format that is not read, whichever copy it is
    ("Qwen/Qwen3-8B-FP8", False, "unsloth/Qwen3-8B-FP8"),
    ("Qwen/Qwen3-8B-FP8", True, "unsloth/Qwen3-8B-unsloth-bnb-4bit"),
    ("unsloth/Kimi-K2-Instruct", True, "unsloth/Kimi-K2-Instruct-BF16"),
]


@pytest.mark.parametrize("name, four, theirs", SAME)
def test_names_are_read_as_unsloth_reads_them(name, four, theirs):
    assert hub_names.read_as(name, FOUR if four else SIXTEEN).lower() == theirs.lower()


@pytest.mark.parametrize("name, theirs", QUANTIZED_HERE)
def test_a_16_bit_name_is_quantized_here(name, theirs):
    assert hub_names.read_as(name, FOUR) == name
    # What Unsloth would read is taken too, by its name, and leads back to 16 bits.
    assert hub_names.read_as(theirs, FOUR) == theirs
    assert hub_names.parent(theirs) == hub_names.read_as(theirs, SIXTEEN)
    assert hub_names.parent(theirs).startswith("unsloth/") and "4bit" not in hub_names.parent(
        theirs
    )


@pytest.mark.parametrize("name, theirs", AS_NAMED)
def test_a_vendors_repo_is_read_as_named(name, theirs):
    assert hub_names.read_as(name, SIXTEEN) == hub_names.read_as(name, EIGHT) == name
    assert hub_names.read_as(theirs, SIXTEEN) == theirs


@pytest.mark.parametrize("name, four, theirs", NOT_READ)
def test_repos_in_fp8_are_read_as_named(name, four, theirs):
    assert hub_names.read_as(name, FOUR if four else SIXTEEN) == name != theirs


# Repos of families that are here or on their way, and the 16-bit parents that Unsloth names.
PARENTS = {
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": "unsloth/Llama-3.2-1B-Instruct",
    "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit": "unsloth/Llama-3.2-1B-Instruct",
    "unsloth/llama-3-8b-bnb-4bit": "unsloth/llama-3-8b",
    "unsloth/llama-3-70b-bnb-4bit": "meta-llama/Meta-Llama-3-70B",
    "unsloth/llama-3-70b-Instruct-bnb-4bit": "meta-llama/Meta-Llama-3-70B-Instruct",
    "unsloth/Meta-Llama-3.1-405B-bnb-4bit": "meta-llama/Meta-Llama-3.1-405B",
    "unsloth/codellama-34b-bnb-4bit": "codellama/CodeLlama-34b-hf",
    "unsloth/solar-10.7b-bnb-4bit": "upstage/SOLAR-10.7B-v1.0",
    "unsloth/mistral-7b-instruct-v0.3-bnb-4bit": "unsloth/mistral-7b-instruct-v0.3",
    "unsloth/Mistral-Large-Instruct-2407-bnb-4bit": "mistralai/Mistral-Large-Instruct-2407",
    "unsloth/Ministral-3-8B-Base-2512-unsloth-bnb-4bit": "unsloth/Ministral-3-8B-Base-2512",
    "unsloth/Qwen2.5-Coder-7B-Instruct-bnb-4bit": "unsloth/Qwen2.5-Coder-7B-Instruct",
    "unsloth/Qwen3-14B-unsloth-bnb-4bit": "unsloth/Qwen3-14B",
    "unsloth/gemma-2b-bnb-4bit": "unsloth/gemma-2b",
    "unsloth/gemma-3-270m-it-unsloth-bnb-4bit": "unsloth/gemma-3-270m-it",
    "unsloth/phi-4-unsloth-bnb-4bit": "unsloth/phi-4",
    "unsloth/granite-4.0-micro-unsloth-bnb-4bit": "unsloth/granite-4.0-micro",
    "unsloth/c4ai-command-r-08-2024-bnb-4bit": "CohereForAI/c4ai-command-r-08-2024",
    "unsloth/OLMo-2-0325-32B-Instruct-unsloth-bnb-4bit": "unsloth/OLMo-2-0325-32B-Instruct",
    "unsloth/DeepScaleR-1.5B-Preview-unsloth-bnb-4bit": "unsloth/DeepScaleR-1.5B-Preview",
    "unsloth/Mixtral-8x7B-v0.1-unsloth-bnb-4bit": "unsloth/Mixtral-8x7B-v0.1",
    "unsloth/Qwen3-30B-A3B-bnb-4bit": "unsloth/Qwen3-30B-A3B",
    "unsloth/gpt-oss-120b-unsloth-bnb-4bit": "unsloth/gpt-oss-120b",
    "Unsloth/LLAMA-3-70B-BNB-4bit": "meta-llama/Meta-Llama-3-70B",
}


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("fmt", [EIGHT, SIXTEEN])
def test_a_4_bit_repo_stands_for_its_parent_where_4_bits_are_not_asked_for(name, fmt):
    assert hub_names.read_as(name, fmt) == hub_names.parent(name) == PARENTS[name]
    assert hub_names.read_as(name, FOUR) == name


@pytest.mark.parametrize(
    "name",
    ["someone/model-bnb-4bit", "unsloth/model-4bit", "unsloth/a/b-bnb-4bit", "unsloth/-bnb-4bit",
     "unsloth/model-GGUF", "model-bnb-4bit", "unsloth/model-bnb-4bit/x.gguf"],
)  # fmt: skip
def test_names_that_no_rule_of_unsloths_made_are_left_alone(name):
    assert hub_names.parent(name) is None
    assert hub_names.read_as(name, SIXTEEN) == name


def test_a_local_folder_goes_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "unsloth" / "model-bnb-4bit").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_names.read_as("unsloth/model-bnb-4bit", SIXTEEN) == "unsloth/model"
    monkeypatch.chdir(tmp_path)
    assert hub_names.read_as("unsloth/model-bnb-4bit", SIXTEEN) == "unsloth/model-bnb-4bit"


@pytest.mark.parametrize(
    "name, copy",
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B-Instruct"),
        ("meta-llama/Llama-2-7b-hf", "unsloth/llama-2-7b"),
        ("mistralai/Mistral-7B-v0.1", "unsloth/mistral-7b"),
        ("google/gemma-2-9b", "unsloth/gemma-2-9b"),
        ("someone/model", None),
    ],
)
def test_a_gated_repo_is_refused_with_unsloths_copy(monkeypatch, name, copy):
    assert hub_names.copy_of(name) == copy

    def gated(*_, **__):
        response = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("gated", response=response)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", gated)
    message = f"give token=, or take '{copy}'" if copy else "is neither here nor on the hub"
    with pytest.raises(OSError, match=message):
        hub.find(name)


# The face, with a hub's cache that holds one model under two names.


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture
def cache(plain, tmp_path):
    """A cache with the 16-bit repo of two that Unsloth would have."""
    repo = tmp_path / "cache" / "models--unsloth--tiny"
    shutil.copytree(plain, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return dict(cache_dir=str(tmp_path / "cache"), local_files_only=True)


NAME = "unsloth/tiny-unsloth-bnb-4bit"


@pytest.mark.parametrize("given", [dict(load_in_16bit=True), dict(load_in_8bit=True)], ids=str)
def test_the_parent_is_loaded_and_told(cache, given, capsys, monkeypatch):
    monkeypatch.setattr(keywords, "_said", set())
    load = (FastLanguageModel.from_pretrained, dry_run.loaded)
    for model in (load(NAME, max_seq_length=64, **given, **cache)[0] for load in load):
        assert model.name == "unsloth/tiny"
        assert model.stored == ("int8" if "load_in_8bit" in given else None)
    said = capsys.readouterr().out
    assert f"unsloth/tiny is read, the 16-bit weights of {NAME}; use_exact_model_name" in said


@pytest.mark.parametrize("given", [{}, dict(load_in_16bit=True, use_exact_model_name=True)])
def test_with_4_bits_or_an_exact_name_the_repo_itself_is_asked_for(cache, given):
    for load in (FastLanguageModel.from_pretrained, dry_run.loaded):
        with pytest.raises(OSError, match=f"'{NAME}' is neither here nor on the hub"):
            load(NAME, max_seq_length=64, **given, **cache)


def test_a_revision_of_a_repo_that_is_not_read_is_refused(cache):
    with pytest.raises(ValueError, match=f"revision='x' is one of {NAME}, but .*unsloth/tiny is"):
        FastLanguageModel.from_pretrained(NAME, 64, load_in_16bit=True, revision="x", **cache)


def test_an_adapter_finds_the_16_bit_parent_of_its_4_bit_base(cache, plain, tmp_path):
    tiny_chat.adapted(plain).save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields |= {"base_model_name_or_path": NAME, "revision": "of the 4-bit repo"}
    config.write_text(json.dumps(fields))
    folder = str(tmp_path / "lora")
    model, _ = FastLanguageModel.from_pretrained(folder, 64, load_in_16bit=True, **cache)
    assert model.name == "unsloth/tiny" and model.adapters and model.stored is None
    with pytest.raises(OSError, match=f"'{NAME}' is neither here"):
        FastLanguageModel.from_pretrained(folder, 64, **cache)


def test_widths_are_settled_so_that_a_written_file_runs_again():
    assert widths.settled({"load_in_8bit": True}) == {"load_in_4bit": False}
    assert widths.settled({"load_in_16bit": True, "r": 4}) == {"load_in_4bit": False}
    assert widths.settled({"load_in_4bit": True, "load_in_8bit": False}) == {}
