"""Rollouts: responses sampled from an unsharded copy of the policy, laid out for the models that read them.

Generating through ZeRO-3 gathers every layer for every token; a copy that is refreshed once an iteration is many times
faster.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.config.stages import Precision
from rlhf.config.tuning import FULL, Tuning
from rlhf.models import folders, text
from rlhf.models.splitting import Peers
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.rl.masks import ended, response_mask
from rlhf.rollout.decoding import Decoder, decodes_in_slots
from rlhf.rollout.drawing import Responses, uniforms
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.sampling import sample_in_batch
from rlhf.rollout.sequences import Sequences
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, gathered, is_sharded, plain_linear, trained

TOKENS_SHOWN = 512
"""Tokens of a response of which people are shown figures."""


class Sampler(ABC):
    """Samples responses from a policy on all ranks, by an engine: take these weights, answer these prompts."""

    tokenizer: Tokenizer
    ranks: int = 1
    """Ranks that hold one copy of the policy together, and answer the same prompts."""

    @property
    def holds_weights(self) -> bool:
        """Whether the weights that were taken last are still there."""
        return True

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], noise: Tensor, *, unchanged: bool = False) -> Responses:
        """Sample a response to each prompt, each rank its share of them. A collective.

        noise      ``[sample, time]``, see :mod:`rlhf.rollout.sampling`; its width is the longest response
        unchanged  whether the policy has the weights that it had at the last call
        """
        if not (unchanged and self.holds_weights):
            self.take_weights()
        mine = group.my_rows(len(prompts), self.ranks)
        sampled = self.answer([prompts[row] for row in mine.tolist()], noise[mine])
        # One exchange for both: float64 holds every id and every float32 exactly.
        both = torch.stack([sampled.ids.double(), sampled.logprobs.double()], dim=1)
        both = group.gather_rows(both, len(prompts), self.ranks)
        return Responses(both[:, 0].long(), both[:, 1].float())

    @abstractmethod
    def take_weights(self) -> None:
        """Take the policy's present weights. A collective."""

    @abstractmethod
    def answer(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt, on this rank alone, or with those that hold the copy together.

        The arguments are those of :meth:`sample`.
        """


class Generator(Sampler):
    """Samples by transformers' models, from an unsharded copy of the policy that each rank makes when it is needed.

    A policy whose weights are whole on this rank needs no copy. The copy is made of the policy's own modules. An
    adapter is never folded into its weights: in bf16 an update below half a step of a weight would be lost, and the
    copy would not sample from the policy that is trained.

    folder   a plain folder or an adapter's
    at_once  prompts that one rank answers at a time where the model cannot decode in slots
    tuning   the method by which the policy trains
    prepare  turns the folder's model into one with the policy's weights by their names, adapters included
    source   the policy that is trained or scored with, to sample from; None reads the folder
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        temperature: float,
        at_once: int,
        *,
        fp32_head: bool = True,
        tuning: Tuning = FULL,
        prepare: Callable[[Any], Any] = lambda model: model,
        source: Any = None,
    ) -> None:
        self.tokenizer = text.load_tokenizer(folder)
        self._load = partial(folders.load_policy, folder, DTYPES[precision], fp32_head=fp32_head, tuning=tuning)
        self._temperature, self._at_once, self._prepare, self._source = temperature, at_once, prepare, source
        self._copy: Any = None
        self._model: Any = None
        self._decoder: Decoder | None = None
        self._peers: Peers | None = None

    def take_weights(self) -> None:
        """Take the policy's present weights. A collective."""
        self._model = self._present()

    def answer(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt, on this rank alone."""
        if self._decoder is None and decodes_in_slots(self._model):
            self._decoder = Decoder(self._model, peers=self._peers)
        sample = partial(sample_in_batch, self._model) if self._decoder is None else self._decoder.sample
        ends = {"eos_token_id": self.tokenizer.eos_token_id, "pad": self.tokenizer.pad_token_id}
        at_once = self._at_once if self._decoder is None else len(prompts)
        with plain_linear():
            parts = [
                sample(prompts[start : start + at_once], noise[start : start + at_once], self._temperature, **ends)
                for start in range(0, len(prompts), at_once)
            ]
        ids, logprobs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Responses(ids, logprobs)

    def _present(self) -> Any:
        """Return the policy, or the copy with its present weights. A collective."""
        if self._source is not None and not is_sharded(self._source):
            return self._source
        if self._copy is None:
            model = self._prepare(self._load())
            self._copy = model.to(group.device()).eval()
        if self._source is not None:
            # Before the first samples too: after a resume the folder's weights are not the present ones.
            for name, parameter in trained(self._source):
                with gathered([parameter]):
                    self._copy.get_parameter(name).copy_(parameter)
        return self._copy


class Samples(Protocol):
    """A policy that samples responses."""

    tokenizer: Tokenizer

    def sample(self, prompts: Sequence[list[int]], noise: Tensor, *, unchanged: bool = False) -> Responses:
        """Sample a response to each prompt. A collective.

        unchanged  whether the policy has the weights that it had at the last call
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """The samples of all ranks, ordered by global index."""

    prompts: Sequence[Prompt]
    texts: list[str]
    """The decoded responses, without the EOS that ends them."""
    sequences: Sequences
    ended: Tensor
    """``[sample]``, True where the response ended in EOS within the limit."""
    logprobs: Tensor
    """``[sample, time]``, of the responses' tokens under the distributions they were drawn from, nats."""

    @property
    def mask(self) -> Tensor:
        """Return ``[sample, time]``, True on real response tokens, EOS included."""
        return self.sequences.mask

    def with_samples(self, rows: Tensor, others: "Rollout", pad: int) -> "Rollout":
        """Return the rollout with other samples in the place of some of its own.

        rows  ``[sample]``, where the others belong, in their order
        pad   the id of padding: longer prompts may come in
        """
        mine, theirs = self.sequences, others.sequences
        width = max(mine.ids.shape[1], theirs.ids.shape[1])

        def put(name: str, padding: int) -> Tensor:
            ours, other = (
                torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0), value=padding)
                for tensor in (getattr(mine, name), getattr(theirs, name))
            )
            return ours.index_copy(0, rows, other)

        prompts, texts = list(self.prompts), list(self.texts)
        for row, prompt, written in zip(rows.tolist(), others.prompts, others.texts, strict=True):
            prompts[row], texts[row] = prompt, written
        return Rollout(
            prompts=prompts,
            texts=texts,
            sequences=Sequences(
                ids=put("ids", pad),
                attention_mask=put("attention_mask", 0),
                mask=mine.mask.index_copy(0, rows, theirs.mask),
            ),
            ended=self.ended.index_copy(0, rows, others.ended),
            logprobs=self.logprobs.index_copy(0, rows, others.logprobs),
        )

    def samples(self, scores: Tensor) -> list[dict[str, Any]]:
        """Return prompts and responses with their scores, for people to read."""
        rows = zip(self.prompts, self.texts, scores.tolist(), self.ended.tolist(), strict=True)
        names = ("prompt", "response", "score", "ended")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def samples_by_token(
        self, count: int, scores: Tensor, tokenizer: Tokenizer, kl: Tensor, advantages: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Return the first ``count`` samples, with figures of their tokens.

        Of each token, up to ``TOKENS_SHOWN``, "tokens" has its text, log policy - log reference in nats, and its
        advantage; no advantage where no model learns from the samples.

        kl, advantages  ``[sample, time]``
        """
        columns = [kl] if advantages is None else [kl, advantages]
        samples = self.samples(scores)[:count]
        for number, sample in enumerate(samples):
            real = self.mask[number].nonzero().squeeze(-1)[:TOKENS_SHOWN]
            ids = self.sequences.ids[number, -self.mask.shape[1] :][real].tolist()
            figures = ([round(value, 3) for value in each[number, real].tolist()] for each in columns)
            sample["tokens"] = list(zip(text.pieces(tokenizer, ids), *figures, strict=True))
        return samples


def roll_out(
    policy: Samples,
    batch: PromptBatch,
    seed: int,
    max_new_tokens: int,
    *,
    parts: int = 1,
    sampled: Callable[[Rollout], None] = lambda _: None,
) -> Rollout:
    """Sample a response to each prompt. A collective.

    parts    in how many parts the prompts are answered, one after the other; fewer where there are fewer prompts
    sampled  is given each part as soon as it is there
    """
    numbers = uniforms(seed, batch.samples, max_new_tokens)
    prompt_ids, prompt_mask = text.pad(batch.ids, policy.tokenizer.pad_token_id, "left")
    done: list[Rollout] = []
    for rows in torch.arange(len(batch.ids)).chunk(parts):
        part, again = slice(int(rows[0]), int(rows[-1]) + 1), {"unchanged": True} if done else {}
        responses = policy.sample(batch.ids[part], numbers[part], **again)
        done.append(_laid_out(policy.tokenizer, batch.prompts[part], prompt_ids[part], prompt_mask[part], responses))
        sampled(done[-1])
    return done[0] if len(done) == 1 else _joined(done)


def _laid_out(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], prompt_ids: Tensor, prompt_mask: Tensor, sampled: Responses
) -> Rollout:
    responses, logprobs = sampled
    mask = response_mask(responses, tokenizer.eos_token_id)
    responses = torch.where(mask, responses, tokenizer.pad_token_id)
    return Rollout(
        prompts=prompts,
        texts=[text.response_text(tokenizer, row[real].tolist()) for row, real in zip(responses, mask, strict=True)],
        sequences=Sequences(
            ids=torch.cat([prompt_ids, responses], dim=1),
            attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
            mask=mask,
        ),
        ended=ended(responses, tokenizer.eos_token_id),
        logprobs=logprobs,
    )


def _joined(parts: Sequence[Rollout]) -> Rollout:
    of_parts = [part.sequences for part in parts]
    return Rollout(
        prompts=[prompt for part in parts for prompt in part.prompts],
        texts=[one for part in parts for one in part.texts],
        sequences=Sequences(
            ids=torch.cat([one.ids for one in of_parts]),
            attention_mask=torch.cat([one.attention_mask for one in of_parts]),
            mask=torch.cat([one.mask for one in of_parts]),
        ),
        ended=torch.cat([part.ended for part in parts]),
        logprobs=torch.cat([part.logprobs for part in parts]),
    )
