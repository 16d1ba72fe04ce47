"""The exact optimum of KL-regularised PPO, for policies with few enough responses to list them all.

The policy that maximises ``E[r(x, y)] - β KL(π ‖ π_ref)`` is ``π*(y|x) ∝ π_ref(y|x) exp(r(x, y) / β)`` (Ziebart et al.
2008; Korbak et al. 2022, arXiv:2206.00761), over all responses that a model can give: those that end in EOS, and those
that the limit cuts off.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.models.text import load_tokenizer, response_text

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]


def all_responses(vocabulary: int, eos: int, limit: int) -> list[list[int]]:
    """Return every response of at most ``limit`` tokens: with EOS last, or as long as the limit without one."""
    if limit == 0:
        return [[]]
    shorter = all_responses(vocabulary, eos, limit - 1)
    return [[eos], *([token, *rest] for token in range(vocabulary) if token != eos for rest in shorter)]


@torch.no_grad()
def log_probabilities(folder: Path, prompt: str, limit: int) -> tuple[list[str], Tensor]:
    """Return every response's text, as a reward sees it, and its log-probability ``[response]``, float64 nats."""
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    before = tokenizer(prompt)["input_ids"]
    responses = all_responses(model.config.vocab_size, tokenizer.eos_token_id, limit)
    total: list[Tensor] = []
    for response in responses:
        ids = torch.tensor([[*before, *response]])
        # A padding token that was sampled is a token like others, in PPO too.
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        logprobs = logits[0, len(before) - 1 : -1].log_softmax(-1)
        total.append(logprobs[torch.arange(len(response)), torch.tensor(response)].sum())
    return [response_text(tokenizer, response) for response in responses], torch.stack(total)


def distance_to_optimum(policy: Path, reference: Path, prompt: str, limit: int, reward: Reward, beta: float) -> float:
    """Return the total variation distance, in [0, 1], of a policy to the optimal policy.

    policy, reference  folders of models
    beta               β, reward per nat
    """
    texts, before = log_probabilities(reference, prompt, limit)
    scores = torch.tensor(reward([prompt] * len(texts), texts), dtype=torch.float64)
    optimum = (before + scores / beta).softmax(-1)
    return total_variation(log_probabilities(policy, prompt, limit)[1].exp(), optimum)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Return half the summed absolute difference of two distributions."""
    return float((p - q).abs().sum() / 2)
