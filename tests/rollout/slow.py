"""The sampler written out: one padded batch with a growing cache, a sum in float64 over the whole vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.models import text
from rlhf.rollout.drawing import Responses


def slow_inverse_transform(logits: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """The first token whose cumulative probability exceeds its number."""
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    threshold = numbers[:, None].to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


@torch.no_grad()
def slow_responses(
    model: Any, prompts: Sequence[list[int]], numbers: Tensor, temperature: float, *, eos_token_id: int, pad: int
) -> Responses:
    """As ``sample_responses``."""
    ids, mask = (tensor.to(model.device) for tensor in text.pad(prompts, pad, "left"))
    positions = text.positions(mask)
    responses = torch.full(numbers.shape, pad, device=model.device)
    logprobs = torch.zeros(numbers.shape, device=model.device)
    running = torch.ones(len(ids), dtype=torch.bool, device=model.device)
    numbers = numbers.to(model.device)
    cache = DynamicCache(config=model.config)
    for step in range(numbers.shape[1]):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        logits = logits.logits[:, -1].float()
        tokens = logits.argmax(-1)
        if temperature:
            tokens = slow_inverse_transform(logits, numbers[:, step], temperature)
            of_tokens = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
            logprobs[:, step] = torch.where(running, of_tokens, 0.0)
        responses[:, step] = torch.where(running, tokens, pad)
        running &= tokens != eos_token_id
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return Responses(responses.cpu(), logprobs.cpu())
