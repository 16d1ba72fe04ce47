"""Settings of GRPO and RLOO: docs/grpo.md has every equation, and the source of every default."""

from typing import Literal, Self

from pydantic import model_validator

from rlhf.config.base import semantic
from rlhf.config.policy_gradient import PolicyGradientSettings

Baseline = Literal["mean", "leave-one-out"]
Deviation = Literal["group", "batch", "none"]
Ratio = Literal["token", "sequence", "response"]
Average = Literal["token", "sequence", "constant"]


class GrpoSettings(PolicyGradientSettings):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): several responses to each prompt."""

    responses_per_prompt: int = semantic(8, ge=2)
    """G, the size of a group: responses to a prompt, which are each other's baseline; divides ``rollouts``."""
    baseline: Baseline = semantic("mean")
    """Subtracted from a response's reward: the mean of its group, or that of the group's other responses (Ahmadian et
    al. 2024, arXiv:2402.14740, eq. 8), which is G / (G - 1) times the same advantage."""
    deviation: Deviation = semantic("group")
    """Divides what remains: the standard deviation of its group's rewards (Shao et al. 2024, §4.1.2), or of those of
    the whole iteration (Hu et al. 2025, REINFORCE++, arXiv:2501.03262, with a group's baseline), or nothing (Liu et al.
    2025, Dr. GRPO, arXiv:2503.20783, §3.2: dividing favours prompts that are too easy or too hard)."""
    ratio: Ratio = semantic("token")
    """What is clipped: each token's probability ratio, or one ratio for a response: ``sequence`` the geometric mean of
    its tokens' (Zheng et al. 2025, GSPO, arXiv:2507.18071, eq. 7), ``response`` their product, the ratio of the whole
    response as one action."""
    average: Average = semantic("sequence")
    """How tokens make a minibatch's loss: ``sequence`` the mean over each response and then over responses (Shao et al.
    2024, eq. 3), ``token`` the mean over all tokens (DAPO, arXiv:2503.14476, §3.3), ``constant`` their sum over
    responses and ``max_new_tokens`` (Dr. GRPO, arXiv:2503.20783, §3.2), so that no length has less weight."""
    overlong_buffer: int | None = semantic(None, ge=1)
    """Last tokens before ``max_new_tokens`` over which a penalty grows from 0 to 1 (DAPO, arXiv:2503.14476, eq. 13);
    null for none. ``missing_eos_penalty`` is beside it."""

    dynamic_sampling: int = semantic(0, ge=0)
    """Most further draws of an iteration, each of new prompts in the place of those whose responses all score the same,
    penalties included, and so teach nothing (DAPO, arXiv:2503.14476, §3.2). What is still so after the last of them
    stays. 0 for none."""

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        size = self.responses_per_prompt
        if self.rollouts % size:
            raise ValueError(f"rollouts {self.rollouts} is not a multiple of responses_per_prompt {size}")
        if self.overlong_buffer is not None and self.overlong_buffer >= self.sampling.max_new_tokens:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} is not less than max_new_tokens {self.sampling.max_new_tokens}"
            )
        return self


class RlooSettings(GrpoSettings):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): grpo's loop, a response being one action."""

    responses_per_prompt: int = semantic(4, ge=2)
    """k, the size of a group: responses to a prompt, which are each other's baseline; divides ``rollouts``."""
    baseline: Baseline = semantic("leave-one-out")
    """Subtracted from a response's reward: the mean of the group's other responses (Ahmadian et al. 2024, eq. 8), or
    that of all of them."""
    deviation: Deviation = semantic("none")
    """Divides what remains; see grpo."""
    ratio: Ratio = semantic("response")
    """What is clipped; see grpo. ``response``, a response being one action (Ahmadian et al. 2024, §3)."""
