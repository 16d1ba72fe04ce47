"""The reward model: a score that orders responses as people do (Ouyang et al. 2022, arXiv:2203.02155, §3.4).

In: a base model, ranked comparison sets with strengths, demonstrations.
Out: a reward model with its normaliser; ``quality.json`` and ``reliability.svg``, its quality on held-out sets.

Lists of responses to one prompt are scored together, each response once. With ``loss: pairwise``,

    loss = mean over pairs of a list of -log σ(r(chosen) - r(rejected) - m · (strength(chosen) - strength(rejected)))
           + c · mean over pairs of (r(chosen) + r(rejected))²

with the margin of Llama 2 (arXiv:2307.09288, eq. 2) and the centring of Eisenstein et al. 2023 (arXiv:2312.09244); the
other losses are in :mod:`rlhf.models.reward_losses`. Scores are then shifted and scaled so that demonstrations have
mean 0 and deviation 1 (Stiennon et al. 2020, §3.4).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.stages import Loss, RmSettings
from rlhf.data.mixture import by_task
from rlhf.data.records import read_rows
from rlhf.errors import DivergedError
from rlhf.models import reward_losses
from rlhf.models.evaluation import check_padding, write_quality
from rlhf.models.reward import from_scratch, is_reward_model, load_scorer
from rlhf.models.reward_losses import ListBatch
from rlhf.models.text import load_tokenizer, plain_text, scored_ids
from rlhf.models.tuning import prepared
from rlhf.ranking.lists import ResponseIndex, by_share, by_strength, draw_lists
from rlhf.ranking.quality import heldout_accuracy
from rlhf.training import loading, trl_trainers


def run(context: Context[RmSettings]) -> dict[str, float]:
    """Train the reward model; final metrics: ``eval/accuracy`` and more of :mod:`rlhf.ranking.quality`.

    Of several tasks the accuracies are also given for each, as ``eval/accuracy/<task>``.
    """
    settings, given = context.settings, context.inputs["base"]
    base = loading.plain_folder(given, context.folder.policy, settings.precision, scores=is_reward_model(given))
    if settings.init == "scratch":
        # Nothing of the given model, its virtual tokens included, goes on.
        given = base = from_scratch(base, context.folder.reward, settings.seed)
    tokenizer = load_tokenizer(base)

    def ids(prompt: Any, response: str) -> list[int]:
        return scored_ids(tokenizer, prompt if settings.sees == "conversation" else None, response, settings.max_length)

    def load() -> Any:
        model = load_scorer(base, settings.precision, settings.tuning, tokenizer, head_seed=settings.seed)
        return prepared(model, settings.tuning, given, scores=True, seed=settings.seed)

    sets = read_rows(context.inputs["comparisons"] / "train.jsonl")
    lists = draw_lists(sets, settings.responses_per_list, settings.lists_per_response, settings.seed)
    context = loading.with_micro_batch(context, max(map(len, lists)))
    trainer = trl_trainers.reward_trainer(
        context,
        load,
        tokenizer,
        Dataset.from_list(training_rows(settings.loss, sets, lists, ids)),
        partial(loss_of, settings),
    )
    trl_trainers.train(trainer, context)

    # Without gradients a batch of twice the size fits.
    at_once = 2 * context.settings.texts_at_once(max(map(len, lists)))
    demonstrations = read_rows(context.inputs["demonstrations"] / "train.jsonl")
    normal = trl_trainers.scores(
        trainer, [ids(row["prompt"], plain_text(row["completion"])) for row in demonstrations], at_once
    )
    heldout = read_rows(context.inputs["comparisons"] / "heldout.jsonl")
    texts = [ids(row["prompt"], response) for row in heldout for response in row["responses"]]
    scores = trl_trainers.scores(trainer, texts, at_once)

    # In float32 the mean of equal scores need not be their value, and the deviation from it is then above 0.
    if not normal.double().std() > 0:
        raise DivergedError(
            "the reward model gives all demonstrations one score", context.stage, "lower its learning rate"
        )
    mean, deviation = normal.mean(), normal.std()
    one_by_one = partial(trl_trainers.scores, trainer, at_once=1)
    check_padding(one_by_one, texts, scores, deviation.item(), settings.precision)
    # Outside the range of the scores of held-out responses and demonstrations, the model is guessing.
    known = (torch.cat([scores, normal]) - mean) / deviation
    config = {
        "score_mean": mean.item(),
        "score_std": deviation.item(),
        "score_low": known.min().item(),
        "score_high": known.max().item(),
        "sees": settings.sees,
        "score_max_length": settings.max_length,
    }
    trl_trainers.export(trainer, base, context, scores=True, config=config)
    metrics = accuracies(heldout, scores, settings.eval_pairs, settings.seed)
    return metrics | write_quality(context, heldout, scores, normal, texts) | {"lists": float(len(lists))}


def accuracies(sets: Sequence[Any], scores: Tensor, n_pairs: int, seed: int) -> dict[str, float]:
    """Return the accuracies of :func:`heldout_accuracy`, over all sets and by task; scores are ``[response]``."""
    metrics = heldout_accuracy(sets, scores.numpy(), n_pairs, seed)
    of_sets = scores.split([len(row["responses"]) for row in sets])
    for task, numbers in by_task(sets).items():
        its_scores = torch.cat([of_sets[number] for number in numbers]).numpy()
        alone = heldout_accuracy([sets[number] for number in numbers], its_scores, n_pairs, seed)
        # NaN where people order no pair of the task's held-out responses.
        metrics |= {f"{name}/{task}": value for name, value in alone.items() if not np.isnan(value)}
    return metrics


def training_rows(
    loss: Loss, sets: Sequence[Any], lists: Sequence[Sequence[ResponseIndex]], ids: Callable[[Any, str], list[int]]
) -> list[dict[str, Any]]:
    """Return a row for each list: token ids and strengths of its responses, and for soft losses preferences."""
    middle = float(np.mean([strength for row in sets for strength in row["strengths"]]))
    preferences = {"soft-strengths": by_strength, "soft-share": by_share}.get(loss, lambda _: None)(sets)
    rows: list[dict[str, Any]] = []
    for places in lists:
        of_places = [(sets[place.set], place.response) for place in places]
        row = {
            "ids": [ids(set_["prompt"], set_["responses"][number]) for set_, number in of_places],
            "strengths": [set_["strengths"][number] - middle for set_, number in of_places],
        }
        rows.append(row if preferences is None else row | {"preferences": preferences(places).tolist()})
    return rows


def loss_of(settings: RmSettings, scores: Tensor, lists: ListBatch) -> Tensor:
    """Return the loss ``[list]`` of lists with scores ``[list, response]``, the centring included."""
    match settings.loss:
        case "pairwise":
            loss = reward_losses.pairwise(
                scores, lists.strengths, lists.present, settings.margin, settings.label_smoothing
            )
        case "soft-strengths" | "soft-share":
            loss = reward_losses.soft(scores, lists.preferences, settings.label_smoothing)
        case "listwise":
            loss = reward_losses.listwise(scores, lists.strengths, lists.present)
        case "regression":
            loss = reward_losses.regression(scores, lists.strengths, lists.present)
    return loss + settings.centering * reward_losses.centring(scores, lists.present)
