"""The layout of adapter folders, as far as it needs no torch.

An *adapter* folder holds a PEFT adapter, the tokenizer, and in ``base/`` the plain folder that the adapter was trained
on, so that it is whole by itself.
"""

import json
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter rather than whole weights."""
    return (folder / ADAPTER_CONFIG).exists()


def relocate_adapter(folder: Path) -> None:
    """Point an adapter at its ``base/`` by absolute path, so that ``from_pretrained(folder)`` finds it."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = str((folder / BASE).resolve())
    path.write_text(json.dumps(config, indent=2))
