"""PPO's models as adapters on one base, in a group of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.tuning import LoraTuning
from rlhf.models import tuning
from rlhf.models.reward import FrozenReward
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.rollout.sequences import Experience
from rlhf.training.loading import load_models
from rlhf.zero.engine import ADAM_EPSILON

pytestmark = [
    # DeepSpeed's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("group"),
]

NORMALISER = {"score_mean": 0.5, "score_std": 2.0, "sees": "conversation", "score_max_length": 32}
POLICY, REWARD = LoraTuning(rank=4, alpha=8.0), LoraTuning(rank=2, targets=["q_proj", "down_proj"], rslora=True)
PROMPTS, TEXTS = ["a film", "the", "a"], ["a joy", "dull , dull", ""]


def trained_adapter(tiny: Path, folder: Path, method: LoraTuning, *, scores: bool) -> Path:
    """An adapter as sft or rm makes it, with weights that matter."""
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = tuning.prepared(
        auto.from_pretrained(tiny, **({"num_labels": 1} if scores else {})), method, tiny, scores=scores, seed=0
    )
    generator = torch.Generator().manual_seed(int(scores))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    tuning.save(model, weights, tiny, folder, method, scores=scores, config=NORMALISER if scores else None)
    return folder


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "policy": trained_adapter(tiny, folder / "policy", POLICY, scores=False),
        "reward": trained_adapter(tiny, folder / "reward", REWARD, scores=True),
    }


def settings_of(**more: Any) -> PpoSettings:
    values = {"share_base": True, "tuning": {"method": "lora"}, "rollouts": 4, "micro_batch_size": 2}
    return PpoSettings.model_validate(values | more)


def models_of(inputs: dict[str, Path], folder: Path, **more: Any) -> tuple[Any, Any, Any]:
    return load_models(Context("ppo", "key", settings_of(**more), inputs, folder, folder, folder))


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
        self._head = head is not None
        if head is not None:
            self.model.get_base_model().score.weight.data.copy_(head)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=1.0, eps=ADAM_EPSILON, weight_decay=0.0)

    def __call__(self, part: Experience) -> Tensor:
        """Log-probabilities or values ``[sample, time]``, row by row and without padding."""
        rows: list[Tensor] = []
        for ids, attends, mask in zip(part.ids, part.attention_mask.bool(), part.mask, strict=True):
            row, count = ids[attends][None], int(mask.sum())
            base = self.model.get_base_model()
            states = base.model(input_ids=row).last_hidden_state[0, -count - 1 : -1]
            if self._head:
                found = base.score(states).squeeze(-1)
            else:
                found = base.lm_head(states)[:, :300].log_softmax(-1)[range(count), row[0, -count:]]
            rows.append(torch.nn.functional.pad(found, (0, part.time - count)))
        return torch.stack(rows)

    def step(self, loss: Tensor, learning_rate: float) -> float:
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        return float(norm)


def test_debug(folders: dict[str, Path], tmp_path: Path) -> None:
    policy, value, rewards = models_of(folders, tmp_path)
    rollout = sampled(policy)
    print(rollout.texts)
    e = experience_of(policy, value, rollout)
    print((e.logprobs - e.reference_logprobs).abs().max(), (e.logprobs - rollout.logprobs).abs().max())
    print(rewards.score(PROMPTS, TEXTS), FrozenReward(folders["reward"], "fp32", 2).score(PROMPTS, TEXTS))
