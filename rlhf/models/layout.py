"""Read what a model folder holds, without torch: layout, configuration, context length, licence, weights.

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
"""The context of models whose positions are relative or none, which any text fits."""

# These number positions from pad_token_id + 1 on, so that their table holds that many texts' tokens less.
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
_LONGEST_CARD = 1 << 16


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter rather than whole weights."""
    return (folder / ADAPTER_CONFIG).exists()


def config_file(folder: Path) -> Path:
    """The model's ``config.json``: an adapter's is its base's, since transformers takes one beside an adapter to mean
    that the whole weights are there too.
    """
    return (folder / BASE if is_adapter(folder) else folder) / "config.json"


def config_of(folder: Path) -> dict[str, Any]:
    """The model's configuration, a reward model's score normaliser included."""
    return json.loads(config_file(folder).read_text())


def context_length(config: Mapping[str, Any]) -> int:
    """The longest sequence in tokens, special tokens included."""
    # A model that reads more than text keeps what concerns text by itself.
    config = config.get("text_config", config)
    length = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(length, int) or length < 1:  # XLNet says -1
        return UNBOUNDED
    if config.get("model_type") in NUMBERED_FROM_PADDING:
        return length - int(config.get("pad_token_id", 1)) - 1
    return length


def licence_of(folder: Path) -> str | None:
    """The ``license`` in the YAML head of the folder's model card, or None where there is none to read."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as card:
            text = card.read(_LONGEST_CARD)
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        head: Any = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None


def count_parameters(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files.

    Raises:
        PreflightError: a file is damaged or cannot be read.
    """
    return sum(map(math.prod, _shapes(folder)))


def count_adapter_parameters(folder: Path, rank: int) -> int:
    """About how many parameters adapters on every linear layer of a folder's model have.

    rank · (inputs + outputs) of each matrix, but for embeddings and heads, which have a row for each token.

    Raises:
        PreflightError: a file is damaged or cannot be read.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    vocabulary = config.get("text_config", config).get("vocab_size")
    matrices = [shape for shape in _shapes(folder) if len(shape) == 2 and vocabulary not in shape]
    return rank * sum(map(sum, matrices))


def _shapes(folder: Path) -> list[list[int]]:
    found: list[list[int]] = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                found += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise PreflightError(
                f"the weights cannot be read: {error}",
                str(file),
                "copy the model again, or save it with save_pretrained",
            ) from error
    return found
