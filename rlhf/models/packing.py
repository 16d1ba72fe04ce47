"""Pack tokenised rows into one row without padding, where a model's attention keeps them apart.

Most of transformers' decoders let each text of a row see itself alone when there is no attention mask and the position
ids begin anew with each text (``transformers.masking_utils``; flash attention goes by the same ids).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from rlhf.data.records import read_rows
from rlhf.models.templates import Tokenizer
from rlhf.models.text import demonstration_ids

PACKABLE = frozenset(
    {
        "apertus",
        "arcee",
        "codegen",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""The model types that keep texts of one row apart, as a test sees of each: OPT or gpt-oss read on, without a word."""


def keeps_texts_apart(config: Any) -> bool:
    """Return whether a model with this configuration computes of a packed text what it computes of the text alone.

    config  transformers' configuration of the model
    """
    # ALiBi adds the place in the row, in bf16: the later a text begins, the coarser its own places become.
    return config.model_type in PACKABLE and not getattr(config, "alibi", False)


class PackedTexts(NamedTuple):
    """Texts in R rows of T tokens; what fills a row's end is a text that nobody reads."""

    ids: Tensor
    """``[R, T]``"""
    positions: Tensor
    """``[R, T]``: a token's place in its text."""
    ends: Tensor
    """``[text]``: where the text's last token stands in ``ids.flatten()``."""


def pack(ids: Tensor, attention_mask: Tensor) -> PackedTexts:
    """Pack texts ``[batch, time]``, padded on the right, into as few rows of the longest text's length as are found."""
    lengths = attention_mask.sum(-1).tolist()
    rows, width = rows_of(lengths), max(lengths)
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
    """Texts in rows that are no longer than the longest text, by first fit decreasing.

    That takes at most 11/9 of the fewest rows possible, and one (Dósa, ESCAPE 2007, doi:10.1007/978-3-540-74450-4_1).
    """
    width = max(lengths)
    room: list[int] = []
    rows: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(room) if left >= lengths[text]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(text)
        room[row] -= lengths[text]
    return rows


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
