"""The advantages and losses of GRPO and RLOO against TRL's own code, on the same responses and rewards."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from rlhf.rl.advantages import group_advantages, kl_penalised_rewards
from rlhf.rl.losses import Averaging, Penalties, clipped_policy_loss
from tests import accelerator
from tests.models.tiny import make_tiny_llama

pytestmark = [
    pytest.mark.slow,
    # TRL's and torch's own.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROWS, TIME, LONGEST = 6, 5, 7
MASK = torch.arange(TIME)[None] < torch.tensor([1, 5, 3, 4, 2, 5])[:, None]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGPROBS, OLD, REFERENCE = (drawn(seed, ROWS, TIME) * 0.3 - 1 for seed in (1, 2, 3))
ADVANTAGES = drawn(4, ROWS)


def of_trl(trainer: type, inputs: dict[str, Any], **settings: Any) -> float:
    """Return TRL's loss of a batch: its own code, with a model whose log-probabilities are given."""
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    arguments = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    itself = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (LOGPROBS, torch.zeros(ROWS, TIME), None),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        args=arguments,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        epsilon_low=0.2,
        epsilon_high=0.28,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        **settings,
    )
    ids = torch.zeros(ROWS, TIME, dtype=torch.long)
    tokens = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    batch = tokens | {"completion_mask": MASK.long(), "advantages": ADVANTAGES, "num_items_in_batch": MASK.sum()}
    loss: Any = trainer
    return loss._compute_loss(itself, None, batch | inputs).item()


def ours(average: Any, ratio: Any, beta: float) -> float:
    loss, _ = clipped_policy_loss(
        LOGPROBS,
        torch.zeros(ROWS, TIME),
        OLD,
        REFERENCE,
        ADVANTAGES[:, None].expand(ROWS, TIME),
        MASK,
        clip=0.2,
        clip_high=0.28,
        ratio_of=ratio,
        average=Averaging(average, ROWS, LONGEST),
        num_tokens=int(MASK.sum()),
        penalties=Penalties(beta, "k3", kl_importance_weights=False),
    )
    return loss.item()


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("average", "theirs"), [("sequence", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_grpo_has_the_loss_of_trl(average: str, theirs: str, ratio: str, beta: float) -> None:
    """Each average, of tokens' ratios and of responses', with and without the KL in the loss."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    inputs = {"old_per_token_logps": OLD, "ref_per_token_logps": REFERENCE}
    expected = of_trl(GRPOTrainer, inputs, loss_type=theirs, importance_sampling_level=ratio, beta=beta)
    assert ours(average, ratio, beta) == pytest.approx(expected, abs=1e-5)


def test_rloo_has_the_loss_of_trl() -> None:
    """A response as one action; its KL is in the reward."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    expected = of_trl(RLOOTrainer, {"old_logps": (OLD * MASK).sum(-1)})
    assert ours("sequence", "response", 0.0) == pytest.approx(expected, abs=1e-5)


SCORES, GROUP = [0.3, -1.2, 0.9, 2.0, 0.5, 0.5, 0.5, 0.5], 4
"""Of two groups; the rewards of the second are equal where no KL is in them."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


def scored_by_trl(trainer: type, config: type, tiny: Path, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Return one of TRL's trainers, whose policy is not the reference, and what it makes of sampled responses."""
    arguments = config(
        str(folder),
        per_device_train_batch_size=len(SCORES),
        num_generations=GROUP,
        max_completion_length=TIME,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        **settings,
    )

    def reward(completions: list[str], **_: Any) -> list[float]:
        assert len(completions) == len(SCORES)
        return SCORES

    dataset = Dataset.from_list([{"prompt": "a film"}, {"prompt": "the"}])
    made: Any = trainer(str(tiny), reward, args=arguments, train_dataset=dataset)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in made.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    made.model.train()
    return made, made._generate_and_score_completions([row for row in dataset for _ in range(GROUP)])


@pytest.mark.parametrize("deviation", ["group", "batch", "none"])
def test_grpo_has_the_advantages_of_trl(deviation: Any, tiny: Path, tmp_path: Path) -> None:
    """Its own trainer's, of responses that it samples; a group of equal rewards has none in either."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    with accelerator.of_a_plain_script():
        _, theirs = scored_by_trl(GRPOTrainer, GRPOConfig, tiny, tmp_path, scale_rewards=deviation, beta=0.0)
    ours = group_advantages(torch.tensor(SCORES), GROUP, baseline="mean", deviation=deviation)
    assert ours.tolist() == pytest.approx(theirs["advantages"].tolist(), abs=1e-5)
    assert not ours[GROUP:].any()


def test_rloo_has_the_advantages_of_trl(tiny: Path, tmp_path: Path) -> None:
    """Its own trainer's, the KL being in the reward, with the log-probabilities that it computes."""
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    with accelerator.of_a_plain_script():
        trainer, theirs = scored_by_trl(RLOOTrainer, RLOOConfig, tiny, tmp_path, beta=0.5)
        ids, real = (
            torch.cat([theirs[f"prompt_{kind}"], theirs[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
        )
        mask = theirs["completion_mask"].bool()
        with torch.no_grad():
            logprobs, reference = (
                trainer._get_per_token_logps_and_entropies(model, ids, real, mask.shape[1])[0]
                for model in (trainer.model, trainer.ref_model)
            )
    rewards = kl_penalised_rewards(torch.tensor(SCORES), logprobs, reference, mask, 0.5).sum(-1)
    assert (rewards - torch.tensor(SCORES)).abs().max() > 0.1
    ours = group_advantages(rewards, GROUP, baseline="leave-one-out", deviation="none")
    assert ours.tolist() == pytest.approx(theirs["advantages"].tolist(), abs=1e-5)
