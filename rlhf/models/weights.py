"""Weights as they lie in a folder, looked at without torch."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf.errors import PreflightError


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
