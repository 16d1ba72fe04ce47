"""Reward models: a body with a scalar head, its scores, and its folder on disk."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.attempt import liveness
from rlhf.config.stages import Precision
from rlhf.config.tuning import Tuning
from rlhf.config.zero import ZeroSettings
from rlhf.models import folders, kernels, safe_loading, templates, text
from rlhf.models.capacity import AT_ONCE
from rlhf.models.heads import OwnScores, SequenceScores, initialise_head, pack_texts, unwrapped
from rlhf.models.layout import (
    ADAPTER_CONFIG,
    BASE,
    check_scored_length,
    config_file,
    config_of,
    is_adapter,
    update_json,
    virtual_tokens_in,
)
from rlhf.models.micro_batches import MicroBatch, in_order
from rlhf.models.shared_beginnings import read_beginnings_once
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.randomness import seed_of
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, STAGE_3, Engine, gathered, sharded_loading


def raw_scores(
    model: Callable[..., Tensor],
    tokenizer: Tokenizer,
    texts: Sequence[list[int]],
    at_once: MicroBatch,
    types: Sequence[list[int]] | None = None,
) -> Tensor:
    """Return the raw scores ``[text]`` of rows of token ids. A collective.

    model    a sharded :class:`SequenceScores`, or an :class:`OwnScores` where there are ``types``
    at_once  the most texts or tokens, which are padded in any case
    types    each token's type, in rows as long as those of ``texts``
    """
    lengths = torch.tensor([[0, len(ids)] for ids in texts])
    # Longest first, so that little is padding and a lack of memory appears at once.
    order = lengths[:, 1].argsort(descending=True, stable=True)
    cut = replace(at_once, packed=False).cut(order, lengths)
    parts: list[Tensor] = []
    for turn in cut:
        indices: list[int] = turn[:, group.rank()].tolist()
        batch = list(text.pad([texts[index] for index in indices], tokenizer.pad_token_id, "right"))
        if types is not None:
            batch.append(text.pad([types[index] for index in indices], 0, "right")[0])
        with torch.no_grad():
            parts.append(model(*(tensor.to(group.device()) for tensor in batch)))
        liveness.beat()
    return in_order(parts, cut, len(texts))


class FrozenReward:
    """Score texts by a reward model's folder. The policy may have another tokenizer, and the model may be an encoder.

    folder  a plain reward-model folder or an adapter's, whose ``config.json`` has ``score_mean``, ``score_std`` and
            ``sees``, and may have ``score_low`` and ``score_high``: the range of the normalised scores that the model
            gave people's responses
    engine  what :func:`load_scores` returns, or a :class:`SequenceScores` of the folder's model that is loaded already

    Raises:
        PreflightError: ``score_max_length`` is beyond the model's context, or its tokenizer lacks what it needs.
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        micro_batch: MicroBatch,
        zero: ZeroSettings = STAGE_3,
        engine: Callable[..., Tensor] | None = None,
    ) -> None:
        config = config_of(folder)
        self._mean, self._deviation = float(config["score_mean"]), float(config["score_std"])
        low, high = config.get("score_low"), config.get("score_high")
        self.range: tuple[float, float] | None = None if low is None or high is None else (low, high)
        self._response_only = config["sees"] == "response"
        self._max_length = int(config["score_max_length"])
        check_scored_length(folder)
        scores: Any = engine
        if engine is None:
            with sharded_loading(precision, zero):
                scores = load_scores(folder, DTYPES[precision])
            engine = Engine(scores, precision, zero=zero)
        self._is_decoder = not isinstance(scores, OwnScores)
        self._engine = engine
        self.tokenizer = (text.load_tokenizer if self._is_decoder else text.load_encoder_tokenizer)(folder)
        self._at_once = micro_batch.times(AT_ONCE)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Return scores ``[sample]``: 0 is the demonstrations' mean, 1 their deviation above it. A collective."""
        rows = [
            (None if self._response_only else prompt, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        if self._is_decoder:
            texts = [text.scored_ids(self.tokenizer, *row, self._max_length) for row in rows]
            types = None
        else:
            pairs = [text.encoded(self.tokenizer, *row, self._max_length) for row in rows]
            texts, types = [ids for ids, _ in pairs], [types for _, types in pairs]
        raw = raw_scores(self._engine, self.tokenizer, texts, self._at_once, types)
        return (raw - self._mean) / self._deviation


def load_scores(folder: Path, dtype: torch.dtype) -> SequenceScores | OwnScores:
    """Load a reward model's folder as the module that scores texts; errors are those of :func:`folders.load`."""
    model = folders.load(folder, scores=True, dtype=dtype)
    if not hasattr(unwrapped(model), "score"):  # a linear head on the last token's state
        return OwnScores(unwrapped(model))
    read_beginnings_once(unwrapped(model))
    return SequenceScores(model)


def is_reward_model(folder: Path) -> bool:
    """Return whether a folder holds a reward model, with a head that scores, rather than a language model."""
    return "score_mean" in config_of(folder)


def reads_messages(folder: Path) -> bool:
    """Return whether a reward model reads prompts through a chat template, which may refuse them."""
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER)
    return config_of(folder).get("sees") == "conversation" and tokenizer.chat_template is not None


def from_scratch(folder: Path, target: Path, seed: int) -> Path:
    """Write a model of the same shape and tokenizer with random weights. A collective."""
    if group.is_main() and not (target / "config.json").exists():
        # Built whole and read back sharded: transformers does not initialise what is built in shards.
        torch.manual_seed(seed_of("reward model from scratch", seed))
        config = AutoConfig.from_pretrained(folder, **safe_loading.TOKENIZER)
        # The new model has no scores that this could be the mean of: it counts as a language model.
        vars(config).pop("score_mean", None)
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
        folders.copy_tokenizer(folder, target)
    group.barrier()
    return target


def load_scorer(folder: Path, precision: Precision, tuning: Tuning, tokenizer: Tokenizer, head_seed: int) -> Any:
    """Load a model that scores, for training: a language model gets a fresh head, a reward model keeps its own."""
    kernels.fuse(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, **folders.loading_options(tuning, DTYPES[precision])
    )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    pack_texts(model)
    if not is_reward_model(folder):
        with gathered([model.score.weight], modify=True):
            if group.is_main():
                initialise_head(model.score.weight, "reward head", head_seed)
    return model


_CARD = """# A reward model

Scores are normalised: 0 is the mean of the demonstrations, and 1 lies their standard deviation above it. {sees}

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}


def tokens(text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def ids(prompt, response):
    {before}
    return [*before, *{answer}, {end}][-{longest}:]


def score(prompts, responses):
    rows = [ids(prompt, response) for prompt, response in zip(prompts, responses)]
    with torch.no_grad():
        raw = {raw}
    return (raw[:, 0].float() - {mean!r}) / {deviation!r}
```
"""
_PLAIN = "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()"
_ADAPTER = f"""from peft import PeftModel

base = AutoModelForSequenceClassification.from_pretrained(folder + "/{BASE}", num_labels=1)
model = PeftModel.from_pretrained(base, folder).eval()"""
_TOGETHER = 'model(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits'
# Behind a soft prompt, transformers takes padding for text. PEFT cannot run a classifier with a prefix itself: it asks
# for an argument by its old name.
_ONE_BY_ONE = "torch.cat([model(torch.tensor([row])).logits for row in rows])"
_AFTER_PREFIX = """torch.cat([
            model.get_base_model()(
                torch.tensor([row]), torch.ones(1, {tokens} + len(row), dtype=torch.long), cache=model.get_prompt(1)
            ).logits
            for row in rows
        ])"""
_CHAT = """messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": True}
    before = tokenizer.apply_chat_template(messages, **options)["input_ids"]"""


def complete(folder: Path) -> None:
    """Write into a reward model's folder how its texts are padded and cut, and its card.

    transformers reads the score at the last token that is not padding: a base whose pad token is its EOS token would
    score every text without its end. So a pad token of its own is written into configuration and tokenizer.

    folder  a plain folder or an adapter's, with its normaliser in ``config.json``
    """
    tokenizer = text.load_tokenizer(folder)
    config = config_of(folder)
    padding = {"pad_token_id": tokenizer.pad_token_id}
    if "text_config" in config:
        padding["text_config"] = config["text_config"] | padding
    update_json(config_file(folder), padding)
    special = folder / "special_tokens_map.json"
    if special.exists():
        update_json(special, {"pad_token": tokenizer.pad_token})
    sides = {"padding_side": "right", "truncation_side": "left", "model_max_length": config["score_max_length"]}
    named = {"chat_control_tokens": tokenizer.chat_control_tokens} if tokenizer.chat_control_tokens else {}
    file = folder / "tokenizer_config.json"
    update_json(file, sides | named | {"pad_token": tokenizer.pad_token})
    # A template that would print today's date gets the date that prompts had in training. transformers writes a
    # template into a file of its own, and reads it from tokenizer_config.json too.
    template = folder / "chat_template.jinja"
    if template.exists() and templates.prints_the_date(template.read_text(encoding="utf-8")):
        template.write_text(tokenizer.chat_template, encoding="utf-8")
    elif templates.prints_the_date(json.loads(file.read_text(encoding="utf-8")).get("chat_template")):
        update_json(file, {"chat_template": tokenizer.chat_template})
    write_card(folder)


def _scoring(folder: Path) -> str:
    tokens = virtual_tokens_in(folder)
    if not tokens:
        return _TOGETHER
    prefix = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["peft_type"] == "PREFIX_TUNING"
    return _AFTER_PREFIX.format(tokens=tokens) if prefix else _ONE_BY_ONE


def write_card(folder: Path) -> None:
    """Write ``README.md`` with the code that scores in plain transformers, for a plain folder or an adapter's."""
    tokenizer, config = text.load_tokenizer(folder), config_of(folder)
    response_only, start = config["sees"] == "response", text.text_start(tokenizer)
    plain = f"before = {start}" if response_only else f"before = {start} + tokens(prompt)"
    prefix = text.response_prefix(tokenizer)
    prefix_length = len(tokenizer(prefix, add_special_tokens=False)["input_ids"])
    card = _CARD.format(
        sees="It reads the response alone." if response_only else "It reads prompt and response.",
        load=_ADAPTER if is_adapter(folder) else _PLAIN,
        before=plain if response_only or tokenizer.chat_template is None else _CHAT,
        answer=f"tokens({prefix!r} + response)[{prefix_length}:]" if prefix else "tokens(response)",
        end=tokenizer.eos_token_id,
        raw=_scoring(folder),
        longest=config["score_max_length"],
        mean=config["score_mean"],
        deviation=config["score_std"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
