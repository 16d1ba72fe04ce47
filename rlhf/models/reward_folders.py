"""What lets a reward model's folder score in plain transformers as it does here: padding, truncation, and a card."""

import json
from pathlib import Path
from typing import Any

from rlhf.models import templates, text
from rlhf.models.layout import BASE, config_file, config_of, is_adapter
from rlhf.models.templates import Tokenizer

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
    batch = tokenizer.pad({{"input_ids": rows}}, return_tensors="pt")
    with torch.no_grad():
        return (model(**batch).logits[:, 0].float() - {mean!r}) / {deviation!r}
```
"""
_PLAIN = "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()"
_ADAPTER = f"""from peft import PeftModel

base = AutoModelForSequenceClassification.from_pretrained(folder + "/{BASE}", num_labels=1)
model = PeftModel.from_pretrained(base, folder).eval()"""
_CHAT = """messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": True}
    before = tokenizer.apply_chat_template(messages, **options)["input_ids"]"""


def complete(folder: Path) -> None:
    """Have a reward model's folder say how its texts are padded and cut, and write its card.

    transformers reads the score at the last token that is not padding: a base whose pad token is its EOS token would
    score every text without its end. So a pad token of its own is written into configuration and tokenizer.

    folder  a plain folder or an adapter's, with its normaliser in ``config.json``
    """
    tokenizer = text.load_tokenizer(folder)
    config = config_of(folder)
    padding = {"pad_token_id": tokenizer.pad_token_id}
    if "text_config" in config:
        padding["text_config"] = config["text_config"] | padding
    _update(config_file(folder), padding)
    special = folder / "special_tokens_map.json"
    if special.exists():
        _update(special, {"pad_token": tokenizer.pad_token})
    sides = {"padding_side": "right", "truncation_side": "left", "model_max_length": config["score_max_length"]}
    named = {"chat_control_tokens": tokenizer.chat_control_tokens} if tokenizer.chat_control_tokens else {}
    _update(folder / "tokenizer_config.json", sides | named | {"pad_token": tokenizer.pad_token})
    _stop_the_clock(folder, tokenizer)
    write_card(folder)


def _stop_the_clock(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the date that prompts had in training into a template that would print today's."""
    # transformers writes a template into a file of its own, and reads it from tokenizer_config.json too.
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.exists() and templates.prints_the_date(template.read_text(encoding="utf-8")):
        template.write_text(tokenizer.chat_template, encoding="utf-8")
    elif templates.prints_the_date(json.loads(config.read_text(encoding="utf-8")).get("chat_template")):
        _update(config, {"chat_template": tokenizer.chat_template})


def write_card(folder: Path) -> None:
    """Write ``README.md`` with the code that scores in plain transformers, in the form that the folder has."""
    tokenizer, config = text.load_tokenizer(folder), config_of(folder)
    alone, start = config["sees"] == "response", text.text_start(tokenizer)
    plain = f"before = {start}" if alone else f"before = {start} + tokens(prompt)"
    opening = text.opening(tokenizer)
    skipped = len(tokenizer(opening, add_special_tokens=False)["input_ids"])
    card = _CARD.format(
        sees="It reads the response alone." if alone else "It reads prompt and response.",
        load=_ADAPTER if is_adapter(folder) else _PLAIN,
        before=plain if alone or tokenizer.chat_template is None else _CHAT,
        answer=f"tokens({opening!r} + response)[{skipped}:]" if opening else "tokens(response)",
        end=tokenizer.eos_token_id,
        longest=config["score_max_length"],
        mean=config["score_mean"],
        deviation=config["score_std"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _update(path: Path, entries: dict[str, Any]) -> None:
    content = json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries, indent=2, ensure_ascii=False)
    path.unlink()  # it may be a link to a file of the base's, which stays as it is
    path.write_text(content, encoding="utf-8")
