"""How a model in training is spread over ranks, host memory and disk: the settings block ``zero``.

A file for DeepSpeed is read here, on the driver, once: its content is part of the settings that ranks are given. Of its
fields those are taken that change memory and speed alone; every other field has a setting of ours, or would change the
result.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import model_validator

from rlhf.config.base import Settings, runtime, suggestion

Device = Literal["none", "cpu", "nvme"]

_AUTO = "auto"
_SHARDING = "zero_optimization"
_LINEAR = "optimizer.warmup_fraction (in ppo, grpo and rloo schedule and warmup_fraction)"
_OURS = {
    "train_batch_size": "batch_size (in ppo, grpo and rloo rollouts and minibatches)",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size, from which it follows",
    "gradient_clipping": "optimizer.max_grad_norm (in ppo, grpo and rloo max_grad_norm)",
    "optimizer": "optimizer (in ppo, grpo and rloo policy_learning_rate, and ppo's value_learning_rate); it is AdamW",
    "scheduler": _LINEAR,
    "activation_checkpointing": "activation_checkpointing: true",
    "amp": "precision: bf16",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "comet": "tracking",
    "csv_monitor": "tracking",
}
"""DeepSpeed's fields that settings of ours stand for."""
_SAME = {
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "zero_force_ds_cpu_optimizer": False,
    "prescale_gradients": False,
}
"""Fields that may say what holds anyway."""
_WITHOUT_EFFECT = ("steps_per_print", "zero_allow_untested_optimizer")
_TAKEN = ("aio", "comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "wall_clock_breakdown")
_SHARDING_TAKEN = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "memory_efficient_linear",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
_SHARDING_DEFAULTS = ("reduce_bucket_size", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")
"""Fields whose "auto" becomes the default."""
BUCKET = 50_000_000
"""Parameters whose gradients are reduced at a time, where the file does not say it. DeepSpeed's own default takes up to
2 GB more."""
_SHARDING_WITHOUT_EFFECT = ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save")
"""How transformers would write the result, which we write."""
_WITHOUT = {
    "mics_shard_size": "DeepSpeed 0.19 has no MiCS any more; write secondary_partition, or zero_hpz_partition_size",
    "tensor_parallel": "DeepSpeed's AutoTP does not go with our models, for which docs/cluster.md has the reasons",
    "sequence_parallel_size": "Ulysses does not go with our models, for which docs/cluster.md has the reasons",
}
"""What somebody may well ask for, and why it is refused."""
_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
"""DeepSpeed's section to our setting."""
_HPZ = "zero_hpz_partition_size"
"""DeepSpeed's field of ``secondary_partition``."""
_OFFLOAD_TAKEN = ("buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read", "pipeline_write")


class ZeroSettings(Settings):
    """What of a model in training the ranks share out among themselves, and what lies outside their GPUs (ZeRO,
    Rajbhandari et al. 2020, arXiv:1910.02054, §5; offloading, Rajbhandari et al. 2021, arXiv:2104.07857).
    """

    stage: Literal[1, 2, 3] = runtime(3)
    """What is shared out: 1 the optimiser's state, 2 gradients too, 3 weights too, of frozen models as well. Lower
    stages exchange less between ranks and need more memory. One rank has nobody to share with: it computes stage 3 as
    stage 2, unless something is offloaded that only stage 3 can."""
    offload_optimizer: Device = runtime("none")
    """Where the optimiser's state lies, and its step is computed: on the GPU, in the host's memory, or on disk."""
    offload_parameters: Device = runtime("none")
    """Where weights lie while they are not computed with; needs stage 3."""
    secondary_partition: int = runtime(1, ge=1)
    """Ranks that keep the weights a second time among themselves, such as the 8 GPUs of a node (hpZ of ZeRO++, Wang et
    al. 2023, arXiv:2306.10209). Between two optimiser steps weights cross the network between nodes once, those of
    frozen models never. Needs stage 3, and must divide the number of ranks; 1, or as many as there are ranks, is
    no second copy."""
    nvme_path: Path | None = runtime(None)
    """Folder for what is offloaded to ``nvme``, 12 to 16 bytes a trained weight; on every node a local disk."""
    config: Path | dict[str, Any] | None = runtime(None)
    """A JSON file of DeepSpeed's, as Accelerate and transformers take it. ``stage``, offloading and the fields that
    change memory and speed alone are taken from it. Batch sizes, clipping, optimizer, scheduler and precision may be
    "auto", which means our settings; in bucket sizes and thresholds "auto" means the default. Everything else
    is refused by name."""

    @model_validator(mode="before")
    @classmethod
    def _config_fills_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = cast(dict[str, Any], values)
        match given.get("config"):
            case str() | Path() as file:
                return _merged(given, _read(Path(file)))
            case dict() as content:
                return _merged(given, cast(dict[str, Any], content))
            case _:
                return given

    @model_validator(mode="after")
    def _parts_fit(self) -> "ZeroSettings":
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, in which weights are sharded; stage is {self.stage}")
        if self.secondary_partition > 1 and self.stage != 3:
            raise ValueError(
                f"secondary_partition {self.secondary_partition} needs stage 3, in which weights are sharded; stage is "
                f"{self.stage}, in which every rank has them all"
            )
        if self.secondary_partition > 1 and self.offload_parameters == "nvme":
            raise ValueError(
                "secondary_partition does not go with offload_parameters: nvme, since DeepSpeed cannot keep the second "
                "copy on disk; write offload_parameters: cpu, or leave secondary_partition out"
            )
        uses_nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if uses_nvme and self.nvme_path is None:
            raise ValueError("offloading to nvme needs nvme_path, a folder on a local disk")
        if self.nvme_path is not None and not uses_nvme:
            raise ValueError("nvme_path is for offloading to nvme; write offload_optimizer: nvme, or leave it out")
        if self.nvme_path is not None and not self.nvme_path.is_absolute():
            raise ValueError(f"nvme_path is {self.nvme_path}; write it from / on, since ranks run in other folders")
        return self

    def of_ranks(self, count: int) -> "ZeroSettings":
        """Return the settings by which a group of ``count`` ranks computes.

        Stage 3 gathers each layer's weights by hooks; where one rank has them all, the hooks cost time alone. A second
        copy among all ranks would be the first again.
        """
        sharded = count > 1 or self.offload_parameters != "none" or self.offload_optimizer == "nvme"
        update: dict[str, int] = {} if sharded or self.stage != 3 else {"stage": 2}
        update |= {"secondary_partition": 1} if self.secondary_partition >= count else {}
        return self.model_copy(update=update)

    def takes_ranks(self, count: int) -> bool:
        """Return whether ``secondary_partition`` divides the ranks, or all of them are in one."""
        return count <= self.secondary_partition or count % self.secondary_partition == 0

    def check_ranks(self, count: int, which: str) -> None:
        """Refuse a number of ranks that the second copy of weights cannot be dealt out among.

        which  they are, for the user

        Raises:
            ValueError: :meth:`takes_ranks` says no.
        """
        if not self.takes_ranks(count):
            fitting = max(size for size in range(1, self.secondary_partition) if count % size == 0)
            raise ValueError(
                f"zero.secondary_partition {self.secondary_partition} does not divide the {count} ranks {which}; "
                f"write secondary_partition: {fitting}, or another count"
            )

    @property
    def sharding(self) -> dict[str, Any]:
        """The file's section ``zero_optimization``, less what has settings of its own."""
        return self.config.get(_SHARDING, {}) if isinstance(self.config, dict) else {}

    @property
    def others(self) -> dict[str, Any]:
        """The file's other sections that are DeepSpeed's alone."""
        given = self.config if isinstance(self.config, dict) else {}
        return {name: value for name, value in given.items() if name in _TAKEN}

    @property
    def bf16(self) -> bool | None:
        """Whether the file says to compute in bf16; None where it does not say."""
        return self.config.get("bf16") if isinstance(self.config, dict) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"config {file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {file} is not a JSON object, as DeepSpeed's configuration is")
    known = cast(dict[str, Any], content)
    if "deepspeed_config" in known or "distributed_type" in known:
        raise ValueError(
            f"config {file} is accelerate's own configuration; write stage, offload_optimizer and offload_parameters "
            "here, or name the JSON file that its deepspeed_config_file names"
        )
    sharding = known.get(_SHARDING)
    if not isinstance(sharding, dict) or sharding.get("stage") not in (1, 2, 3):
        raise ValueError(f"config {file}: {_SHARDING}.stage must be 1, 2 or 3, and there it is {_stage(sharding)}")
    return known


def _stage(sharding: Any) -> str:
    stage = sharding.get("stage", "left out") if isinstance(sharding, dict) else "left out"
    return "0, which is no sharding" if stage == 0 else str(stage)


def _merged(given: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block's values with those of DeepSpeed's configuration, of which what remains is ``config``."""
    rest: dict[str, Any] = {}
    for name, value in content.items():
        if name in ("bf16", "fp16"):
            if (enabled := _enabled(name, value)) is not None:
                rest[name] = enabled
        elif name in _OURS:
            _check_auto(name, value)
        elif name in _SAME:
            _check_same(name, value)
        elif name in _TAKEN:
            rest[name] = value
        elif name not in (_SHARDING, *_WITHOUT_EFFECT):
            raise ValueError(f"config: {name} cannot be given: {_not_taken(name, (*_TAKEN, _SHARDING, *_OURS))}")
    settings, sharding = _sharding(content.get(_SHARDING, {}))
    for name, value in settings.items():
        if name in given and given[name] is not None:
            raise ValueError(
                f"config has {_path_in_file(name)} {value}, and {name} is {given[name]}: give it in one of the places"
            )
    return {**given, **settings, "config": rest | ({_SHARDING: sharding} if sharding else {})}


def _enabled(name: str, value: Any) -> bool | None:
    """Return what the file's section ``bf16`` or ``fp16`` says, None for "auto"."""
    section = cast(dict[str, Any], value) if isinstance(value, dict) else {"enabled": value}
    enabled = section.get("enabled", False)
    if name == "fp16":
        if enabled not in (False, _AUTO):
            raise ValueError("config: fp16 is not among our precisions; write precision: bf16, and take fp16 out")
        return None
    if more := sorted(section.keys() - {"enabled"}):
        raise ValueError(f"config: bf16.{more[0]} would change the result; take it out")
    return None if enabled == _AUTO else bool(enabled)


def _check_auto(name: str, value: Any) -> None:
    section = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    ours = {"optimizer": ("AdamW",), "scheduler": ("WarmupDecayLR",)}.get(name, ())
    values = section.get("params", {}).values() if section.get("type") in ours else [value]
    if name == "activation_checkpointing" or any(one != _AUTO for one in values):
        shown = json.dumps(value)
        raise ValueError(f'config: {name} is {shown}; instead write {_OURS[name]}, and take it out or write "auto"')


def _check_same(name: str, value: Any) -> None:
    if value not in (_AUTO, _SAME[name]):
        raise ValueError(f"config: {name} is {json.dumps(value)}, and here it is always {json.dumps(_SAME[name])}")


def _sharding(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our settings that ``zero_optimization`` gives, and what else of it is taken."""
    settings: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in content.items():
        path = f"{_SHARDING}.{name}"
        if name in ("stage", _HPZ):
            settings["stage" if name == "stage" else "secondary_partition"] = value
        elif name in _OFFLOADS:
            device, more = _offload(path, value)
            settings |= {_OFFLOADS[name]: device["device"]} if "device" in device else {}
            settings |= {"nvme_path": device["nvme_path"]} if device.get("device") == "nvme" else {}
            rest |= {name: more} if more else {}
        elif name in _SHARDING_WITHOUT_EFFECT or (value == _AUTO and name in _SHARDING_DEFAULTS):
            continue
        elif name not in _SHARDING_TAKEN:
            raise ValueError(
                f"config: {path} cannot be given: {_not_taken(name, (*_SHARDING_TAKEN, 'stage', _HPZ, *_OFFLOADS))}"
            )
        elif value == _AUTO:
            raise ValueError(f'config: {path} is "auto", and nothing fills it in; write a value, or take it out')
        else:
            rest[name] = value
    return settings, rest


def _offload(path: str, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return where a section offloads to, and its other fields."""
    section = cast(dict[str, Any], value) if isinstance(value, dict) else {"device": value}
    for name, one in section.items():
        if name not in (*_OFFLOAD_TAKEN, "device", "nvme_path"):
            raise ValueError(f"config: {path}.{name} cannot be given: {_not_taken(name, _OFFLOAD_TAKEN)}")
        if one == _AUTO:
            raise ValueError(f'config: {path}.{name} is "auto", and nothing fills it in; write a value')
    if (device := section.get("device", "none")) not in ("none", "cpu", "nvme"):
        raise ValueError(f"config: {path}.device is {json.dumps(device)}, and must be none, cpu or nvme")
    if section.get("device") == "nvme" and not section.get("nvme_path"):
        raise ValueError(f"config: {path} has device nvme and no nvme_path, a folder on a local disk")
    places = {name: section[name] for name in ("device", "nvme_path") if name in section}
    return places, {name: one for name, one in section.items() if name not in places}


def _path_in_file(setting: str) -> str:
    theirs = {**_OFFLOADS, _HPZ: "secondary_partition"}
    fields = {ours: f"{_SHARDING}.{name}" for name, ours in theirs.items()}
    return fields.get(setting, f"{_SHARDING}.{setting}")


def _not_taken(name: str, known: tuple[str, ...]) -> str:
    if name in _WITHOUT:
        return _WITHOUT[name]
    hint = suggestion(name, known)
    return f"it may change the result, or DeepSpeed has no such field; take it out{'; ' + hint if hint else ''}"
