"""The frozen reward model: one normalised score a response."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.attempt import liveness
from rlhf.config.training import Precision
from rlhf.models import folders, safe_loading, text
from rlhf.models.heads import OwnScores, SequenceScores, initialise_head, pack_texts, scores_at_last_token, unwrapped
from rlhf.models.layout import config_of
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.randomness import seed_of
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, Engine, gathered, sharded_loading


def raw_scores(
    model: Callable[..., Tensor],
    tokenizer: Tokenizer,
    texts: Sequence[list[int]],
    micro_batch_size: int,
    types: Sequence[list[int]] | None = None,
) -> Tensor:
    """Raw scores ``[text]`` of rows of token ids. A collective.

    model  a sharded :class:`SequenceScores`, or an :class:`OwnScores` where there are ``types``
    types  each token's type, in rows as long as those of ``texts``
    """
    # Longest first, so that little is padding and a lack of memory shows at once.
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))

    def compute(rows: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for part in rows.split(micro_batch_size):
            which = [order[row] for row in part.tolist()]
            ids, mask = text.pad([texts[index] for index in which], tokenizer.pad_token_id, "right")
            given = [ids, mask] if types is None else [ids, mask, text.pad([types[i] for i in which], 0, "right")[0]]
            parts.append(model(*(tensor.to(group.device()) for tensor in given)))
            liveness.beat()
        return torch.cat(parts)

    scores = torch.empty(len(texts))
    with torch.no_grad():
        scores[order] = group.spread(len(order), compute)
    return scores


class FrozenReward:
    """A reward model's folder, scoring text: the policy may have another tokenizer, and the reward model may be an
    encoder.

    folder  a plain reward-model folder or an adapter's, whose ``config.json`` has ``score_mean``, ``score_std`` and
            ``sees``, and may have ``score_low`` and ``score_high``: the range of the normalised scores that it gave
            people's responses

    Raises:
        PreflightError: it says that it scores longer texts than it takes, or its tokenizer lacks what it needs.
    """

    def __init__(self, folder: Path, precision: Precision, micro_batch_size: int) -> None:
        config = config_of(folder)
        self._mean, self._deviation = float(config["score_mean"]), float(config["score_std"])
        low, high = config.get("score_low"), config.get("score_high")
        self.range: tuple[float, float] | None = None if low is None or high is None else (low, high)
        self._alone = config["sees"] == "response"
        self._max_length = int(config["score_max_length"])
        text.check_scored_length(folder)
        with sharded_loading(precision):
            model = folders.load(folder, scores=True, dtype=DTYPES[precision])
        self._decodes = scores_at_last_token(model)
        self.tokenizer = text.load_tokenizer(folder) if self._decodes else text.load_encoder_tokenizer(folder)
        self._engine = Engine(SequenceScores(model) if self._decodes else OwnScores(unwrapped(model)), precision)
        self._micro_batch_size = micro_batch_size

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Scores ``[sample]``: 0 is the demonstrations' mean, 1 their deviation. A collective."""
        rows = [
            (None if self._alone else prompt, response) for prompt, response in zip(prompts, responses, strict=True)
        ]
        if self._decodes:
            texts = [text.scored_ids(self.tokenizer, *row, self._max_length) for row in rows]
            types = None
        else:
            both = [text.encoded(self.tokenizer, *row, self._max_length) for row in rows]
            texts, types = [ids for ids, _ in both], [kinds for _, kinds in both]
        raw = raw_scores(self._engine, self.tokenizer, texts, self._micro_batch_size, types)
        return (raw - self._mean) / self._deviation


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a reward model, with a head that scores, rather than a language model."""
    return "score_mean" in config_of(folder)


def from_scratch(folder: Path, target: Path, seed: int) -> Path:
    """Write a model of the same shape and tokenizer with random weights. A collective."""
    if group.is_main() and not (target / "config.json").exists():
        # Built whole and read back sharded: transformers does not initialise what is built in shards.
        torch.manual_seed(seed_of("reward model from scratch", seed))
        config = AutoConfig.from_pretrained(folder, **safe_loading.TOKENIZER)
        # What a reward model says of its scores is not true of the new one.
        vars(config).pop("score_mean", None)
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
        folders.copy_tokenizer(folder, target)
    group.barrier()
    return target


def load_scorer(folder: Path, precision: Precision, tokenizer: Tokenizer, head_seed: int) -> Any:
    """A model that scores, for training: a language model gets a fresh head, a reward model keeps its own."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=DTYPES[precision], num_labels=1, **safe_loading.MODEL
    )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    pack_texts(model)
    if is_reward_model(folder):
        return model
    with gathered([model.score.weight], modify=True):
        if group.is_main():
            initialise_head(model.score.weight, "reward head", head_seed)
    return model
