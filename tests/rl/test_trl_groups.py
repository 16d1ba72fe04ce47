"""The losses of GRPO and RLOO against TRL's own code, on the same log-probabilities and advantages."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.rl.losses import Averaging, Penalties, clipped_policy_loss

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
