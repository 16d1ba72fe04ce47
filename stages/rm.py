"""The reward model: Bradley-Terry on pairs of ranked responses (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

In: a base model, ranked comparison sets with strengths, demonstrations.  Out: a reward model with its normaliser.

    loss = mean over pairs of -log σ(r(chosen) - r(rejected) - m · (strength(chosen) - strength(rejected)))
           + c · mean of (r(chosen) + r(rejected))²

with the margin of Llama 2 (arXiv:2307.09288, eq. 2) and the centring of Eisenstein et al. 2023 (arXiv:2312.09244).
Scores are then shifted and scaled so that demonstrations have mean 0 and deviation 1 (Stiennon et al. 2020, §3.4).
"""

from typing import Any

import torch
from datasets import Dataset

from rlhf.config.stages import RmSettings
from rlhf.data.jsonl import read_rows
from rlhf.errors import DivergedError
from rlhf.models.reward import load_scorer
from rlhf.models.text import load_tokenizer, plain_text, scored_ids
from rlhf.pipeline.context import Context
from rlhf.ranking.heldout import heldout_accuracy
from rlhf.ranking.pairs import Pair, draw_pairs
from rlhf.zero import trainers


def run(context: Context[RmSettings]) -> dict[str, float]:
    """Train the reward model; final metrics: ``eval/accuracy`` and ``eval/accuracy_confident`` on held-out pairs."""
    settings, base = context.settings, context.inputs["base"]
    tokenizer = load_tokenizer(base)

    def ids(prompt: Any, response: str) -> list[int]:
        return scored_ids(tokenizer, prompt if settings.sees == "conversation" else None, response, settings.max_length)

    def tokenised(pair: Pair) -> dict[str, Any]:
        chosen, rejected = ids(pair.prompt, pair.chosen), ids(pair.prompt, pair.rejected)
        return {"chosen_ids": chosen, "rejected_ids": rejected, "margin": settings.margin * pair.gap}

    sets = read_rows(context.inputs["comparisons"] / "train.jsonl")
    pairs = draw_pairs(sets, settings.pairs_per_response, settings.seed)
    trainer = trainers.reward_trainer(
        context,
        lambda: load_scorer(base, settings.precision, tokenizer, head_seed=settings.seed),
        tokenizer,
        Dataset.from_list([tokenised(pair) for pair in pairs]),
    )
    trainers.train(trainer, context)

    demonstrations = read_rows(context.inputs["demonstrations"] / "train.jsonl")
    normal = trainers.scores(trainer, context, [ids(d["prompt"], plain_text(d["completion"])) for d in demonstrations])
    heldout = read_rows(context.inputs["comparisons"] / "heldout.jsonl")
    scores = trainers.scores(
        trainer, context, [ids(one["prompt"], text) for one in heldout for text in one["responses"]]
    )

    if not normal.std() > 0:
        raise DivergedError(
            "the reward model gives all demonstrations one score", context.stage, "lower its learning rate"
        )
    mean, deviation = normal.mean(), normal.std()
    # Beyond what it says of good and bad responses that it learned from, the model is guessing.
    known = (torch.cat([scores, normal]) - mean) / deviation
    normaliser = {
        "score_mean": mean.item(),
        "score_std": deviation.item(),
        "score_low": known.min().item(),
        "score_high": known.max().item(),
    }
    view = {"sees": settings.sees, "score_max_length": settings.max_length}
    trainers.export(trainer, base, context, scores=True, config=normaliser | view)
    return heldout_accuracy(heldout, scores.numpy(), settings.eval_pairs, settings.seed) | {"pairs": float(len(pairs))}
