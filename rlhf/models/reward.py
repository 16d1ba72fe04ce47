"""The frozen reward model: one normalised score a response."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf.config.training import Precision
from rlhf.models import folders, text
from rlhf.models.heads import SequenceScores, initialise_head
from rlhf.models.text import Prompt, Tokenizer
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, Engine, gathered, sharded_loading


def raw_scores(
    model: Callable[[Tensor, Tensor], Tensor],
    tokenizer: Tokenizer,
    texts: Sequence[list[int]],
    micro_batch_size: int,
) -> Tensor:
    """Raw scores ``[text]`` of rows of token ids, by a sharded :class:`SequenceScores`. A collective."""
    # Longest first, so that little is padding and a lack of memory shows at once.
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))

    def compute(rows: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for part in rows.split(micro_batch_size):
            ids, mask = text.pad([texts[order[row]] for row in part.tolist()], tokenizer.pad_token_id, "right")
            parts.append(model(ids.to(group.device()), mask.to(group.device())))
        return torch.cat(parts)

    scores = torch.empty(len(texts))
    with torch.no_grad():
        scores[order] = group.spread(len(order), compute)
    return scores


class FrozenReward:
    """A reward model's folder, scoring text: the policy may have another tokenizer.

    folder  a plain reward-model folder whose ``config.json`` has ``score_mean``, ``score_std`` and ``sees``, and may
            have ``score_low`` and ``score_high``: the range of the normalised scores that it gave people's responses
    """

    def __init__(self, folder: Path, precision: Precision, micro_batch_size: int) -> None:
        config = folders.config_of(folder)
        self._mean, self._deviation = float(config["score_mean"]), float(config["score_std"])
        low, high = config.get("score_low"), config.get("score_high")
        self.range: tuple[float, float] | None = None if low is None or high is None else (low, high)
        self._alone = config["sees"] == "response"
        self._max_length = int(config["score_max_length"])
        self.tokenizer = text.load_tokenizer(folder)
        with sharded_loading(precision):
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[precision], num_labels=1)
        self._engine = Engine(SequenceScores(model), precision)
        self._micro_batch_size = micro_batch_size

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Scores ``[sample]``: 0 is the demonstrations' mean, 1 their deviation. A collective."""
        texts = [
            text.scored_ids(self.tokenizer, None if self._alone else prompt, response, self._max_length)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        raw = raw_scores(self._engine, self.tokenizer, texts, self._micro_batch_size)
        return (raw - self._mean) / self._deviation


def load_scorer(folder: Path, precision: Precision, tokenizer: Tokenizer, head_seed: int) -> Any:
    """A base model with a fresh score head in place of its language head, for training."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[precision], num_labels=1)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    with gathered([model.score.weight], modify=True):
        if group.is_main():
            initialise_head(model.score.weight, head_seed)
    return model
