"""Tokenise demonstrations, and pack texts into rows without padding where a model's attention keeps them apart.

Most of transformers' decoders let each text of a row see itself alone when there is no attention mask and the position
ids restart with each text (``transformers.masking_utils``; flash attention uses the same ids).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from rlhf.data.mixture import Mixture, by_task
from rlhf.data.records import read_rows
from rlhf.models.templates import Tokenizer
from rlhf.models.text import plain_text, prompt_ids, response_ids


class PackedTexts(NamedTuple):
    """Texts in R rows of T tokens; a text that nothing reads fills a row's end."""

    ids: Tensor
    """``[R, T]``"""
    positions: Tensor
    """``[R, T]``: a token's place in its text."""
    ends: Tensor
    """``[text]``: the index of the text's last token in ``ids.flatten()``."""


def pack(ids: Tensor, attention_mask: Tensor, *, in_one_row: bool = False) -> PackedTexts:
    """Pack texts ``[batch, time]``, padded on the right, into few rows of the longest text's length, or into one."""
    lengths = attention_mask.sum(-1).tolist()
    rows = [list(range(len(lengths)))] if in_one_row else rows_of(lengths)
    width = sum(lengths) if in_one_row else max(lengths)
    source = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    ends = torch.empty(len(lengths), dtype=torch.long)
    for row, texts in enumerate(rows):
        filled = 0
        for text in texts:
            part, place = slice(filled, filled + lengths[text]), torch.arange(lengths[text])
            source[row, part] = place + text * ids.shape[1]
            positions[row, part] = place
            filled = part.stop
            ends[text] = row * width + filled - 1
        positions[row, filled:] = torch.arange(width - filled)
    return PackedTexts(ids.flatten()[source.to(ids.device)], positions.to(ids.device), ends.to(ids.device))


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Distribute texts among rows of the longest text's length."""
    return bins(lengths, max(lengths))


def bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Distribute texts among rows of at most ``room`` tokens, or the longest text's, by first fit decreasing.

    That takes at most 11/9 of the fewest rows possible, and one (Dósa, ESCAPE 2007, doi:10.1007/978-3-540-74450-4_1).
    """
    rows: list[list[int]] = [[] for _ in lengths]
    left = [max(room, *lengths)] * len(rows)
    for text in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next(row for row, tokens in enumerate(left) if tokens >= lengths[text])
        rows[row].append(text)
        left[row] -= lengths[text]
    return [row for row in rows if row]


class TokenisedDemonstration(NamedTuple):
    """Token ids of a prompt, and of the completion to be learned, EOS included."""

    prompt: list[int]
    completion: list[int]

    @property
    def length(self) -> int:
        """Return the number of tokens of both."""
        return len(self.prompt) + len(self.completion)


def tokenised(file: Path, tokenizer: Tokenizer) -> list[TokenisedDemonstration]:
    """Read a JSONL file of demonstrations as token ids.

    Raises:
        RecordError: as :func:`rlhf.models.text.prompt_ids`.
    """
    rows: list[TokenisedDemonstration] = []
    for number, row in enumerate(read_rows(file), start=1):
        prompt = prompt_ids(tokenizer, row["prompt"], f"{file.parent.name}/{file.name}, row {number}")
        rows.append(TokenisedDemonstration(prompt, response_ids(tokenizer, plain_text(row["completion"]))))
    return rows


def training_demonstrations(file: Path, tokenizer: Tokenizer, seed: int) -> Dataset:
    """Read the demonstrations of an epoch for TRL's trainer, those of a task as often as its weight says."""
    return as_dataset(file, tokenizer).select(Mixture(read_rows(file)).epoch(seed))


def heldout_demonstrations(file: Path, tokenizer: Tokenizer) -> Dataset | dict[str, Dataset]:
    """Read held-out demonstrations for TRL's trainer, those of each task by themselves where there are tasks."""
    data, tasks = as_dataset(file, tokenizer), by_task(read_rows(file))
    return {task: data.select(rows) for task, rows in tasks.items()} or data


def as_dataset(file: Path, tokenizer: Tokenizer) -> Dataset:
    """Read a JSONL file of demonstrations for TRL's trainer: ids, and a mask that is 1 on completions."""
    rows = tokenised(file, tokenizer)
    return Dataset.from_list(
        [
            {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}
            for prompt, completion in rows
        ]
    )
