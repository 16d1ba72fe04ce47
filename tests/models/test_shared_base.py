"""PPO's models as adapters on one base, in a group of one."""

import gc
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.shared_base import weights_held
from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import ScratchSettings
from rlhf.config.tuning import LoraTuning
from rlhf.config.zero import ZeroSettings
from rlhf.errors import PreflightError
from rlhf.models.base_models import make_from_scratch
from rlhf.models.layout import count_parameters, update_json
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.reward import FrozenReward
from rlhf.models.text import load_tokenizer
from rlhf.models.virtual_tokens import TRAINED
from rlhf.rl.losses import clipped_policy_loss, clipped_value_loss
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.rollout.sequences import Experience, minibatch_of
from rlhf.training.loading import load_models
from rlhf.training.policy import FrozenPolicy
from rlhf.training.scoring import Together
from rlhf.training.shared_base import VALUE, check_adapters
from rlhf.zero.engine import ADAM_EPSILON, whole_weights
from tests.models.tiny import NORMALISER, TEXTS, make_tiny_adapter

pytestmark = [
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group"),
]

POLICY, REWARD = LoraTuning(rank=4, alpha=8.0), LoraTuning(rank=2, targets=["q_proj", "down_proj"], rslora=True)
PROMPTS, RESPONSES = ["a film", "the", "a"], ["a joy", "dull , dull", ""]


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "policy": make_tiny_adapter(tiny, folder / "policy", POLICY, scores=False),
        "reward": make_tiny_adapter(tiny, folder / "reward", REWARD, scores=True),
    }


def settings_of(**more: Any) -> PpoSettings:
    values = {"share_base": True, "tuning": {"method": "lora"}, "rollouts": 4, "micro_batch_size": 2}
    return PpoSettings.model_validate(values | more)


def models_of(inputs: dict[str, Path], folder: Path, **more: Any) -> tuple[Any, Any, Any]:
    policy, value, scoring = load_models(Context("ppo", "key", settings_of(**more), inputs, folder, folder, folder))
    assert isinstance(scoring, Together)
    return policy, value, scoring.rewards


def sampled(policy: Any) -> Rollout:
    return roll_out(policy, PromptBatch(["a"] * 4, [[5, 6, 7], [8], [9, 10], [11]], [0, 1, 2, 3]), 0, 6)


def experience_of(policy: Any, value: Any, rollout: Rollout) -> Experience:
    """With advantages and returns that ask for something else."""
    batch, odd = rollout.sequences, rollout.sequences.ids[:, -rollout.sequences.time :] % 2 == 1
    values = value.values(batch)
    return Experience.of(
        batch,
        logprobs=policy.logprobs(batch),
        reference_logprobs=policy.reference_logprobs(batch),
        values=values,
        advantages=torch.where(odd, 1.0, -1.0),
        returns=torch.where(odd, values + 1, values - 1),
    )


class Slow:
    """A whole model with one adapter, by plain transformers and PEFT, that takes AdamW's steps in plain torch."""

    def __init__(self, folder: Path, head: Tensor | None = None) -> None:
        auto: Any = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
        base = auto.from_pretrained(folder / "base", **({} if head is None else {"num_labels": 1}))
        self.model: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()
        if head is not None:
            base.score.modules_to_save["default"].weight.data.copy_(head)
        self.base, self.scores = base, head is not None
        self._tokens = len(load_tokenizer(folder))
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1.0, eps=ADAM_EPSILON, weight_decay=0.0)

    def __call__(self, part: Experience) -> Tensor:
        """Log-probabilities or values ``[sample, time]``, row by row and without padding."""
        rows: list[Tensor] = []
        for ids, attends, mask in zip(part.ids, part.attention_mask.bool(), part.mask, strict=True):
            row, count = ids[attends][None], int(mask.sum())
            states = self.base.model(input_ids=row).last_hidden_state[0, -count - 1 : -1]
            if self.scores:
                values = self.base.score(states).squeeze(-1)
            else:
                values = self.base.lm_head(states)[:, : self._tokens].log_softmax(-1)[range(count), row[0, -count:]]
            rows.append(torch.nn.functional.pad(values, (0, part.time - count)))
        return torch.stack(rows)

    def step(self, loss: Tensor, learning_rate: float) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()


def module_of(model: Any) -> Any:
    return model.engine._shared.engine.module


def head_of(value: Any) -> Tensor:
    return whole_weights(module_of(value), trained_only=False)[f"heads.{VALUE}.weight"]


POLICY_LOSS, VALUE_LOSS = partial(clipped_policy_loss, clip=0.2), partial(clipped_value_loss, clip=0.2)


@pytest.mark.parametrize("stage", [2, 3])
def test_updates_are_those_of_separate_models(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Each with its own rate, norm and moments: weights, Adam's moments and losses, after three updates of each."""
    monkeypatch.setattr(ZeroSettings, "of_ranks", lambda self, _: self)  # one rank, too, in stage 3
    policy, value, _ = models_of(folders, tmp_path, zero={"stage": stage})
    slow_policy, slow_value = Slow(folders["policy"]), Slow(folders["reward"], head_of(value))
    experience = experience_of(policy, value, sampled(policy))
    with torch.no_grad():
        torch.testing.assert_close(slow_policy(experience), experience.logprobs * experience.mask, atol=1e-5, rtol=0)
        torch.testing.assert_close(slow_value(experience), experience.values * experience.mask, atol=1e-5, rtol=0)
    whole = minibatch_of(experience, [0, 1, 2, 3], MicroBatch(4))
    (part,) = whole.parts
    constants = part.logprobs, part.reference_logprobs, part.advantages, part.mask
    for update in range(3):
        sums = value.update(minibatch_of(experience, [0, 1, 2, 3], MicroBatch(2)), VALUE_LOSS, 3e-3)
        loss, expected = VALUE_LOSS(slow_value(part), part.values, part.returns, part.mask, num_tokens=whole.num_tokens)
        torch.testing.assert_close(sums.loss, expected.loss, atol=1e-5, rtol=1e-5)
        slow_value.step(loss, 3e-3)
        if update == 0:
            continue  # as during the value model's warm-up
        sums = policy.update(minibatch_of(experience, [0, 1, 2, 3], MicroBatch(2)), POLICY_LOSS, 1e-3)
        now = slow_policy(part)
        loss, expected = POLICY_LOSS(now, torch.zeros_like(now), *constants, num_tokens=whole.num_tokens)
        torch.testing.assert_close(sums.loss, expected.loss, atol=1e-5, rtol=1e-5)
        slow_policy.step(loss, 1e-3)
    policy.engine._shared.engine.take_turn("")  # DeepSpeed shows the state of what requires a gradient
    ours = dict(module_of(policy).named_parameters())
    for slow, adapter in ((slow_policy, TRAINED), (slow_value, VALUE)):
        for name, weight in slow.trained.items():
            mine = ours[f"heads.{VALUE}.weight" if "score" in name else f"model.{name.replace(TRAINED, adapter)}"]
            state = slow.optimizer.state[weight]
            assert state["step"] == (3 if adapter == VALUE else 2)
            torch.testing.assert_close(
                safe_get_full_fp32_param(mine),
                weight.detach(),
                atol=1e-5,
                rtol=1e-4,
                msg=lambda text, name=name: f"{name}: {text}",
            )
            # DeepSpeed shows none in stage 2.
            for moment in ("exp_avg", "exp_avg_sq") if stage == 3 else ():
                held = safe_get_full_optimizer_state(mine, moment)
                torch.testing.assert_close(
                    held, state[moment], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("form", ["adapter", "plain"])
def test_the_reference_is_what_the_policy_was(folders: dict[str, Path], tiny: Path, tmp_path: Path, form: str) -> None:
    """KL exactly 0 before the first update; afterwards the policy alone has moved, and samples as it is."""
    inputs = folders if form == "adapter" else folders | {"policy": tiny}
    policy, value, rewards = models_of(inputs, tmp_path)
    rollout = sampled(policy)
    experience, scores = experience_of(policy, value, rollout), rewards.score(PROMPTS, RESPONSES)
    assert torch.equal(experience.logprobs, experience.reference_logprobs)
    plain = FrozenPolicy(inputs["policy"], "fp32", 1.0, MicroBatch(2)).logprobs(rollout.sequences)
    torch.testing.assert_close(experience.logprobs, plain, atol=1e-5, rtol=0)
    before = whole_weights(module_of(policy), trained_only=False)
    policy.update(minibatch_of(experience, [0, 1, 2, 3], MicroBatch(2)), POLICY_LOSS, 0.03)
    assert changed(before, policy) == {TRAINED}
    assert torch.equal(policy.reference_logprobs(rollout.sequences), experience.logprobs)
    assert torch.equal(value.values(rollout.sequences), experience.values)
    assert torch.equal(rewards.score(PROMPTS, RESPONSES), scores)
    again = sampled(policy)
    gaps = (again.logprobs - policy.logprobs(again.sequences))[again.mask]
    assert gaps.abs().max() < 1e-5
    assert (policy.logprobs(rollout.sequences) - experience.logprobs).abs().max() > 0.01

    before = whole_weights(module_of(policy), trained_only=False)
    value.update(minibatch_of(experience, [0, 1, 2, 3], MicroBatch(2)), VALUE_LOSS, 0.03)
    assert changed(before, policy) == {VALUE}


def changed(before: dict[str, Tensor], model: Any) -> set[str]:
    """The adapters, or other parts, of which a weight differs."""
    after = whole_weights(module_of(model), trained_only=False)
    names = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
    return {next((part for part in (TRAINED, VALUE) if f".{part}." in name), name) for name in names}


def test_scores_are_those_of_the_reward_model_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, normalised, whatever adapter was active before; the range of people's scores is known too."""
    policy, _, rewards = models_of(folders, tmp_path)
    sampled(policy)
    assert torch.equal(
        rewards.score(PROMPTS, RESPONSES),
        FrozenReward(folders["reward"], "fp32", MicroBatch(2)).score(PROMPTS, RESPONSES),
    )


def test_the_value_model_starts_from_the_policy_where_a_function_rewards(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its states are the policy's own."""
    (tmp_path / "reward.py").write_text("def length(prompts, responses):\n    return [*map(len, responses)]\n")
    rewards = [{"function": f"{tmp_path / 'reward.py'}:length"}]
    policy, value, rewards = models_of({"policy": folders["policy"]}, tmp_path, rewards=rewards, value_init="policy")
    experience = experience_of(policy, value, sampled(policy))
    slow = Slow(folders["policy"])
    slow.base.score, slow.scores = torch.nn.Linear(32, 1, bias=False), True
    slow.base.score.weight.data.copy_(head_of(value))
    with torch.no_grad():
        torch.testing.assert_close(slow(experience), experience.values * experience.mask, atol=1e-5, rtol=0)
    assert rewards.score(PROMPTS, RESPONSES).tolist() == [*map(len, RESPONSES)]


def test_one_rank_keeps_the_base_once(folders: dict[str, Path], tmp_path: Path) -> None:
    """What samples is a view of the weights, not a copy."""
    policy, *_ = models_of(folders, tmp_path)
    sampled(policy)
    view = policy._generator._view
    places = {name: weight.data_ptr() for name, weight in module_of(policy).model.named_parameters()}
    held = {name: weight.data_ptr() for name, weight in view.named_parameters() if weight.numel()}
    assert held
    assert held.items() <= places.items()


def test_the_result_is_the_policy_s_adapter_with_its_base(folders: dict[str, Path], tmp_path: Path) -> None:
    """Read by plain PEFT it has the trained policy's log-probabilities; no other adapter is written."""
    policy, value, _ = models_of(folders, tmp_path)
    experience = experience_of(policy, value, sampled(policy))
    policy.update(minibatch_of(experience, [0, 1, 2, 3], MicroBatch(2)), POLICY_LOSS, 0.03)
    policy.export(tmp_path / "out")
    file = "adapter_model.safetensors"
    assert load_file(tmp_path / "out" / file).keys() == load_file(folders["policy"] / file).keys()
    now = policy.logprobs(experience) * experience.mask
    assert (now - experience.logprobs * experience.mask).abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(Slow(tmp_path / "out")(experience), now, atol=1e-5, rtol=0)


def test_the_average_is_of_the_policy_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """Half what the adapter was and half what it is, for a decay of 0.5 and one update."""
    policy, value, _ = models_of(folders, tmp_path, average_decay=0.5)
    experience = experience_of(policy, value, sampled(policy))
    value.update(minibatch_of(experience, [0, 1, 2, 3], MicroBatch(2)), VALUE_LOSS, 0.03)
    policy.update(minibatch_of(experience, [0, 1, 2, 3], MicroBatch(2)), POLICY_LOSS, 0.03)
    policy.export(tmp_path / "out")
    start, exported = (
        load_file(folder / "adapter_model.safetensors") for folder in (folders["policy"], tmp_path / "out")
    )
    last = whole_weights(module_of(policy), trained_only=True)
    for name, weight in exported.items():
        mine = last[f"model.{name.replace('.weight', f'.{TRAINED}.weight')}"]
        assert not torch.equal(mine, start[name])
        torch.testing.assert_close(weight, (start[name] + mine) / 2, atol=1e-6, rtol=0)


def with_other_base(folder: Path, inputs: dict[str, Path], tiny: Path) -> dict[str, Path]:
    base = folder / "tiny"
    shutil.copytree(tiny, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return inputs | {"reward": make_tiny_adapter(base, folder / "reward", REWARD, scores=True)}


def with_whole_reward(folder: Path, inputs: dict[str, Path], tiny: Path) -> dict[str, Path]:
    shutil.copytree(tiny, folder / "whole")
    update_json(folder / "whole" / "config.json", NORMALISER)
    return inputs | {"reward": folder / "whole"}


def with_more_weights(folder: Path, inputs: dict[str, Path], _: Path) -> dict[str, Path]:
    shutil.copytree(inputs["policy"], folder / "more")
    weights = load_file(folder / "more" / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(1)
    save_file(weights, folder / "more" / "adapter_model.safetensors")
    return inputs | {"policy": folder / "more"}


def with_other_adapter(folder: Path, inputs: dict[str, Path], _: Path) -> dict[str, Path]:
    shutil.copytree(inputs["policy"], folder / "other")
    update_json(folder / "other" / "adapter_config.json", {"peft_type": "IA3"})
    return inputs | {"policy": folder / "other"}


def with_bias(folder: Path, inputs: dict[str, Path], _: Path) -> dict[str, Path]:
    shutil.copytree(inputs["policy"], folder / "bias")
    update_json(folder / "bias" / "adapter_config.json", {"bias": "lora_only"})
    return inputs | {"policy": folder / "bias"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_bias, "policy's adapter has bias 'lora_only'"),
        (with_other_base, r"reward is an adapter for another base \([0-9a-f]{12}\) than the policy's \([0-9a-f]{12}\)"),
        (with_whole_reward, "reward is a whole model"),
        (with_more_weights, "policy's adapter replaces weights of its base.*embed_tokens"),
        (with_other_adapter, "policy is an adapter of type IA3"),
    ],
)
def test_models_that_cannot_share_a_base_are_refused(
    folders: dict[str, Path],
    tiny: Path,
    tmp_path: Path,
    change: Callable[[Path, dict[str, Path], Path], dict[str, Path]],
    words: str,
) -> None:
    """Before anything is loaded, with what to do."""
    check_adapters(folders, "ppo")
    check_adapters({"policy": tiny, "reward": tiny}, "ppo")  # neither is trained yet
    with pytest.raises(PreflightError, match=words) as error:
        check_adapters(change(tmp_path, folders, tiny), "ppo")
    assert "share_base: false" in error.value.next_step


def test_the_base_is_held_once_in_place_of_four_times(tmp_path: Path) -> None:
    """Counted over all modules, generation's copy among them: one base and its adapters, to the byte."""
    base = tmp_path / "base"
    make_from_scratch(ScratchSettings(vocabulary=2000, hidden_size=64, layers=4, heads=2), TEXTS, seed=0, target=base)
    inputs = {
        role: make_tiny_adapter(base, tmp_path / f"our-{role}", LoraTuning(rank=1), scores=role == "reward")
        for role in ("policy", "reward")
    }
    held: dict[bool, int] = {}
    for shared in (False, True):
        gc.collect()
        before = weights_held()
        models = models_of(inputs, tmp_path, share_base=shared, tuning={"method": "lora", "rank": 1})
        sampled(models[0])
        held[shared] = weights_held() - before
        del models
    adapters = sum(4 * count_parameters(folder) for folder in inputs.values())
    # The reference is a second one of the policy's, and the value model begins as the reward model's.
    assert held[True] == 4 * count_parameters(base) + 2 * adapters
    assert 0.2 < held[True] / held[False] < 0.4
