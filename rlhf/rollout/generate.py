"""``rlhf generate``: what a policy answers, without Ray or ZeRO."""

from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from rlhf.errors import RequestError
from rlhf.models import folders, text
from rlhf.rl.masks import response_mask
from rlhf.rollout.sampling import sample_responses, uniforms


def answers(folder: Path, prompts: list[str], temperature: float, max_new_tokens: int, seed: int) -> list[str]:
    """One response to each prompt by the policy in a folder, sampled as in training; temperature 0 is greedy.

    Raises:
        RequestError: a prompt and the longest response do not fit the policy's context.
    """
    disable_progress_bar()
    tokenizer = text.load_tokenizer(folder)
    rows = [text.prompt_ids(tokenizer, prompt) for prompt in prompts]
    limit = text.context_length(folder)
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
    rows = zip(responses.ids, mask, strict=True)
    return [text.response_text(tokenizer, ids[real].tolist()) for ids, real in rows]
