"""Rollouts: responses sampled from the policy, laid out for the models that read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.models import text
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.rl.masks import ended, response_mask
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.sampling import Responses, uniforms
from rlhf.rollout.sequences import Sequences


class Samples(Protocol):
    """What answers prompts."""

    tokenizer: Tokenizer

    def sample(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt. A collective."""
        ...


@dataclass(frozen=True)
class Rollout:
    """The samples of all ranks, in the order of their global index."""

    prompts: Sequence[Prompt]
    texts: list[str]
    """The responses, decoded, without the EOS that ends them."""
    sequences: Sequences
    ended: Tensor
    """``[sample]``, True where the response ended in EOS within the limit."""
    logprobs: Tensor
    """``[sample, time]``, of the responses' tokens under the distributions that they were drawn from, nats."""

    @property
    def mask(self) -> Tensor:
        """``[sample, time]``, True on real response tokens, EOS included."""
        return self.sequences.mask

    def samples(self, count: int, scores: Tensor) -> list[dict[str, Any]]:
        """The first ``count`` prompts and responses with their scores, for people to read."""
        rows = zip(self.prompts[:count], self.texts, scores.tolist(), self.ended.tolist(), strict=False)
        names = ("prompt", "response", "score", "ended")
        return [dict(zip(names, row, strict=True)) for row in rows]


def roll_out(policy: Samples, batch: PromptBatch, seed: int, max_new_tokens: int) -> Rollout:
    """Sample a response to each prompt. A collective."""
    tokenizer = policy.tokenizer
    responses, logprobs = policy.sample(batch.ids, uniforms(seed, batch.samples, max_new_tokens))
    mask = response_mask(responses, tokenizer.eos_token_id)
    responses = torch.where(mask, responses, tokenizer.pad_token_id)
    prompt_ids, prompt_mask = text.pad(batch.ids, tokenizer.pad_token_id, "left")
    return Rollout(
        prompts=batch.prompts,
        texts=[text.response_text(tokenizer, row[real].tolist()) for row, real in zip(responses, mask, strict=True)],
        sequences=Sequences(
            ids=torch.cat([prompt_ids, responses], dim=1),
            attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
            mask=mask,
        ),
        ended=ended(responses, tokenizer.eos_token_id),
        logprobs=logprobs,
    )
