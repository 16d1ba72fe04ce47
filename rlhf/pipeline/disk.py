"""Check before a run that the disk has room for the bytes that stages will write, as their preflights estimate them.

A training stage writes checkpoints, of which the newest two stay while the next is written, folds its input adapters
into whole weights, and writes a result. All but the result is removed at the commit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.attempt.folder import KEPT, newest_complete, step_of
from rlhf.config.ppo import PpoSettings
from rlhf.config.tuning import Tuning, results_in_adapter
from rlhf.errors import DiskFullError, size
from rlhf.models.footprint import Architecture, learned
from rlhf.models.layout import BASE, count_parameters, is_adapter
from rlhf.store import Store

RESULT, MEANWHILE = "disk/result", "disk/meanwhile"
"""Names in a preflight's estimate: bytes that stay, and bytes that are removed at the stage's commit."""
_TRAINED = 3 * 4
"""Bytes of a trained parameter in a checkpoint: the weight in fp32, and Adam's two moments."""


def written(
    context: Context[Any], models: Sequence[Path] = (), steps: int = 0, *, average: bool = False
) -> dict[str, float]:
    """Return an estimate of the bytes that a stage will write, as :data:`RESULT` and :data:`MEANWHILE`.

    models   folders of the models that it trains, the model of its result first; empty without training
    steps    their largest number, in the unit of ``checkpoint_every``
    average  whether it keeps a moving average of the result
    """
    settings = context.settings
    weight = 2 if settings.precision == "bf16" else 4
    read = context.inputs.values()
    folded = [folder for folder in read if is_adapter(folder) and not _shares_base(settings)]
    meanwhile = sum(count_parameters(folder / BASE) for folder in folded) * weight
    if not models:
        return {RESULT: 0.0, MEANWHILE: float(meanwhile)}
    plain = [_plain(folder) for folder in models]
    method, trained = settings.tuning, trained_weights(context, models)
    checkpoint = sum(trained) * _TRAINED + trained[0] * 4 * average
    newest = newest_complete(list(context.attempts))
    begun = step_of(newest) if newest else 0
    # The last step writes no checkpoint but the result.
    due = max(0, (steps - 1) // settings.checkpoint_every - begun // settings.checkpoint_every)
    result = (trained[0] if results_in_adapter(method) else count_parameters(plain[0])) * weight
    return {RESULT: float(result), MEANWHILE: float(meanwhile + min(due, KEPT + 1) * checkpoint)}


def trained_weights(context: Context[Any], models: Sequence[Path]) -> list[int]:
    """Return the number of weights that train of each model."""
    settings = context.settings
    return [
        # There the adapters that it reads go on training.
        count_parameters(folder)
        if is_adapter(folder) and _shares_base(settings)
        else _trained(_plain(folder), settings.tuning)
        for folder in models
    ]


def _trained(folder: Path, method: Tuning) -> int:
    try:
        return learned(Architecture.of(folder), method, scores=False).parameters
    except KeyError:  # a configuration that says too little: at most all of them train
        return count_parameters(folder)


def _shares_base(settings: Any) -> bool:
    return isinstance(settings, PpoSettings) and settings.share_base


def _plain(folder: Path) -> Path:
    return folder / BASE if is_adapter(folder) else folder


def check(stages: Mapping[str, Mapping[str, float]], store: Store) -> None:
    """Refuse a run whose stages need more room than there is.

    stages  name to the estimate of :func:`written`, in the order of the run; a missing number counts as 0

    Raises:
        DiskFullError: a stage and the results before it need more bytes than are free.
    """
    free, kept = store.free_bytes(), 0.0
    for name, estimate in stages.items():
        result, meanwhile = estimate.get(RESULT, 0.0), estimate.get(MEANWHILE, 0.0)
        if kept + meanwhile + result > free:
            parts = {"checkpoints": meanwhile, "its result": result, "results before it": kept}
            listed = ", ".join(f"{size(count)} for {part}" for part, count in parts.items() if count)
            raise DiskFullError(
                f"{name} will need {size(kept + meanwhile + result)} on disk ({listed}), and {size(free)} are free",
                str(store.root),
                f"free some space, raise {name}.checkpoint_every, or put the store (or store.scratch) elsewhere",
            )
        kept += result
