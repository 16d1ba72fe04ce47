"""Let a folder's policy answer outside of stages: all prompts at once, or one prompt a token at a time."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rlhf.errors import RequestError
from rlhf.models import folders, text
from rlhf.models.layout import config_of, context_length, virtual_tokens_in
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.rl.masks import response_mask
from rlhf.rollout.drawing import uniforms
from rlhf.rollout.sampling import drawn_tokens, sample_responses


class Answer:
    """An answer that is being written: iterate over it for the pieces of its text, which add up to ``text``.

    A character that several tokens write is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Iterator[Tensor]) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens
        self._ids: list[int] = []

    @property
    def text(self) -> str:
        """The text of the tokens that were written so far."""
        return text.response_text(self._tokenizer, self._ids)

    @property
    def has_ended(self) -> bool:
        """Whether the policy ended the answer, by EOS."""
        return self._ids[-1:] == [self._tokenizer.eos_token_id]

    def __iter__(self) -> Iterator[str]:
        """Yield pieces, at most one a token; an answer that the reader leaves keeps the tokens that it has."""
        shown = ""
        for token in self._tokens:
            self._ids.append(int(token))
            if self.has_ended:
                break
            whole = self.text.rstrip("\ufffd")
            if whole != shown and whole.startswith(shown):
                yield whole.removeprefix(shown)
                shown = whole
        yield self.text[len(shown) :]


class Speaker:
    """A folder's policy that answers, unsharded, in fp32, on the GPU where there is one.

    The answer to prompt number n has the random numbers of sample n, by :meth:`answers` and :meth:`answer` alike. On a
    CPU the tokens are the same but for rounding too small to have changed a response.
    """

    def __init__(self, folder: Path) -> None:
        disable_progress_bar()
        self.tokenizer = text.load_tokenizer(folder)
        self.context = context_length(config_of(folder)) - virtual_tokens_in(folder)
        """The longest prompt and answer together, in tokens."""
        self._folder = folder

    @cached_property
    def _model(self) -> Any:
        """The model, loaded at its first use: prompts that do not fit are refused before."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return folders.load_policy(self._folder, torch.float32).eval().to(device)

    def prompt_ids(self, prompt: Prompt, max_new_tokens: int, place: str) -> list[int]:
        """Return the ids that an answer to the prompt follows.

        place  of the prompt, for messages

        Raises:
            RequestError: the prompt and the longest answer do not fit the context; or its subclass RecordError, as
                :func:`rlhf.models.text.prompt_ids`.
        """
        ids = text.prompt_ids(self.tokenizer, prompt, place)
        if len(ids) + max_new_tokens <= self.context:
            return ids
        room = self.context - len(ids)
        raise RequestError(
            f"a prompt of {len(ids)} and an answer of {max_new_tokens} tokens do not fit the context of {self.context}",
            place,
            f"shorten it, or --max-new-tokens {room}" if room > 0 else "shorten it",
        )

    def answer(self, ids: list[int], temperature: float, max_new_tokens: int, seed: int, sample: int = 0) -> Answer:
        """Return the answer to a prompt of :meth:`prompt_ids`, which is written while it is read."""
        numbers = uniforms(seed, [sample], max_new_tokens)
        steps = drawn_tokens(self._model, [ids], numbers, temperature, pad=self.tokenizer.pad_token_id)
        return Answer(self.tokenizer, (tokens for tokens, _ in steps))

    def answers(
        self, prompts: Sequence[Prompt], temperature: float, max_new_tokens: int, seed: int, first: int = 0
    ) -> list[str]:
        """Return the answers to prompts, sampled as in training; temperature 0 is greedy.

        first  number of the first prompt

        Raises:
            RequestError: as :meth:`prompt_ids`.
        """
        rows = [
            self.prompt_ids(prompt, max_new_tokens, f"prompt {number}")
            for number, prompt in enumerate(prompts, start=first + 1)
        ]
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        numbers = uniforms(seed, range(first, first + len(prompts)), max_new_tokens)
        responses = sample_responses(self._model, rows, numbers, temperature, eos_token_id=eos, pad=pad)
        mask = response_mask(responses.ids, eos)
        return [
            text.response_text(self.tokenizer, ids[real].tolist())
            for ids, real in zip(responses.ids, mask, strict=True)
        ]
