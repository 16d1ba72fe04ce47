"""Sample responses with random numbers keyed by seed and sample, in PPO and for ``rlhf generate``.

Each token of each sample has a uniform number of its own; the token is where the cumulative distribution passes it. The
logits' rounding, and with it the token, may differ with the other rows of a batch: docs/ppo.md says how often.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from rlhf.attempt import liveness
from rlhf.errors import RequestError
from rlhf.models import folders, text
from rlhf.models.layout import config_of, context_length, virtual_tokens_in
from rlhf.rl.masks import response_mask
from rlhf.rollout.decoding import Decoder, decodes_in_slots
from rlhf.rollout.drawing import Responses, drawn, uniforms

LOOK = 16
"""Tokens after which the host asks a GPU whether any response still runs; on a CPU it asks at each."""


def sample_responses(
    model: Any, prompts: Sequence[list[int]], numbers: Tensor, temperature: float, *, eos_token_id: int, pad: int
) -> Responses:
    """Sample a response to each prompt from softmax(logits / temperature) and nothing else.

    transformers' ``generate`` would add the model's own generation_config.json to its arguments: penalties, suppressed
    and forced tokens, filters, more EOS tokens. None of these is part of the policy whose log-probabilities are
    compared, so sampling uses the model's logits alone.

    model        a causal language model, unsharded
    prompts      token ids
    numbers      ``[prompt, time]``, see :func:`uniforms`; their width is the longest response
    temperature  0 takes the likeliest token, ignores the numbers, and sets the log-probability to 0
    pad          the id of padding
    """
    if decodes_in_slots(model):
        return Decoder(model).sample(prompts, numbers, temperature, eos_token_id=eos_token_id, pad=pad)
    return sample_in_batch(model, prompts, numbers, temperature, eos_token_id=eos_token_id, pad=pad)


@torch.no_grad()
def sample_in_batch(
    model: Any, prompts: Sequence[list[int]], numbers: Tensor, temperature: float, *, eos_token_id: int, pad: int
) -> Responses:
    """Sample as :func:`sample_responses`, from any model that has transformers' cache, in one padded batch."""
    ids, mask = (tensor.to(model.device) for tensor in text.pad(prompts, pad, "left"))
    positions = text.positions(mask)
    numbers = numbers.to(model.device)
    responses = torch.full(numbers.shape, pad, device=model.device)
    logprobs = torch.zeros(numbers.shape, device=model.device)
    running = torch.ones(len(ids), dtype=torch.bool, device=model.device)
    look = LOOK if model.device.type == "cuda" else 1
    cache = DynamicCache(config=model.config)
    for step in range(numbers.shape[1]):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        tokens, of_tokens = drawn(logits, numbers[:, step], temperature)
        logprobs[:, step] = torch.where(running, of_tokens, 0.0)
        responses[:, step] = torch.where(running, tokens, pad)
        running &= tokens != eos_token_id
        liveness.beat()
        if (step + 1) % look == 0 and not running.any():
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
