"""Settings as YAML: 2e-4 is a number, no is a word, a key that comes twice is an error."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

BOOL, INT, FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float"))
# YAML 1.2's plain forms; PyYAML reads 1.1's, in which "no" is False and 2e-4 is a text.
FORMS = (
    (BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (INT, r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)
LEFT = (BOOL, INT, FLOAT, "tag:yaml.org,2002:timestamp")


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2's numbers and words. Raises yaml.YAMLError for a key that comes twice."""

    yaml_implicit_resolvers = {
        letter: [(tag, form) for tag, form in forms if tag not in LEFT]
        for letter, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key.value!r} comes twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes each text that either version of YAML would take for something else."""

    yaml_implicit_resolvers = {
        k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _form, _letters in FORMS:
    for _kind in (Loader, Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(f"^(?:{_form})$"), list(_letters))


def value(text: str) -> Any:
    """What a text means as a YAML value. Raises ValueError where it is none."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is no YAML value: {error}") from error


def read(file: Path) -> dict[str, Any]:
    """The settings of a file. Raises ValueError, naming it, where it holds no names and values."""
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{file} holds no settings, expected lines such as 'max_steps: 60'")
    return found


def written(sections: Mapping[str, Mapping[str, Any]], head: str) -> str:
    """YAML of all sections' settings, each section under its name as a comment."""
    out = [f"# {line}\n" for line in head.splitlines()]
    for name, settings in sections.items():
        text = yaml.dump(plain(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True)
        out.append(f"\n# {name}\n{text}")
    return "".join(out)


def plain(given: Any) -> Any:
    """Lists, dictionaries, texts and numbers of whatever a setting is given as."""
    if isinstance(given, Mapping):
        return {str(key): plain(one) for key, one in given.items()}
    if isinstance(given, list | tuple | set | frozenset):
        return [plain(one) for one in given]
    return given if isinstance(given, bool | int | float | str | None) else str(given)
