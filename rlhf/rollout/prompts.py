"""Prompts and demonstrations that PPO draws in each iteration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings, PtxSettings
from rlhf.data.records import read_rows
from rlhf.errors import PreflightError
from rlhf.models import text
from rlhf.models.packing import tokenised
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.randomness import stream
from rlhf.rollout.sequences import Minibatch, Sequences, lay_out, minibatch_of


@dataclass(frozen=True)
class PromptBatch:
    """Prompts with their ids and their samples' global indices, which name the randomness of each response."""

    prompts: list[Prompt]
    ids: list[list[int]]
    samples: list[int]


class PromptStream:
    """Prompts in shuffled passes over a JSONL file, a new order each pass."""

    def __init__(self, file: Path, tokenizer: Tokenizer, max_length: int, seed: int = 0) -> None:
        self._prompts = read_prompts(file)
        self._seed = seed
        place = f"{file.parent.name}/{file.name}"
        self._ids = [
            text.prompt_ids(tokenizer, prompt, f"{place}, row {number}")
            for number, prompt in enumerate(self._prompts, start=1)
        ]
        check_lengths(self._ids, place, max_length)

    def batch(self, iteration: int, size: int) -> PromptBatch:
        """The ``size`` prompts of an iteration."""
        samples = list(range(iteration * size, (iteration + 1) * size))
        count = len(self._prompts)
        turns = {sample // count for sample in samples}
        orders = {turn: stream("prompts", self._seed, turn).permutation(count) for turn in turns}
        rows = [int(orders[sample // count][sample % count]) for sample in samples]
        return PromptBatch([self._prompts[row] for row in rows], [self._ids[row] for row in rows], samples)

    def first(self, size: int) -> PromptBatch:
        """The first ``size`` prompts of the file, or all of them where there are fewer."""
        rows = list(range(min(size, len(self._prompts))))
        return PromptBatch(self._prompts[:size], self._ids[:size], rows)


def draw(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """So many of the prompts, or all, in an order of the seed's."""
    return [prompts[row] for row in stream("collected prompts", seed).permutation(len(prompts))[:count]]


def prompt_batch(prompts: list[Prompt], samples: Sequence[int], tokenizer: Tokenizer, max_length: int) -> PromptBatch:
    """Prompts given by whoever asks, as a batch.

    Raises:
        PreflightError: one is longer than ``max_length`` tokens.
    """
    ids = [text.prompt_ids(tokenizer, prompt) for prompt in prompts]
    check_lengths(ids, "the prompts", max_length)
    return PromptBatch(prompts, ids, list(samples))


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a JSONL file that the data stage wrote."""
    return [row["prompt"] for row in read_rows(file)]


def check_lengths(ids: Sequence[list[int]], place: str, max_length: int) -> None:
    """Refuse prompts longer than ``max_length`` tokens.

    place  where they stand, for messages

    Raises:
        PreflightError: naming the longest prompt and how many are too long.
    """
    lengths = [len(row) for row in ids]
    over = sum(length > max_length for length in lengths)
    if over:
        longest = int(np.argmax(lengths))
        raise PreflightError(
            f"{over} of {len(lengths)} prompts are longer than {max_length} tokens; the longest has {lengths[longest]}",
            f"{place}, row {longest + 1}",
            "raise max_prompt_length of the stage (within the model's context), or shorten the prompts",
        )


class DemonstrationStream:
    """Demonstrations in shuffled passes over a JSONL file."""

    def __init__(self, file: Path, tokenizer: Tokenizer, settings: PtxSettings, seed: int) -> None:
        rows = tokenised(file, tokenizer)
        # Cut at the end, prompts included: a prompt that fills the length leaves nothing to learn.
        room = [(prompt, completion[: max(0, settings.max_length - len(prompt))]) for prompt, completion in rows]
        kept = [(prompt, completion) for prompt, completion in room if completion]
        self.cut = sum(row.length > settings.max_length for row in rows)
        self.left_out = len(rows) - len(kept)
        if not kept:
            raise PreflightError(
                f"all {len(rows)} demonstrations have prompts of {settings.max_length} tokens or more",
                f"{file.parent.name}/{file.name}",
                "raise ptx.max_length",
            )
        self._sequences: Sequences = lay_out(
            [prompt for prompt, _ in kept], [completion for _, completion in kept], tokenizer.pad_token_id
        )
        self._settings, self._seed = settings, seed

    @classmethod
    def of(cls, context: Context[PpoSettings], tokenizer: Tokenizer) -> "DemonstrationStream | None":
        """The stream that a run of PPO asks for, or None where it mixes nothing in."""
        settings = context.settings
        if not settings.ptx.coef:
            return None
        return cls(context.inputs["demonstrations"] / "train.jsonl", tokenizer, settings.ptx, settings.seed)

    def minibatch(self, update: int, micro_batch_size: int) -> Minibatch[Sequences]:
        """The demonstrations of an update, counted from 0."""
        count, size = len(self._sequences.ids), self._settings.batch_size
        places = range(update * size, (update + 1) * size)
        turns = {place // count for place in places}
        orders = {turn: stream("demonstrations in PPO", self._seed, turn).permutation(count) for turn in turns}
        rows = [int(orders[place // count][place % count]) for place in places]
        return minibatch_of(self._sequences, rows, micro_batch_size)
