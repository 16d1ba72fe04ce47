"""Read model folders without torch: layout, configuration, context length, licence, shapes of the weights.

An *adapter* folder holds a PEFT adapter, the tokenizer, and in ``base/`` the plain folder that the adapter was trained
on, so that it is whole by itself.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from rlhf.errors import PreflightError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base"
UNBOUNDED = 1 << 30
"""The context of models with relative positions or without positions, which any text fits."""

# Models that number positions from pad_token_id + 1 on: their longest text is that much shorter than the table.
NUMBERED_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def is_adapter(folder: Path) -> bool:
    """Return whether the folder holds an adapter rather than whole weights."""
    return (folder / ADAPTER_CONFIG).exists()


def virtual_tokens_in(folder: Path) -> int:
    """Return the number of virtual tokens of a folder's adapter; 0 where it has none."""
    if not is_adapter(folder):
        return 0
    return json.loads((folder / ADAPTER_CONFIG).read_text()).get("num_virtual_tokens") or 0


def config_file(folder: Path) -> Path:
    """Return the path of the model's ``config.json``, an adapter's in ``base/``: transformers expects whole weights
    beside the file.
    """
    return (folder / BASE if is_adapter(folder) else folder) / "config.json"


def config_of(folder: Path) -> dict[str, Any]:
    """Read the model's configuration, a reward model's score normaliser included."""
    return json.loads(config_file(folder).read_text())


def update_json(path: Path, entries: Mapping[str, Any], *, ensure_ascii: bool = False) -> None:
    """Add entries to the object in a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.unlink()  # it may be a link to a file of the base's, which must not change
    path.write_text(json.dumps(content, indent=2, ensure_ascii=ensure_ascii), encoding="utf-8")


def context_length(config: Mapping[str, Any]) -> int:
    """Return the longest sequence that a model with this ``config.json`` takes, in tokens, special ones included."""
    # A model that reads more than text has a configuration for text within its own.
    config = config.get("text_config", config)
    length = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(length, int) or length < 1:  # XLNet says -1
        return UNBOUNDED
    if config.get("model_type") in NUMBERED_FROM_PADDING:
        return length - int(config.get("pad_token_id", 1)) - 1
    return length


def check_scored_length(folder: Path) -> None:
    """Refuse, by a PreflightError, a reward model whose ``score_max_length`` is beyond its context."""
    config = config_of(folder)
    longest, limit = config.get("score_max_length", 0), context_length(config)
    if longest > limit:
        raise PreflightError(
            f"the reward model's score_max_length is {longest}, and its context is {limit} tokens",
            str(config_file(folder)),
            f'set "score_max_length": {limit} there',
        )


def licence_of(folder: Path) -> str | None:
    """Return the ``license`` in the YAML head of the folder's model card, or None where it cannot be read."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as card:
            text = card.read(1 << 16)
        if not text.startswith("---\n") or "\n---" not in text[4:]:
            return None
        head: Any = yaml.safe_load(text[4:].partition("\n---")[0])
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None


def count_parameters(folder: Path) -> int:
    """Return the number of parameters in a folder's safetensors files.

    Raises:
        PreflightError: a file is damaged or cannot be read.
    """
    return sum(map(math.prod, shapes(folder).values()))


def shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of a plain folder's weights by name, without reading them; raises as count_parameters."""
    sizes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                sizes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise PreflightError(
                f"the weights cannot be read: {error}",
                str(file),
                "copy the model again, or save it with save_pretrained",
            ) from error
    return sizes
