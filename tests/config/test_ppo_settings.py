"""What PPO's settings, and micro batches of all that train, refuse; and what one of them fills in for the others."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.base import semantic_values
from rlhf.config.pipeline import load_pipeline
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import RmSettings, SftSettings, TrainingSettings
from rlhf.errors import SettingsError
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def ppo(*overrides: str) -> PpoSettings:
    config = load_pipeline(TINY, list(overrides), {name: stage.settings for name, stage in stages().items()})
    settings = config.instances["ppo"].settings
    assert isinstance(settings, PpoSettings)
    return settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.kl.coef=-0.1", "ppo.kl.coef is -0.1 and must be a number of at least 0"),
        ("ppo.gae_lambda=1.5", "ppo.gae_lambda is 1.5 and must be a number from 0 to 1"),
        ("ppo.discount=-1", "ppo.discount is -1 and must be a number from 0 to 1"),
        ("ppo.kl.estimator=k4", "one of k1, k2, k3"),
        ("ppo.kl={place: loss}", "its expected gradient is 0"),
        ("ppo.kl={coef: 0, target: 6}", "coef 0 stays 0"),
        ("ppo.minibatches=3", "rollouts 64 is not a multiple of minibatches 3"),
        (
            "ppo.placement=apart",
            "workers.count is 1, and scorers 1; raise workers.count to 2 or more, or write placement",
        ),
        (
            "ppo={placement: apart, scorers: 4, workers: {count: 3}}",
            "raise workers.count to 5 or more, or lower scorers",
        ),
        ("ppo={placement: apart, workers: {count: auto}}", "workers.min is 1, and scorers 1; raise workers.min to 2"),
        (
            "ppo={placement: apart, workers: {count: 2}, share_base: true, tuning: {method: lora}}",
            "they are adapters on its base; write placement: together, or share_base: false",
        ),
        ("ppo={placement: apart, workers: {count: 2}, parts: 65}", "parts 65 is more than rollouts 64"),
        (
            "ppo={placement: apart, workers: {count: 4}, rollout: {tensor_parallel: 2}}",
            "rollout.tensor_parallel 2 does not divide the 3 rank(s) that train",
        ),
        (
            "ppo={placement: apart, scorers: 2, workers: {count: 8}, zero: {secondary_partition: 4}}",
            "secondary_partition 4 does not divide the 6 ranks that train; write secondary_partition: 3",
        ),
        (
            "ppo={placement: apart, scorers: 3, workers: {count: auto, min: 4}, zero: {secondary_partition: 2}}",
            "secondary_partition 2 does not divide the 3 ranks that are set apart; write secondary_partition: 1",
        ),
        ("ppo.scorers=0", "ppo.scorers is 0 and must be a whole number of at least 1"),
        ("ppo.value_warmup=12", "leaves none of 12 iterations"),
        ("ppo.average_decay=1", "must be a number above 0 and below 1"),
        ("ppo.algorithm=a2c", "algorithm a2c needs epochs 1, and it is 2"),
        ("ppo.algorithm=a3c", "one of ppo, a2c"),
        ("ppo.score_clip=0", "ppo.score_clip is 0 and must be a number above 0"),
        ("ppo.entropy_bonu=0.1", "entropy_bonus"),
        (
            "ppo={rollout: {engine: vllm}, tuning: {method: ia3}}",
            "rollout.engine vllm needs whole weights, and with tuning.method ia3 the policy is a model and an adapter; "
            "write rollout: {engine: native}",
        ),
        (
            "ppo={rollout: {engine: vllm}, share_base: true, tuning: {method: lora}}",
            "rollout.engine vllm needs whole weights, and with share_base the policy is an adapter",
        ),
        ("ppo.share_base=true", "share_base needs tuning {method: lora} with init zero, and it is full"),
        ("ppo.rollout.tensor_parallel=0", "ppo.rollout.tensor_parallel"),
        (
            "ppo={rollout: {tensor_parallel: 3}, workers: {count: 4}}",
            "rollout.tensor_parallel 3 does not divide the 4 rank(s) of workers.count",
        ),
        (
            "ppo={rollout: {tensor_parallel: gathered, engine: vllm}, workers: {count: 2}}",
            "rollout.tensor_parallel gathered is for engine native, and it is vllm",
        ),
        (
            "ppo={rollout: {tensor_parallel: 2}, workers: {count: 2}, zero: {stage: 2}}",
            "rollout.tensor_parallel 2 is for a policy in shards, and in zero.stage 2 every rank has it whole",
        ),
        (
            "ppo={rollout: {tensor_parallel: 2}, workers: {count: 2}, tuning: {method: lora, dora: true}}",
            "the policy is split with whole weights or plain LoRA, and tuning.method is lora with dora",
        ),
        (
            "ppo={rollout: {tensor_parallel: gathered}, share_base: true, tuning: {method: lora}}",
            "rollout.tensor_parallel gathered does not go with share_base",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(override: str, words: str) -> None:
    """Before anything runs, by the setting's name."""
    with pytest.raises(SettingsError) as error:
        ppo(override)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "ppo.share_base needs LoRA adapters on one base, and reward will be whole weights"),
        (["rm.tuning={method: lora, merge: true}"], "reward will be whole weights"),
        (["rm.tuning={method: lora}", "sft.tuning={method: prefix}"], "policy will be an adapter of method prefix"),
        (["rm.tuning={method: lora}"], "reward will be trained on another one than policy"),
        (["rm.tuning={method: lora}", "sft.tuning={method: lora}", "rm.inputs.base=sft"], "on another one than policy"),
        (["rm.tuning={method: lora}", "sft.tuning={method: lora}"], None),
        (["rm.tuning={method: lora}", "rm.inputs.base=sft"], None),
    ],
)
def test_stages_whose_results_cannot_share_a_base_are_refused_before_they_run(
    tmp_path: Path, overrides: list[str], words: str | None
) -> None:
    """When the run is planned, before anything is trained for it."""
    known, shared = stages(), ["ppo.share_base=true", "ppo.tuning={method: lora}"]
    config = load_pipeline(TINY, [*shared, *overrides], {name: stage.settings for name, stage in known.items()})
    store = Store.open(tmp_path)
    if words is None:
        plan(config, known, store)
        return
    with pytest.raises(SettingsError) as error:
        plan(config, known, store)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [],
            "ppo.tuning is full, and policy will have 4 virtual tokens, which only p-tuning-v2 or prefix with as many",
        ),
        (["ppo.tuning={method: prefix, tokens: 5}"], "tuning is prefix, and policy will have 4 virtual tokens"),
        (["ppo.tuning={method: prefix, tokens: 4}"], None),
        (["ppo.tuning={method: prefix, tokens: 4}", "rm.tuning={method: prompt}"], "reward will have 20"),
        (["ppo.tuning={method: prefix, tokens: 4}", "rm.tuning={method: prompt}", "ppo.value_init=policy"], None),
        (["rm.inputs.base=sft"], "rm.tuning is full, and base will have 4"),
    ],
)
def test_virtual_tokens_that_would_be_lost_are_refused_before_they_are_trained(
    tmp_path: Path, overrides: list[str], words: str | None
) -> None:
    """When the run is planned, by the stages that it needs alone."""
    known, store = stages(), Store.open(tmp_path)
    given = ["sft.tuning={method: p-tuning-v2, tokens: 4}", *overrides]
    config = load_pipeline(TINY, given, {name: stage.settings for name, stage in known.items()})
    plan(config, known, store, ["sft"])
    if words is None:
        plan(config, known, store)
        return
    with pytest.raises(SettingsError) as error:
        plan(config, known, store)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"micro_batch_tokens": 767}, "is less than the 768 tokens of the longest sample"),
        ({"micro_batch_tokens": 768}, None),
        ({"micro_batch_tokens": 768, "ptx": {"coef": 1, "max_length": 900}}, "is less than the 900 tokens"),
        ({"micro_batch_tokens": 768, "ptx": {"max_length": 900}}, None),
        ({"micro_batch_tokens": 768, "micro_batch_size": 2}, "leave one of them out"),
        ({"packing": True, "tuning": {"method": "prefix"}}, "packing does not go with tuning.method prefix"),
        ({"packing": True, "tuning": {"method": "lora"}}, None),
    ],
)
def test_micro_batches_that_cannot_be_are_refused(values: dict[str, Any], words: str | None) -> None:
    """A sample that is longer than the budget, two sizes, and virtual tokens before samples of one row."""
    accepted(PpoSettings, {"max_prompt_length": 256, "sampling": {"max_new_tokens": 512}} | values, words)


def accepted(kind: type[TrainingSettings], values: dict[str, Any], words: str | None) -> None:
    """Or refused with these words."""
    with nullcontext() if words is None else pytest.raises(ValueError, match=words):
        kind.model_validate(values)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (SftSettings, {"micro_batch_tokens": 63}, "less than the 64 tokens of the longest sequence"),
        (SftSettings, {"micro_batch_tokens": 64}, None),
        (RmSettings, {"micro_batch_tokens": 127}, "less than the 128 tokens of the longest list"),
        (RmSettings, {"micro_batch_tokens": 128}, None),
        (RmSettings, {"micro_batch_tokens": 128, "responses_per_list": 3}, "less than the 192 tokens"),
        (RmSettings, {"micro_batch_tokens": 128, "micro_batch_size": 1}, "leave one of them out"),
    ],
)
def test_a_budget_that_one_row_of_sft_or_rm_exceeds_is_refused(
    kind: type[TrainingSettings], values: dict[str, Any], words: str | None
) -> None:
    """A list is never divided; lists of no set size have two responses or more, which preflight counts."""
    accepted(kind, {"max_length": 64} | values, words)
    assert "micro_batch_tokens" not in semantic_values(kind())


def test_a2c_fills_in_what_it_is() -> None:
    """One update on each rollout and no clipping; all else as it is written."""
    settings = PpoSettings.model_validate({"algorithm": "a2c", "rollouts": 32})
    assert (settings.epochs, settings.minibatches) == (1, 1)
    assert settings.policy_clip is None
    assert settings.value_clip is None
    assert settings.rollouts == 32


def test_workers_and_micro_batches_are_in_no_key() -> None:
    """Where and in which portions it runs changes results by rounding alone; which responses are kept changes none."""
    plain = semantic_values(ppo())
    same = ppo("ppo.workers.count=2", "ppo.micro_batch_size=7", "ppo.samples_kept=0", "ppo.checkpoint_every=3")
    assert semantic_values(same) == plain
    tokens = ppo("ppo.micro_batch_size=null", "ppo.micro_batch_tokens=5000", "ppo.packing=true")
    assert semantic_values(tokens) == plain
    assert semantic_values(ppo("ppo.kl.target=6")) != plain
