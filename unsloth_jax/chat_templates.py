"""The import path of Unsloth's notebooks; each name is loaded from its home on first use."""

_HOMES = {
    "get_chat_template": "bridge.chat_templates",
    "standardize_sharegpt": "bridge.chat_templates",
    "standardize_data_formats": "bridge.chat_templates",
    "train_on_responses_only": "workflows.responses_only",
}


def __getattr__(name: str):
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {sorted(_HOMES)}")


def __dir__():
    return sorted([*globals(), *_HOMES])
