"""Sample responses with random numbers keyed by seed and sample, in PPO and outside of stages.

Each token of each sample has a uniform number of its own; the token is where the cumulative distribution passes it. The
logits' rounding, and with it the token, may differ with the other rows of a batch: docs/ppo.md says how often.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.attempt import liveness
from rlhf.models import text
from rlhf.rollout.decoding import Decoder, decodes_in_slots
from rlhf.rollout.drawing import Responses, drawn

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
    model: Any,
    prompts: Sequence[list[int]],
    numbers: Tensor,
    temperature: float,
    *,
    eos_token_id: int,
    pad: int,
    goes_on: Callable[[bool], bool] = bool,
) -> Responses:
    """Sample as :func:`sample_responses`, from any model that has transformers' cache, in one padded batch.

    goes_on  returns whether to go on, told whether any response still runs
    """
    responses = torch.full(numbers.shape, pad, device=model.device)
    logprobs = torch.zeros(numbers.shape, device=model.device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    look = LOOK if model.device.type == "cuda" else 1
    for step, (tokens, of_tokens) in enumerate(drawn_tokens(model, prompts, numbers, temperature, pad=pad)):
        logprobs[:, step] = torch.where(running, of_tokens, 0.0)
        responses[:, step] = torch.where(running, tokens, pad)
        running &= tokens != eos_token_id
        liveness.beat()
        if (step + 1) % look == 0 and not goes_on(bool(running.any())):
            break
    return Responses(responses.cpu(), logprobs.cpu())


@torch.no_grad()
def drawn_tokens(
    model: Any, prompts: Sequence[list[int]], numbers: Tensor, temperature: float, *, pad: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next token of each prompt and its log-probability, both ``[prompt]``, once for each column of numbers.

    A row goes on behind its EOS token: the caller stops, or ignores what it draws from there on.
    """
    ids, mask = (tensor.to(model.device) for tensor in text.pad(prompts, pad, "left"))
    positions = text.positions(mask)
    numbers = numbers.to(model.device)
    cache = DynamicCache(config=model.config)
    for step in range(numbers.shape[1]):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        tokens, of_tokens = drawn(logits, numbers[:, step], temperature)
        yield tokens, of_tokens
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
