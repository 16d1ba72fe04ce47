"""Sample responses with random numbers keyed by seed and sample, in PPO and for ``rlhf generate``.

Each token of each sample has a uniform number of its own; the token is where the cumulative distribution passes it. The
logits' rounding, and with it the token, may differ with the other rows of a batch: docs/ppo.md says how often.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from rlhf.attempt import liveness
from rlhf.errors import RequestError
from rlhf.models import folders, text
from rlhf.models.layout import config_of, context_length, virtual_tokens_in
from rlhf.randomness import stream
from rlhf.rl.kl import logprobs_of
from rlhf.rl.masks import response_mask


class Responses(NamedTuple):
    """Sampled responses; both tensors are ``[sample, time]``."""

    ids: Tensor
    """Token ids, EOS included, with padding after it."""
    logprobs: Tensor
    """Log-probabilities of these tokens under the distributions they were drawn from, nats; 0 on padding."""


def uniforms(seed: int, samples: Sequence[int], length: int) -> Tensor:
    """Return float64 in [0, 1), ``[sample, length]``, of a counter-based generator keyed by seed and sample index."""
    return torch.from_numpy(np.stack([stream("sampling", seed, sample).random(length) for sample in samples]))


def inverse_transform(logits: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """Return the first token whose cumulative probability under softmax(logits / temperature) exceeds its number.

    logits       ``[batch, vocabulary]``; -inf means probability 0
    numbers      ``[batch]``, float64 in [0, 1)
    temperature  above 0
    returns      token ids ``[batch]``
    """
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # Rounding leaves the last sum a little off 1; scaling by it keeps every number inside.
    threshold = numbers[:, None].to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


@torch.no_grad()
def sample_responses(
    model: Any, prompts: Sequence[list[int]], numbers: Tensor, temperature: float, *, eos_token_id: int, pad: int
) -> Responses:
    """Sample a response to each prompt from softmax(logits / temperature) and nothing else.

    transformers' ``generate`` would add the model's own generation_config.json to its arguments: penalties, suppressed
    and forced tokens, filters, more EOS tokens. None of these is part of the policy whose log-probabilities are
    compared, so this loop uses the model's logits alone.

    model        a causal language model, unsharded
    prompts      token ids
    numbers      ``[prompt, time]``, see :func:`uniforms`; their width is the longest response
    temperature  0 takes the likeliest token, ignores the numbers, and sets the log-probability to 0
    pad          the id of padding
    """
    ids, mask = (tensor.to(model.device) for tensor in text.pad(prompts, pad, "left"))
    positions = text.positions(mask)
    responses = torch.full(numbers.shape, pad, device=model.device)
    logprobs = torch.zeros(numbers.shape, device=model.device)
    running = torch.ones(len(ids), dtype=torch.bool, device=model.device)
    cache = DynamicCache(config=model.config)
    for step in range(numbers.shape[1]):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        if temperature:
            tokens = inverse_transform(logits, numbers[:, step], temperature)
            logprobs[:, step] = torch.where(running, logprobs_of(logits, tokens, temperature), 0.0)
        else:
            tokens = logits.argmax(-1)
        responses[:, step] = torch.where(running, tokens, pad)
        running &= tokens != eos_token_id
        liveness.beat()
        if not running.any():
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return Responses(responses.cpu(), logprobs.cpu())


def answers(folder: Path, prompts: list[str], temperature: float, max_new_tokens: int, seed: int) -> list[str]:
    """Return the responses of a folder's policy to prompts, sampled as in training; temperature 0 is greedy.

    Raises:
        RequestError: a prompt and the longest response do not fit the policy's context.
    """
    disable_progress_bar()
    tokenizer = text.load_tokenizer(folder)
    rows = [text.prompt_ids(tokenizer, prompt) for prompt in prompts]
    limit = context_length(config_of(folder)) - virtual_tokens_in(folder)
    for number, row in enumerate(rows, start=1):
        if len(row) + max_new_tokens > limit:
            raise RequestError(
                f"a prompt of {len(row)} and an answer of {max_new_tokens} tokens do not fit the context of {limit}",
                f"prompt {number}",
                f"shorten it, or --max-new-tokens {max(1, limit - len(row))}",
            )
    responses = sample_responses(
        folders.load_policy(folder, torch.float32).eval(),
        rows,
        uniforms(seed, range(len(prompts)), max_new_tokens),
        temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    mask = response_mask(responses.ids, tokenizer.eos_token_id)
    return [text.response_text(tokenizer, ids[real].tolist()) for ids, real in zip(responses.ids, mask, strict=True)]
