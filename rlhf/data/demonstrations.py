"""Demonstrations as TRL's trainer takes them."""

from pathlib import Path

from datasets import Dataset

from rlhf.data.jsonl import read_rows
from rlhf.models.text import Tokenizer, as_messages, plain_text


def as_dataset(file: Path, tokenizer: Tokenizer) -> Dataset:
    """Prompt-completion rows: conversations where the tokenizer has a chat template, plain text otherwise."""
    rows = read_rows(file)
    if tokenizer.chat_template is None:
        return Dataset.from_list(
            [{"prompt": plain_text(row["prompt"]), "completion": plain_text(row["completion"])} for row in rows]
        )
    return Dataset.from_list(
        [
            {
                "prompt": as_messages(row["prompt"]),
                "completion": [{"role": "assistant", "content": row["completion"]}]
                if isinstance(row["completion"], str)
                else row["completion"],
            }
            for row in rows
        ]
    )
