"""Direct preference optimisation: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.

In: a policy, ranked comparison sets with strengths.  Out: the tuned policy.
No reward model is trained, and nothing is sampled. Of a pair of responses to prompt x,

    loss = -log σ( r(chosen) - r(rejected) ),   r(y) = β log( π(y | x) / π_initial(y | x) )

with the sum over a response's tokens, EOS included. docs/dpo.md has the other losses, soft labels and the offset.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from rlhf.attempt.context import Context
from rlhf.config.stages import DpoSettings
from rlhf.data.records import read_rows
from rlhf.models.templates import Tokenizer
from rlhf.models.text import prompt_ids, response_ids
from rlhf.ranking.lists import Pair, by_share, by_strength, draw_pairs
from rlhf.training import loading, trl_trainers


def run(context: Context[DpoSettings]) -> dict[str, float]:
    """Tune the policy; final metrics: ``eval/accuracy`` and ``eval/margin`` of held-out pairs, and ``pairs``."""
    context = loading.with_micro_batch(context)
    settings, comparisons = context.settings, context.inputs["comparisons"]
    base, tokenizer, load = loading.language_model(context, context.inputs["policy"])
    train, heldout = (read_rows(comparisons / f"{part}.jsonl") for part in ("train", "heldout"))
    rows = training_rows(settings, train, tokenizer)
    unseen, _ = draw_pairs(heldout, settings.pairs_per_response, settings.seed)
    trainer = trl_trainers.dpo_trainer(
        context, load, tokenizer, Dataset.from_list(rows), Dataset.from_list(tokenised(heldout, unseen, tokenizer))
    )
    trl_trainers.train(trainer, context)
    margins = trainer.heldout_margins()
    trl_trainers.export(trainer, base, context, scores=False)
    accuracy = (margins > 0).double().mean() + (margins == 0).double().mean() / 2
    return {"eval/accuracy": accuracy.item(), "eval/margin": margins.mean().item(), "pairs": float(len(rows))}


def training_rows(settings: DpoSettings, sets: Sequence[Any], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return tokenised pairs with their offset and the probability that the chosen response is preferred."""
    pairs, _ = draw_pairs(sets, settings.pairs_per_response, settings.seed)
    rows = tokenised(sets, pairs, tokenizer)
    preferred = {"strengths": by_strength, "share": by_share}.get(settings.labels, lambda _: None)(sets)
    smoothing = settings.label_smoothing if settings.loss == "sigmoid" else 0.0
    for pair, row in zip(pairs, rows, strict=True):
        stronger, weaker = (sets[place.set]["strengths"][place.response] for place in pair)
        share = 1.0 if preferred is None else float(preferred(pair)[0, 1])
        row["offset"] = settings.margin * (stronger - weaker)
        row["preference"] = share * (1 - smoothing) + (1 - share) * smoothing
    known = [row for row in rows if not np.isnan(row["preference"])]
    return [row | {"number": number} for number, row in enumerate(known)]


def tokenised(sets: Sequence[Any], pairs: Sequence[Pair], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the token ids of pairs: what the policy reads, and what it would have to write, EOS included."""
    return [
        {
            "prompt_ids": prompt_ids(tokenizer, sets[chosen.set]["prompt"]),
            "chosen_ids": response_ids(tokenizer, sets[chosen.set]["responses"][chosen.response]),
            "rejected_ids": response_ids(tokenizer, sets[rejected.set]["responses"][rejected.response]),
        }
        for chosen, rejected in pairs
    ]
