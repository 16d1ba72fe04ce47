"""Demonstrations as token ids: what sft learns from, and what PPO mixes in."""

from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from rlhf.data.jsonl import read_rows
from rlhf.models.templates import Tokenizer
from rlhf.models.text import demonstration_ids


class TokenisedDemonstration(NamedTuple):
    """Token ids of a prompt, and of the completion that is learned, EOS included."""

    prompt: list[int]
    completion: list[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.completion)


def tokenised(file: Path, tokenizer: Tokenizer) -> list[TokenisedDemonstration]:
    """Read a JSONL file of demonstrations as token ids.

    Raises:
        RecordError: the chat template does not render a row as it is, see :func:`rlhf.models.text.prompt_ids`.
    """
    place = f"{file.parent.name}/{file.name}"
    return [
        TokenisedDemonstration(
            *demonstration_ids(tokenizer, row["prompt"], row["completion"], f"{place}, row {number}")
        )
        for number, row in enumerate(read_rows(file), start=1)
    ]


def as_dataset(file: Path, tokenizer: Tokenizer) -> Dataset:
    """Return a JSONL file's demonstrations as TRL's trainer takes them: ids, and a mask that is 1 on completions."""
    return Dataset.from_list(
        [
            {
                "input_ids": [*prompt, *completion],
                "completion_mask": [0] * len(prompt) + [1] * len(completion),
            }
            for prompt, completion in tokenised(file, tokenizer)
        ]
    )
