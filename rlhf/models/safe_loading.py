"""Load a model's folder without running anything of it.

Models come from hubs, from colleagues and out of the store. Weights are read from safetensors only, classes are those
of the installed libraries, and nothing that a folder names is fetched.
"""

import json
from pathlib import Path
from typing import Any

from rlhf.errors import PreflightError
from rlhf.models.layout import ADAPTER_CONFIG, config_file, is_adapter

TOKENIZER: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""For every ``from_pretrained`` of a tokenizer or configuration."""
MODEL: dict[str, Any] = TOKENIZER | {"use_safetensors": True}
"""For every ``from_pretrained`` of a model. By default transformers asks on the terminal whether to run a folder's
code, and reads pickles where there are no safetensors."""
CODE = ("*.py", "*.pyc", "*.so")
"""Files that are not copied with a model's folder: an architecture that transformers knows needs none of them."""


def refuse_code(folder: Path) -> None:
    """Refuse a model's folder that could only be loaded by running code that it holds or names.

    Raises:
        PreflightError: transformers does not know its architecture, which it reads from a file of code; or the folder
            names a Python module or compiled kernels to be loaded.
    """
    path = config_file(folder)
    config = _object(path)
    if code := config.get("auto_map"):
        # The import takes a second, and only folders that come with code need it.
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            first = next(iter(code.values()), "") if isinstance(code, dict) else code
            raise PreflightError(
                f"the model needs code of its own ({first}), and no model's code is ever run here",
                str(path),
                f"use a model whose model_type transformers knows; this one's is {config.get('model_type')!r}",
            )
    if (kernels := _hub_kernels(config)) is not None:
        raise PreflightError(
            f"the model asks for compiled code from a hub, {kernels!r}, and none is ever fetched",
            str(path),
            "remove attn_implementation there",
        )
    if is_adapter(folder) and _object(folder / ADAPTER_CONFIG).get("megatron_config"):
        # PEFT would import the module that `megatron_core` names.
        raise PreflightError(
            "the adapter names a Python module to be imported, and none is",
            str(folder / ADAPTER_CONFIG),
            "remove megatron_config and megatron_core there",
        )


def _hub_kernels(config: dict[str, Any]) -> str | None:
    """Return the repository that a configuration, or one within it, names as its implementation of attention."""
    for name, value in config.items():
        if name in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            return str(value)
        if isinstance(value, dict) and (kernels := _hub_kernels(value)) is not None:
            return kernels
    return None


def refuse_foreign_links(folder: Path) -> None:
    """Raise a PreflightError for a link to nowhere or out of the folder: its file would become part of a result."""
    # A hub's cache consists of links that stay inside the model's own part of it.
    home = folder.resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(home)):
            raise PreflightError(
                "the folder holds a link to nowhere or out of itself, and its target would be imported",
                str(path),
                "remove it, or put a copy in its place",
            )


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # the code that loads the file says what is wrong with it
    return content if isinstance(content, dict) else {}
