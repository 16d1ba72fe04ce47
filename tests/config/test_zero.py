import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.base import semantic_values
from rlhf.config.pipeline import load_pipeline
from rlhf.config.stages import SftSettings
from rlhf.config.zero import ZeroSettings
from rlhf.errors import SettingsError
from rlhf.pipeline.stage import stages

# As transformers' documentation has it, for its own Trainer.
THEIRS: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "allgather_bucket_size": 1000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": True,
}


def settings(folder: Path, content: Any, **more: Any) -> SftSettings:
    """The settings of sft with a file for DeepSpeed."""
    (folder / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    section = {"zero": {"config": str(folder / "ds.json")} | more.pop("zero", {})} | more
    (folder / "p.yaml").write_text(json.dumps({"sft": section}))
    known = {name: stage.settings for name, stage in stages().items()}
    found = load_pipeline(folder / "p.yaml", [], known).instances["sft"].settings
    assert isinstance(found, SftSettings)
    return found


def test_a_file_for_deepspeed_is_taken_whole_and_is_not_needed_again(tmp_path: Path) -> None:
    """Its stage and offloading are settings, "auto" means ours or DeepSpeed's default, and the rest is passed on."""
    read = settings(tmp_path, THEIRS)
    zero = read.zero
    assert (zero.stage, zero.offload_optimizer, zero.offload_parameters) == (2, "cpu", "none")
    assert zero.sharding == {
        "offload_optimizer": {"pin_memory": True},
        "overlap_comm": True,
        "allgather_bucket_size": 1000,
    }
    assert zero.others == {"wall_clock_breakdown": True}
    (tmp_path / "ds.json").unlink()
    assert SftSettings.model_validate_json(read.model_dump_json(), strict=True) == read
    assert semantic_values(read) == semantic_values(SftSettings(seed=read.seed))


def changed(**fields: Any) -> dict[str, Any]:
    return THEIRS | fields


def sharding(**fields: Any) -> dict[str, Any]:
    return THEIRS | {"zero_optimization": THEIRS["zero_optimization"] | fields}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "batch size": (changed(train_batch_size=8), {}, "train_batch_size is 8; instead write batch_size"),
    "micro batch": (changed(train_micro_batch_size_per_gpu=1), {}, "instead write micro_batch_size"),
    "accumulation": (changed(gradient_accumulation_steps=4), {}, "instead write batch_size and micro_batch_size"),
    "clipping": (
        changed(gradient_clipping=1.0),
        {},
        "instead write optimizer.max_grad_norm (in ppo, grpo and rloo max_grad_norm)",
    ),
    "optimizer": (changed(optimizer={"type": "AdamW", "params": {"lr": 1e-4}}), {}, "instead write optimizer"),
    "other optimizer": (changed(optimizer={"type": "Lamb", "params": {"lr": "auto"}}), {}, "it is AdamW"),
    "scheduler": (changed(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}), {}, "instead write"),
    "fp16": (changed(fp16={"enabled": True}), {}, "fp16 is not among our precisions; write precision: bf16"),
    "bf16": (changed(bf16={"enabled": True}), {}, "zero.config has bf16.enabled true, and precision is fp32"),
    "no bf16": (changed(bf16={"enabled": False}), {"precision": "bf16"}, "write precision: fp32"),
    "bf16 without masters": (changed(bf16={"bf16_master_weights_and_grads": True}), {}, "would change the result"),
    "stage 0": (sharding(stage=0), {}, "zero_optimization.stage must be 1, 2 or 3, and there it is 0"),
    "stage auto": (sharding(stage="auto"), {}, "must be 1, 2 or 3, and there it is auto"),
    "no stage": ({}, {}, "and there it is left out"),
    "stage twice": (THEIRS, {"zero": {"stage": 2}}, "config has zero_optimization.stage 2, and stage is 2: give it in"),
    "offloading twice": (THEIRS, {"zero": {"offload_optimizer": "none"}}, "offload_optimizer cpu, and"),
    "auto that nothing fills": (sharding(sub_group_size="auto"), {}, 'sub_group_size is "auto", and nothing fills it'),
    "auto device": (sharding(offload_param={"device": "auto"}), {}, 'offload_param.device is "auto"'),
    "device": (sharding(offload_param={"device": "gpu"}), {}, 'offload_param.device is "gpu", and must be none, cpu'),
    "nvme without a path": (sharding(offload_optimizer={"device": "nvme"}), {}, "device nvme and no nvme_path"),
    "parameters in stage 2": (sharding(offload_param={"device": "cpu"}), {}, "offload_parameters needs stage 3"),
    "quantised": (sharding(zero_quantized_weights=True), {}, "zero_quantized_weights cannot be given: it may change"),
    "misspelt": (sharding(reduce_bucket_sise=3), {}, "did you mean reduce_bucket_size?"),
    "second copy twice": (
        sharding(stage=3, zero_hpz_partition_size=8),
        {"zero": {"secondary_partition": 4}},
        "config has zero_optimization.zero_hpz_partition_size 8, and secondary_partition is 4",
    ),
    "second copy in stage 2": (sharding(zero_hpz_partition_size=8), {}, "secondary_partition 8 needs stage 3"),
    "MiCS": (sharding(stage=3, mics_shard_size=8), {}, "has no MiCS any more; write secondary_partition"),
    "AutoTP": (changed(tensor_parallel={"autotp_size": 2}), {}, "AutoTP does not go with our models"),
    "types of sums": (changed(communication_data_type="bf16"), {}, 'is "bf16", and here it is always "fp32"'),
    "other section": (changed(curriculum_learning={}), {}, "curriculum_learning cannot be given"),
    "their checkpointing": (changed(activation_checkpointing={}), {}, "instead write activation_checkpointing: true"),
    "accelerate's own": ({"distributed_type": "DEEPSPEED"}, {}, "accelerate's own configuration; write stage"),
    "no JSON": ("{", {}, "is no JSON"),
    "no object": ("[]", {}, "is not a JSON object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_our_settings_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """With the setting to write instead, before anything runs."""
    content, more, said = REFUSED[case]
    with pytest.raises(SettingsError) as error:
        settings(tmp_path, content, **more)
    assert said in str(error.value)
    assert "p.yaml:1" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """And no default takes its place."""
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        ZeroSettings.model_validate({"config": str(tmp_path / "none.json")})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters needs stage 3"),
        ({"stage": 1, "secondary_partition": 2}, "secondary_partition 2 needs stage 3"),
        (
            {"secondary_partition": 2, "offload_parameters": "nvme", "nvme_path": "/x"},
            "does not go with offload_parameters: nvme",
        ),
        ({"secondary_partition": 0}, "greater than or equal to 1"),
        ({"offload_optimizer": "nvme"}, "offloading to nvme needs nvme_path"),
        ({"offload_optimizer": "cpu", "nvme_path": "/x"}, "nvme_path is for offloading to nvme"),
        ({"offload_optimizer": "nvme", "nvme_path": "x"}, "nvme_path is x; write it from / on"),
    ],
)
def test_contradictions_of_the_block_are_refused(values: dict[str, Any], said: str) -> None:
    """When settings are read."""
    with pytest.raises(ValueError, match=said):
        ZeroSettings.model_validate(values)


@pytest.mark.parametrize(
    ("partition", "ranks", "fitting"),
    [(8, 16, None), (8, 8, None), (8, 4, None), (2, 1, None), (8, 12, 6), (8, 13, 1), (3, 4, 2)],
)
def test_a_second_copy_is_dealt_out_evenly_or_refused_with_what_fits(
    partition: int, ranks: int, fitting: int | None
) -> None:
    """Up to so many ranks are one node's, and there is none; with ``auto`` the number of ranks is chosen to fit."""
    values = {"workers": {"count": ranks}, "zero": {"secondary_partition": partition}}
    if fitting is None:
        zero = SftSettings.model_validate(values).zero
        assert zero.of_ranks(ranks).secondary_partition == (partition if ranks > partition else 1)
    else:
        said = f"does not divide the {ranks} ranks of workers.count; write secondary_partition: {fitting}, or"
        with pytest.raises(ValueError, match=said):
            SftSettings.model_validate(values)
    SftSettings.model_validate(values | {"workers": {"count": "auto"}})


def test_a_file_s_second_copy_is_a_setting(tmp_path: Path) -> None:
    """By DeepSpeed's name there."""
    file = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    zero = settings(tmp_path, file, workers={"count": 16}).zero
    assert (zero.secondary_partition, zero.sharding) == (8, {})


@pytest.mark.parametrize("method", ["prefix", "p-tuning-v2"])
def test_a_cache_in_the_layers_does_not_go_with_activation_checkpointing(method: str) -> None:
    """And the message says what does."""
    with pytest.raises(ValueError, match=f"does not go with tuning.method {method}.*write method: prompt, or lora"):
        SftSettings.model_validate({"activation_checkpointing": True, "tuning": {"method": method}})
