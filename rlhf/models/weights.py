"""Weights as they lie in a folder, looked at without torch."""

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rlhf.errors import PreflightError


def count_parameters(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files.

    Raises:
        PreflightError: a file is damaged or cannot be read.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise PreflightError(
                f"the weights cannot be read: {error}",
                str(file),
                "copy the model again, or save it with save_pretrained",
            ) from error
        total += sum(map(math.prod, shapes))
    return total
