"""What stages will write to disk, as their preflights say, and whether there is room for it before any starts.

A training stage writes checkpoints, of which the newest two stay while the next is written, folds adapters that it
reads into whole weights, and leaves a result. All but the result is removed when it is committed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.attempt.checkpoints import KEPT, newest_complete, step_of
from rlhf.attempt.context import Context
from rlhf.errors import DiskFullError, size
from rlhf.models.layout import BASE, count_adapter_parameters, count_parameters, is_adapter
from rlhf.store import Store

RESULT, MEANWHILE = "disk/result", "disk/meanwhile"
"""Of what a preflight returns: bytes that stay, and bytes that are removed when the stage is committed."""
_OPTIMISER = 3 * 4
"""Bytes of a trained parameter beside its weight in a checkpoint: in fp32, and Adam's two moments."""


def written(
    context: Context[Any], models: Sequence[Path] = (), steps: int = 0, *, average: bool = False
) -> dict[str, float]:
    """Return about how many bytes a stage will write, as :data:`RESULT` and :data:`MEANWHILE`.

    models   folders of the models that it trains, the one that is its result first; none for a stage that trains none
    steps    how many it takes at most, of which ``checkpoint_every`` is a number
    average  whether a moving average of the result is kept
    """
    settings = context.settings
    weight = 2 if settings.precision == "bf16" else 4
    read = context.inputs.values()
    meanwhile = sum(count_parameters(folder / BASE) for folder in read if is_adapter(folder)) * weight
    if not models:
        return {RESULT: 0.0, MEANWHILE: float(meanwhile)}
    plain = [folder / BASE if is_adapter(folder) else folder for folder in models]
    lora = settings.lora
    trained = [count_adapter_parameters(folder, lora.rank) if lora else count_parameters(folder) for folder in plain]
    checkpoint = sum(trained) * (weight + _OPTIMISER) + trained[0] * 4 * average
    newest = newest_complete(list(context.attempts))
    begun = step_of(newest) if newest else 0
    # The end is no checkpoint: what is trained then is the result.
    due = max(0, (steps - 1) // settings.checkpoint_every - begun // settings.checkpoint_every)
    result = (count_parameters(plain[0]) if lora and lora.merge else trained[0]) * weight
    return {RESULT: float(result), MEANWHILE: float(meanwhile + min(due, KEPT + 1) * checkpoint)}


def check(stages: Mapping[str, Mapping[str, float]], store: Store) -> None:
    """Refuse a run whose stages will not have the room that they need.

    stages  by name, in the order in which they run: what :func:`written` says of each; nothing counts as 0

    Raises:
        DiskFullError: a stage will need more than is free, with the results of those before it.
    """
    free, kept = store.free_bytes(), 0.0
    for name, found in stages.items():
        result, meanwhile = found.get(RESULT, 0.0), found.get(MEANWHILE, 0.0)
        if kept + meanwhile + result > free:
            parts = {"checkpoints": meanwhile, "its result": result, "results before it": kept}
            listed = ", ".join(f"{size(bytes_)} for {what}" for what, bytes_ in parts.items() if bytes_)
            raise DiskFullError(
                f"{name} will need {size(kept + meanwhile + result)} on disk ({listed}), and {size(free)} are free",
                str(store.root),
                f"free some space, raise {name}.checkpoint_every, or put the store (or store.scratch) elsewhere",
            )
        kept += result
