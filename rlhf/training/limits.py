"""What the hardware allows: operations and bytes that the work must cost, over a machine's two measured ceilings.

The ceilings are a large matrix product and a large copy, measured in the process that is judged: ratios of one process
can be compared between machines, and seconds cannot. A part's limit is the longer of its operations at the first and
its bytes at the second. Counted are

- matrix products: 2 operations a parameter and token; the language head only where logits are needed, at response
  tokens, and at a prompt's last token before the first; heads with one output are left out;
- attention: 4 operations for each query, key and channel, over the keys up to the query (the causal half);
- gradients of whole weights: twice the forward's; with adapters once, for the activations, and the adapters' own
  products are left out;
- bytes of weights once in a forward pass, and in each step of decoding; of keys and values, read and written, of the
  responses that are still running; of AdamW's states. Activations count as if they never left the chip.

Not counted, since good code needs none of it: padding, layers computed again, gathering of shards, copies of weights.
The policy's log-probabilities count as a forward pass of their own, though a sampler could give them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from rlhf.attempt.context import Context
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import Precision
from rlhf.models.footprint import Architecture, Learned, learned
from rlhf.pipeline.fitting import architectures
from rlhf.rollout.sequences import Sequences
from rlhf.zero import group
from rlhf.zero.engine import DTYPES


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder that its work follows from; numbers of parameters and widths in elements."""

    body: int
    """Parameters of the layers' matrices that a token meets."""
    head: int
    """Parameters of the language head."""
    norms: int
    layers: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together, which is that of the values."""

    @classmethod
    def of(cls, model: Architecture) -> Self:
        """Read them off an architecture."""
        attention = 2 * model.hidden * (model.queries + model.keys)
        inner = (2 + model.gated) * model.hidden * model.intermediate
        norms = (model.norms * model.layers + 1) * model.hidden
        head = model.vocabulary * model.hidden
        return cls(model.layers * (attention + inner), head, norms, model.layers, model.queries, model.keys)


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured."""

    device: str
    operations: float
    """A second, in a large matrix product of the precision."""
    bytes: float
    """A second, read and written in a large copy."""


@dataclass(frozen=True)
class Work:
    """What a part must cost."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def times(self, factor: float) -> "Work":
        """Return the work of as many repetitions."""
        return Work(factor * self.operations, factor * self.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the least time that it takes."""
        return max(self.operations / ceilings.operations, self.bytes / ceilings.bytes)


@dataclass(frozen=True)
class Part:
    """A named part of the work; its steps follow each other, so that the sum of their limits is its own."""

    name: str
    steps: Sequence[Work]

    @property
    def work(self) -> Work:
        """Return the work of all steps."""
        return sum(self.steps, start=Work())

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the least time that it takes."""
        return sum(step.seconds(ceilings) for step in self.steps)


def ceilings(precision: Precision, device: torch.device) -> Ceilings:
    """Measure a machine: medians of five, of a product of 8192 x 8192 (on a CPU 2048 x 2048) and a copy."""
    gpu, dtype = device.type == "cuda", DTYPES[precision]
    width, length, rounds = (8192, 2**29, 10) if gpu else (2048, 2**27, 2)
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = _median_time(lambda: left @ right, rounds, device)
    source = torch.ones(length, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = _median_time(lambda: target.copy_(source), rounds, device)
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return Ceilings(name, 2 * width**3 / product, 2 * source.nbytes / copy)


def _median_time(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Return the seconds of a call, the median of five times ``rounds`` calls."""
    times: list[float] = []
    for _ in range(6):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        synchronise(device)
        times.append((time.perf_counter() - start) / rounds)
    return statistics.median(times[1:])  # the first warms up


def synchronise(device: torch.device) -> None:
    """Wait for all work that a device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def causal(lengths: Sequence[int]) -> int:
    """Return the pairs of a query and a key up to it, in sequences of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def forward(model: Sizes, tokens: int, logits: int, pairs: int, width: int = 2) -> Work:
    """Return the work of a forward pass.

    tokens  in all sequences
    logits  tokens whose logits are computed
    pairs   of a query and a key, see :func:`causal`
    width   bytes of a weight
    """
    operations = 2 * model.body * tokens + 2 * model.head * logits + 4 * model.layers * model.queries * pairs
    weights = model.body + model.norms + (model.head if logits else 0)
    return Work(operations, width * weights)


def prefill(model: Sizes, prompts: Sequence[int], width: int = 2) -> Work:
    """Return the work of reading prompts of these lengths, up to the logits of their first tokens."""
    cache = 2 * model.layers * model.keys * width * sum(prompts)
    return forward(model, sum(prompts), len(prompts), causal(prompts), width) + Work(bytes=cache)


def decode(model: Sizes, prompts: Sequence[int], lengths: Sequence[int], width: int = 2) -> list[Work]:
    """Return the work of each step behind prefill: all responses at once, each until its own end.

    Step t reads token t of the responses that have more, and attends to the prompt's and t keys: all but its own are
    read, and its own is written.

    lengths  of the prompts' responses, EOS included
    """
    of_prompts, of_responses = np.asarray(prompts), np.asarray(lengths)
    steps: list[Work] = []
    for place in range(1, max(lengths)):
        running = of_responses > place
        rows = int(running.sum())
        keys = int(of_prompts[running].sum()) + rows * place
        cache = 2 * model.layers * model.keys * width * keys
        steps.append(forward(model, rows, rows, keys, width) + Work(bytes=cache))
    return steps


def adamw(trained: float, precision: Precision) -> Work:
    """Return the work of one step of AdamW with fp32 states on ``trained`` parameters.

    Read are gradient, weight and two moments, written weight and moments; in bf16 also the weights of the model.
    """
    return Work(bytes=trained * (4 * 7 + (2 if precision == "bf16" else 0)))


def passes(model: Architecture, part: Learned) -> float:
    """Return what forward and backward pass cost together, in forward passes.

    Activations have gradients down to the lowest block that trains, or through all of them to adapters; whole weights
    have theirs where they train.
    """
    whole = part.whole_layers / model.layers
    return 1 + (1.0 if part.keeps_base else whole) + whole


@dataclass(frozen=True)
class IterationModels:
    """The models of an iteration, as one rank has them."""

    policy: Architecture
    value: Architecture | None
    """None in a stage without a value model."""
    rewards: Sequence[Architecture]

    @classmethod
    def of(cls, settings: PolicyGradientSettings, models: Mapping[str, Architecture]) -> Self:
        """Take them from the stage's inputs, by role."""
        rewards = [model for role, model in models.items() if role.startswith("reward")]
        if not isinstance(settings, PpoSettings):
            return cls(models["policy"], None, rewards)
        start = rewards[0] if settings.value_init == "reward" and rewards else models["policy"]
        return cls(models["policy"], start, rewards)

    def parts(
        self, settings: PolicyGradientSettings, prompts: Sequence[int], lengths: Sequence[int], ranks: int = 1
    ) -> dict[str, list[Part]]:
        """Return what an iteration must cost a rank that trains: the parts of rollout, score and train.

        Every model's texts count as those of the policy; demonstrations that are mixed in are left out.

        prompts  tokens of this rank's prompts
        lengths  of their responses, EOS included
        """
        width = 2 if settings.precision == "bf16" else 4
        policy = Sizes.of(self.policy)
        whole = [prompt + length for prompt, length in zip(prompts, lengths, strict=True)]
        tokens, responses, pairs = sum(whole), sum(lengths), causal(whole)
        language = forward(policy, tokens, responses, pairs, width)
        learn = {"policy": (learned(self.policy, settings.tuning, scores=False), self.policy, language)}
        if self.value is not None:
            values = forward(Sizes.of(self.value), tokens, 0, pairs, width)
            learn["value"] = (learned(self.value, settings.tuning, scores=True), self.value, values)
        steps = adamw(sum(part.parameters for part, _, _ in learn.values()) / ranks, settings.precision)
        frozen = [Part("score reference", [language])]
        frozen += [Part("score reward", [forward(Sizes.of(one), tokens, 0, pairs, width)]) for one in self.rewards]
        return {
            "rollout": [
                Part("prefill", [prefill(policy, prompts, width)]),
                Part("decode", decode(policy, prompts, lengths, width)),
            ],
            "score": [
                Part("score policy", [language]),
                *(Part("score value", [work]) for name, (_, _, work) in learn.items() if name == "value"),
                *([] if settings.placement == "apart" else frozen),
            ],
            "train": [
                *(
                    Part(f"train {name}", [Work(settings.epochs * passes(model, part) * work.operations)])
                    for name, (part, model, work) in learn.items()
                ),
                Part("AdamW", [steps.times(settings.epochs * settings.minibatches)]),
            ],
        }


class IterationLimit:
    """The least seconds that this rank's share of an iteration takes on its GPU."""

    def __init__(self, models: IterationModels, settings: PolicyGradientSettings, measured: Ceilings) -> None:
        self._models, self._settings, self._measured = models, settings, measured

    @classmethod
    def of(cls, context: Context[PolicyGradientSettings]) -> Self | None:
        """Measure this rank's GPU, before models fill it; None without one, or where the models' sizes are unknown."""
        models = architectures(context.inputs)
        if group.device().type == "cpu" or models is None:
            return None
        measured = ceilings(context.settings.precision, group.device())
        torch.cuda.empty_cache()
        return cls(IterationModels.of(context.settings, models), context.settings, measured)

    def seconds(self, sequences: Sequences) -> float:
        """Return the least seconds for the samples of all ranks, of which this rank has its share."""
        mine = group.my_rows(len(sequences.ids))
        lengths = sequences.mask.sum(1)[mine]
        prompts = sequences.attention_mask.sum(1)[mine] - lengths
        parts = self._models.parts(self._settings, prompts.tolist(), lengths.tolist(), group.world_size())
        return sum(part.seconds(self._measured) for of_part in parts.values() for part in of_part)
