"""Prompts and demonstrations that a policy-gradient stage draws in each iteration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rlhf.attempt.context import Context
from rlhf.config.policy_gradient import PolicyGradientSettings, PtxSettings
from rlhf.data.mixture import Mixture
from rlhf.data.records import read_rows
from rlhf.errors import PreflightError
from rlhf.models import text
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.packing import tokenised
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.randomness import stream
from rlhf.rollout.sequences import Minibatch, Sequences, lay_out, minibatch_of

WATCHED = 4
"""Prompts that are answered through all of a run."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts, their token ids, and their samples' global indices, which key each response's random numbers."""

    prompts: list[Prompt]
    ids: list[list[int]]
    samples: list[int]


class PromptStream:
    """Prompts in shuffled passes over a JSONL file, a new order each pass, tasks by their weights."""

    def __init__(self, file: Path, tokenizer: Tokenizer, max_length: int, seed: int = 0) -> None:
        rows = read_rows(file)
        self._prompts: list[Prompt] = [row["prompt"] for row in rows]
        self._mixture = Mixture(rows)
        self._seed = seed
        place = f"{file.parent.name}/{file.name}"
        self._ids = [
            text.prompt_ids(tokenizer, prompt, f"{place}, row {number}")
            for number, prompt in enumerate(self._prompts, start=1)
        ]
        check_lengths(self._ids, place, max_length)

    def batch(self, iteration: int, size: int, repeats: int = 1) -> PromptBatch:
        """Return the ``size`` prompts of an iteration.

        repeats  how often each prompt follows itself, every time with random numbers of its own; divides ``size``
        """
        samples = range(iteration * size, (iteration + 1) * size)
        places = range(samples.start // repeats, samples.stop // repeats)
        drawn = _rows_of_passes("prompts", self._seed, self._mixture, places)
        rows = [row for row in drawn for _ in range(repeats)]
        return PromptBatch([self._prompts[row] for row in rows], [self._ids[row] for row in rows], list(samples))

    def further(self, draw: int, size: int, most: int, repeats: int) -> PromptBatch:
        """Return prompts beside those of the iterations, whose order stays as it is: a function of the draw's number.

        draw     its number in the run, from 0
        size     responses of this draw
        most     responses that a draw may have
        repeats  as of :meth:`batch`
        """
        start = draw * (most // repeats)
        rows = _rows_of_passes("further prompts", self._seed, self._mixture, range(start, start + size // repeats))
        rows = [row for row in rows for _ in range(repeats)]
        # Those of iterations count up from 0.
        samples = [-1 - draw * most - number for number in range(size)]
        return PromptBatch([self._prompts[row] for row in rows], [self._ids[row] for row in rows], samples)

    def watched(self) -> PromptBatch:
        """Return a few prompts that people see answered again and again, with the same random numbers."""
        rows = stream("watched prompts", self._seed).permutation(len(self._prompts))[:WATCHED].tolist()
        return PromptBatch(
            [self._prompts[row] for row in rows], [self._ids[row] for row in rows], list(range(len(rows)))
        )

    def first(self, size: int) -> PromptBatch:
        """Return the first ``size`` prompts of the file, or all of them where there are fewer."""
        return PromptBatch(self._prompts[:size], self._ids[:size], list(range(min(size, len(self._prompts)))))


def _rows_of_passes(
    name: Literal["prompts", "further prompts", "demonstrations in PPO"], seed: int, mixture: Mixture, places: range
) -> list[int]:
    """Return the rows at ``places`` of endless shuffled passes over a mixture, a new order each pass."""
    count = mixture.size
    turns = {place // count for place in places}
    orders = {turn: mixture.epoch(seed, turn)[stream(name, seed, turn).permutation(count)] for turn in turns}
    return [int(orders[place // count][place % count]) for place in places]


def draw(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """Return at most ``count`` prompts, shuffled by ``seed``."""
    return [prompts[row] for row in stream("collected prompts", seed).permutation(len(prompts))[:count]]


def prompt_batch(prompts: list[Prompt], samples: Sequence[int], tokenizer: Tokenizer, max_length: int) -> PromptBatch:
    """Make a batch of given prompts; errors are those of :func:`check_lengths`."""
    ids = [text.prompt_ids(tokenizer, prompt) for prompt in prompts]
    check_lengths(ids, "the prompts", max_length)
    return PromptBatch(prompts, ids, list(samples))


def read_prompts(file: Path) -> list[Prompt]:
    """Read the prompts of a JSONL file that the data stage wrote."""
    return [row["prompt"] for row in read_rows(file)]


def check_lengths(ids: Sequence[list[int]], place: str, max_length: int) -> None:
    """Refuse prompts longer than ``max_length`` tokens.

    place  the prompts' file, for messages

    Raises:
        PreflightError: naming the longest prompt and the number of prompts that are too long.
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

    def __init__(
        self, file: Path, tokenizer: Tokenizer, settings: PtxSettings, seed: int, micro_batch: MicroBatch
    ) -> None:
        rows = tokenised(file, tokenizer)
        # Cut at the end, prompts included: a prompt of the full length leaves nothing to learn.
        room = [(prompt, completion[: max(0, settings.max_length - len(prompt))]) for prompt, completion in rows]
        kept = [(prompt, completion) for prompt, completion in room if completion]
        self._mixture = Mixture(row for row, (_, completion) in zip(read_rows(file), room, strict=True) if completion)
        self.cut = sum(row.length > settings.max_length for row in rows)
        self.left_out = len(rows) - len(kept)
        if not kept:
            raise PreflightError(
                f"all {len(rows)} demonstrations have prompts of {settings.max_length} tokens or more",
                f"{file.parent.name}/{file.name}",
                "raise ptx.max_length",
            )
        prompts, completions = zip(*kept, strict=True)
        self._sequences: Sequences = lay_out(prompts, completions, tokenizer.pad_token_id)
        self._settings, self._seed, self._micro_batch = settings, seed, micro_batch

    @classmethod
    def of(cls, context: Context[PolicyGradientSettings], tokenizer: Tokenizer) -> "DemonstrationStream | None":
        """Return the stream for a run of PPO, or None where it mixes no demonstrations in."""
        settings = context.settings
        if not settings.ptx.coef:
            return None
        file = context.inputs["demonstrations"] / "train.jsonl"
        return cls(file, tokenizer, settings.ptx, settings.seed, MicroBatch.of(settings))

    def minibatch(self, update: int) -> Minibatch[Sequences]:
        """Return the demonstrations of an update, counted from 0."""
        size = self._settings.batch_size
        places = range(update * size, (update + 1) * size)
        rows = _rows_of_passes("demonstrations in PPO", self._seed, self._mixture, places)
        return minibatch_of(self._sequences, rows, self._micro_batch)
