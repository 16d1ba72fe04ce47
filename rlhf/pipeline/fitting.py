"""Say of each training stage whether it will fit into memory, and what to change if it will not."""

import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rlhf.attempt.context import Context
from rlhf.cluster.devices import Device, device_of_ranks
from rlhf.config.base import is_local
from rlhf.config.policy_gradient import PolicyGradientSettings, RolloutSettings
from rlhf.config.stages import ModelSettings
from rlhf.config.tuning import LoraTuning
from rlhf.errors import PreflightError, size
from rlhf.models.footprint import Architecture
from rlhf.models.layout import is_adapter
from rlhf.pipeline.memory import CONTEXT, Prediction, Texts, Training, predict, with_micro_batch
from rlhf.pipeline.plan import Planned, standing_in
from rlhf.store import Store

TOLERANCE = 0.15
"""How far a measured peak may be from the prediction."""
MOST_RANKS = 64
"""The largest worker group that is ever advised."""


def check(context: Context[Any], texts: Texts) -> None:
    """Refuse a stage that its GPUs are too small for; note where that is close, or where a machine's memory is.

    texts  the longest of the data

    Raises:
        PreflightError: the prediction is beyond the GPU's size by more than :data:`TOLERANCE`.
    """
    settings: Training = context.settings
    device, models = device_of_ranks(settings.workers.gpu), architectures(context.inputs)
    if device is None or models is None:
        return
    if device.gpu:
        settings = with_micro_batch(settings, models, device.bytes, in_list=texts.in_list)
    predicted = predict(settings, models, texts, gpu=device.gpu)
    if fits(predicted, settings, device):
        return
    change = advice(settings, models, texts, device)
    what = f"{context.stage} will need about {predicted} on each rank, and {_room(settings, device)}"
    then = " ".join(f"{context.stage}.{setting}" for setting in change)
    if _is_refused(predicted, device):
        setting = change[0].partition("=")[0] if change else "workers"
        advised = then or "take a smaller model, or GPUs with more memory"
        raise PreflightError(what, f"{context.stage}.{setting}", advised)
    context.note(f"{what}: it may not fit" + (f"; if so, {then}" if then else ""))


def architectures(inputs: Mapping[str, Path]) -> dict[str, Architecture] | None:
    """Return the sizes of a training stage's models by role; None if a model is missing or says too little."""
    folders = {role: path for role, path in inputs.items() if role in ("base", "policy") or role.startswith("reward")}
    if not folders.keys() & {"base", "policy"}:
        return None
    try:
        models = {role: Architecture.of(folder) for role, folder in folders.items()}
    except KeyError:  # a configuration with names that no decoder of transformers has
        return None
    return models if all(model.parameters for model in models.values()) else None


def fits(predicted: Prediction, settings: Training, device: Device) -> bool:
    """Return whether the ranks' peak fits a GPU beside CUDA's context, or those of all ranks a machine's memory."""
    return predicted.total * (1 if device.gpu else settings.workers.ranks) + CONTEXT <= device.bytes


def _is_refused(predicted: Prediction, device: Device) -> bool:
    return device.gpu and predicted.total > (1 + TOLERANCE) * device.bytes


def _room(settings: Training, device: Device) -> str:
    if device.gpu:
        return f"its GPU has {size(device.bytes)}"
    return f"the {settings.workers.ranks} ranks share {size(device.bytes)}"


def advice(
    settings: Training, models: Mapping[str, Architecture], texts: Texts | None, device: Device
) -> Sequence[str]:
    """Return the settings to change so that a stage fits, those that cost least; empty where no change is enough.

    Of the changes that are enough those are taken that do without the dearest kind, then without the next dearest.
    """
    kinds = [[("", {}), *options] for options in _changes(settings, device)]
    for dearest_first in product(*reversed(kinds)):
        changed = settings
        for _, update in dearest_first:
            changed = changed.model_copy(update=update)
        if fits(predict(changed, models, texts, gpu=device.gpu), changed, device):
            return [text for text, _ in reversed(dearest_first) if text]
    return []


def _changes(settings: Training, device: Device) -> list[list[tuple[str, dict[str, Any]]]]:
    """Return changes of settings as words and values, the cheapest kind first, and of each kind the mildest.

    Small micro batches, checkpointing and sampling without vLLM's copy cost time, LoRA changes the result, giving a
    second copy of weights up costs time between nodes, offloading much of it, and ranks need GPUs.
    """
    unit, count, least = "micro_batch_size", settings.micro_batch, 1
    if settings.micro_batch_tokens is not None:
        unit, count, least = "micro_batch_tokens", settings.micro_batch_tokens, settings.longest
    halves = [count >> power for power in range(1, count.bit_length()) if count >> power >= least]
    checkpointing: list[tuple[str, dict[str, Any]]] = []
    native: list[tuple[str, dict[str, Any]]] = []
    lora: list[tuple[str, dict[str, Any]]] = []
    sharding: list[tuple[str, dict[str, Any]]] = []
    # A cache of keys and values, as these methods learn, would be read anew by a layer that is computed again.
    cached = settings.tuning.method in ("prefix", "p-tuning-v2")
    if not (settings.activation_checkpointing or cached):
        checkpointing = [("activation_checkpointing=true", {"activation_checkpointing": True})]
    if isinstance(settings, PolicyGradientSettings) and settings.rollout.engine == "vllm":
        native = [("rollout.engine=native", {"rollout": RolloutSettings()})]
    elif settings.tuning.method == "full":
        lora = [("tuning.method=lora", {"tuning": LoraTuning()})]
    if settings.zero.secondary_partition > 1:
        zero = settings.zero.model_copy(update={"secondary_partition": 1})
        sharding.append(("zero.secondary_partition=1", {"zero": zero}))
    if device.gpu and settings.zero.offload_optimizer == "none":
        zero = settings.zero.model_copy(update={"offload_optimizer": "cpu"})
        sharding.append(("zero.offload_optimizer=cpu", {"zero": zero}))
    rows = (
        settings.rollouts // settings.minibatches
        if isinstance(settings, PolicyGradientSettings)
        else settings.batch_size
    )
    counts = [settings.trainers << power for power in range(1, MOST_RANKS.bit_length())] if device.gpu else []
    return [
        [(f"{unit}={half}", {unit: half}) for half in halves],
        checkpointing,
        native,
        lora,
        sharding,
        [
            (f"workers.count={count}", {"workers": settings.workers.model_copy(update={"count": count})})
            for count in (trainers + settings.set_apart for trainers in counts if rows % trainers == 0)
            if count <= MOST_RANKS and settings.zero.takes_ranks(count - settings.set_apart)
        ],
    ]


def forecasts(stages: Mapping[str, Planned], store: Store) -> list[dict[str, Any]]:
    """Predict the memory of a plan's training stages, for texts as long as their settings allow.

    Return for each ``stage``, ``ranks``, ``moment``, ``parts`` in bytes, ``total``, ``device`` (its bytes, null where
    they are not known here), ``refused`` (whether preflight would refuse the stage), ``change``, the settings to change
    where it may not fit, and ``tensor_parallel`` of ppo's rollouts, as it would be chosen. Models come from results, or
    from what they will be trained from; without either ``moment`` is null.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, planned in stages.items():
            settings: Any = planned.instance.settings
            if not isinstance(settings, Training):
                continue
            inputs = {
                role: folder
                for role, wire in planned.wires.items()
                if (folder := _folder(stages, wire.instance, store, Path(scratch))) is not None
            }
            rows.append({"stage": name, "ranks": settings.workers.ranks} | _forecast(settings, architectures(inputs)))
    return rows


def _forecast(settings: Training, models: Mapping[str, Architecture] | None) -> dict[str, Any]:
    if models is None:
        unknown = {"moment": None, "parts": {}, "total": None, "device": None, "refused": False, "change": []}
        return unknown | {"tensor_parallel": None}
    device = device_of_ranks(settings.workers.gpu)
    if device is not None and device.gpu:
        settings = with_micro_batch(settings, models, device.bytes)
    predicted = predict(settings, models, gpu=device is None or device.gpu)
    enough = device is None or fits(predicted, settings, device)
    return {
        "moment": predicted.moment,
        "parts": dict(predicted.parts),
        "total": predicted.total,
        "device": device.bytes if device else None,
        "refused": device is not None and _is_refused(predicted, device),
        "change": [] if device is None or enough else list(advice(settings, models, None, device)),
        "tensor_parallel": settings.rollout.tensor_parallel if isinstance(settings, PolicyGradientSettings) else None,
    }


def _folder(stages: Mapping[str, Planned], name: str, store: Store, scratch: Path) -> Path | None:
    artifact = standing_in(stages, name)
    if artifact is not None:
        return store.checkout(artifact, scratch / artifact)
    # The model stage copies a local folder as it is.
    while (planned := stages[name]).stage.continues:
        name = planned.wires[planned.stage.continues].instance
    settings = planned.instance.settings
    if not isinstance(settings, ModelSettings) or not is_local(settings.base):
        return None
    folder = Path(settings.base).expanduser()
    return folder if (folder / "config.json").exists() or is_adapter(folder) else None
