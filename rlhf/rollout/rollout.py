"""Rollouts: responses sampled from an unsharded copy of the policy, laid out for the models that read them.

Generating through ZeRO-3 gathers every layer for every token; a copy, refreshed once an iteration, is many times
faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.config.stages import LoraSettings, Precision
from rlhf.models import adapters, folders, text
from rlhf.models.templates import Tokenizer
from rlhf.models.text import Prompt
from rlhf.rl.masks import ended, response_mask
from rlhf.rollout.prompts import PromptBatch
from rlhf.rollout.sampling import Responses, sample_responses, uniforms
from rlhf.rollout.sequences import Sequences
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, gathered


class Replica:
    """An unsharded copy of a policy on this rank's device, made of the same modules: an adapter stays one.

    folder  a plain folder or an adapter's
    lora    of a policy that trains adapters on top of the folder's weights
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        *,
        eos_token_id: int,
        pad_token_id: int,
        fp32_head: bool = True,
        lora: LoraSettings | None = None,
    ) -> None:
        model = folders.load_policy(folder, DTYPES[precision], fp32_head=fp32_head)
        model = adapters.with_lora(model, lora, scores=False, seed=0)
        self._model: Any = model.to(group.device()).eval()
        self._eos, self._pad = eos_token_id, pad_token_id

    @torch.no_grad()
    def refresh(self, policy: Any) -> None:
        """Copy the weights that a sharded policy trains. A collective.

        An adapter is never folded into the weights here: in bf16 an update below half a step of a weight would be lost,
        and what samples would not be what is trained.
        """
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                with gathered([parameter]):
                    self._model.get_parameter(name).copy_(parameter)

    def sample(self, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float, at_once: int) -> Responses:
        """Sample as :meth:`generate` does, each rank its share of the prompts, ``at_once`` at a time. A collective."""

        def share(rows: Tensor) -> Tensor:
            parts = [
                self.generate([prompts[row] for row in part.tolist()], uniforms[part], temperature)
                for part in rows.split(at_once)
            ]
            # One exchange for both: float64 holds every id and every float32 exactly.
            return torch.cat([torch.stack([part.ids.double(), part.logprobs.double()], dim=1) for part in parts])

        both = group.spread(len(prompts), share)
        return Responses(both[:, 0].long(), both[:, 1].float())

    def generate(self, prompts: list[list[int]], uniforms: Tensor, temperature: float) -> Responses:
        """Sample a response to each prompt.

        uniforms  ``[batch, time]``, one number a token (see :mod:`rlhf.rollout.sampling`); their width is the limit
        """
        return sample_responses(self._model, prompts, uniforms, temperature, eos_token_id=self._eos, pad=self._pad)


class Generator:
    """Samples responses from a copy of a policy on each rank, which is made when it is first needed.

    folder   a plain folder or an adapter's
    at_once  prompts that one rank answers at a time
    lora     of a policy that trains adapters on top of the folder's weights
    source   the sharded policy whose weights the copy takes before it samples; None where the folder's never change
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        temperature: float,
        at_once: int,
        *,
        fp32_head: bool = True,
        lora: LoraSettings | None = None,
        source: Any = None,
    ) -> None:
        self.tokenizer = text.load_tokenizer(folder)
        self._make = partial(
            Replica,
            folder,
            precision,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            fp32_head=fp32_head,
            lora=lora,
        )
        self._temperature, self._at_once, self._source = temperature, at_once, source
        self._replica: Replica | None = None

    def sample(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt. A collective.

        noise  ``[sample, time]``, see :mod:`rlhf.rollout.sampling`; its width is the longest response
        """
        if self._replica is None:
            self._replica = self._make()
        if self._source is not None:
            # Before the first samples too: after a resume the folder's weights are not the present ones.
            self._replica.refresh(self._source)
        return self._replica.sample(prompts, noise, self._temperature, self._at_once)


class Samples(Protocol):
    """What answers prompts."""

    tokenizer: Tokenizer

    def sample(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt. A collective."""
        ...


@dataclass(frozen=True)
class Rollout:
    """The samples of all ranks, in the order of their global index."""

    prompts: Sequence[Prompt]
    texts: list[str]
    """The responses, decoded, without the EOS that ends them."""
    sequences: Sequences
    ended: Tensor
    """``[sample]``, True where the response ended in EOS within the limit."""
    logprobs: Tensor
    """``[sample, time]``, of the responses' tokens under the distributions that they were drawn from, nats."""

    @property
    def mask(self) -> Tensor:
        """``[sample, time]``, True on real response tokens, EOS included."""
        return self.sequences.mask

    def samples(self, count: int, scores: Tensor) -> list[dict[str, Any]]:
        """The first ``count`` prompts and responses with their scores, for people to read."""
        rows = zip(self.prompts[:count], self.texts, scores.tolist(), self.ended.tolist(), strict=False)
        names = ("prompt", "response", "score", "ended")
        return [dict(zip(names, row, strict=True)) for row in rows]


def roll_out(policy: Samples, batch: PromptBatch, seed: int, max_new_tokens: int) -> Rollout:
    """Sample a response to each prompt. A collective."""
    tokenizer = policy.tokenizer
    responses, logprobs = policy.sample(batch.ids, uniforms(seed, batch.samples, max_new_tokens))
    mask = response_mask(responses, tokenizer.eos_token_id)
    responses = torch.where(mask, responses, tokenizer.pad_token_id)
    prompt_ids, prompt_mask = text.pad(batch.ids, tokenizer.pad_token_id, "left")
    return Rollout(
        prompts=batch.prompts,
        texts=[text.response_text(tokenizer, row[real].tolist()) for row, real in zip(responses, mask, strict=True)],
        sequences=Sequences(
            ids=torch.cat([prompt_ids, responses], dim=1),
            attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
            mask=mask,
        ),
        ended=ended(responses, tokenizer.eos_token_id),
        logprobs=logprobs,
    )
