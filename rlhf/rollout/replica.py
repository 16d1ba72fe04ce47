"""Generation from an unsharded copy of the policy.

Generating through ZeRO-3 gathers every layer for every token; a copy, refreshed once an iteration, is many times
faster.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from rlhf.config.training import Precision
from rlhf.models import text, trust
from rlhf.pipeline import pulse
from rlhf.rollout.sampling import InverseTransformSampling
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, gathered


class Replica:
    """An unsharded copy of a policy on this rank's device, with any adapter folded in."""

    def __init__(self, folder: Path, precision: Precision, *, eos_token_id: int, pad_token_id: int) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], **trust.MODEL)
        self._model = model.to(group.device()).eval()
        self._eos, self._pad = eos_token_id, pad_token_id

    @torch.no_grad()
    def refresh(self, policy: Any) -> None:
        """Copy the trained weights of a sharded policy, a PEFT model or a plain one. A collective."""
        base: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        layers: list[tuple[str, Any]] = [pair for pair in base.named_modules() if isinstance(pair[1], LoraLayer)]
        for name, module in layers:
            with gathered(list(module.parameters())):
                weight = module.get_base_layer().weight + module.get_delta_weight("default")
                self._model.get_submodule(name).weight.copy_(weight)
        if base is policy:
            for name, parameter in base.named_parameters():
                with gathered([parameter]):
                    self._model.get_parameter(name).copy_(parameter)

    def sample(self, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float, at_once: int) -> Tensor:
        """What :meth:`generate` says, each rank doing its share of the prompts, ``at_once`` at a time. A collective."""
        return group.spread(
            len(prompts),
            lambda rows: torch.cat(
                [
                    self.generate([prompts[row] for row in part.tolist()], uniforms[part], temperature)
                    for part in rows.split(at_once)
                ]
            ),
        )

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], uniforms: Tensor, temperature: float) -> Tensor:
        """Sample a response to each prompt: ids ``[batch, time]``; after an EOS comes padding.

        uniforms  ``[batch, time]``, one number a token (see :mod:`rlhf.rollout.sampling`); their width is the limit
        """
        ids, mask = text.pad(prompts, self._pad, "left")
        limit = uniforms.shape[1]
        generated = self._model.generate(
            ids.to(group.device()),
            attention_mask=mask.to(group.device()),
            generation_config=GenerationConfig(
                max_new_tokens=limit, do_sample=False, eos_token_id=self._eos, pad_token_id=self._pad
            ),
            logits_processor=LogitsProcessorList([InverseTransformSampling(uniforms, ids.shape[1], temperature)]),
        )
        pulse.beat()
        responses = generated[:, ids.shape[1] :].cpu()
        return torch.nn.functional.pad(responses, (0, limit - responses.shape[1]), value=self._pad)


class Writer:
    """A policy that only writes: a copy of it on each rank, and none that is sharded.

    folder   a plain model folder
    at_once  prompts that one rank answers at a time
    """

    def __init__(self, folder: Path, precision: Precision, temperature: float, at_once: int) -> None:
        self.tokenizer = text.load_tokenizer(folder)
        self._replica = Replica(
            folder,
            precision,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self._temperature, self._at_once = temperature, at_once

    def sample(self, prompts: Sequence[list[int]], noise: Tensor) -> Tensor:
        """Sample a response to each prompt: ids ``[sample, time]``, padded after an EOS. A collective.

        noise  ``[sample, time]``, see :mod:`rlhf.rollout.sampling`; its width is the longest response
        """
        return self._replica.sample(prompts, noise, self._temperature, self._at_once)
