"""Demonstrations that are mixed into PPO's updates: which, is a function of the seed and the update alone."""

from pathlib import Path

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings, PtxSettings
from rlhf.errors import PreflightError
from rlhf.models.demonstrations import tokenised
from rlhf.models.templates import Tokenizer
from rlhf.randomness import stream
from rlhf.rollout.experience import Minibatch, minibatch_of
from rlhf.rollout.sequences import Sequences, lay_out


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
