"""Settings that the training stages share: adapters, workers, precision."""

from typing import Literal

from rlhf.config.base import Settings, runtime, semantic

Precision = Literal["fp32", "bf16"]


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on every linear layer of the body."""

    rank: int = semantic(16, ge=1)
    """Rank r of the update; 8 to 64 are usual."""
    alpha: float = semantic(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = semantic(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while the SFT and reward models train. PPO switches all dropout off."""
    merge: bool = semantic(False)
    """Fold the adapter into the weights of the result, which are then fp32. Otherwise the result is a PEFT adapter
    beside its base; a later stage in bf16 reads that exactly, and rounds folded weights."""


class WorkerSettings(Settings):
    """The worker group of a stage: one Ray actor per ZeRO-3 rank."""

    count: int = runtime(1, ge=1)
    """Ranks. On a CPU one rank with all threads is the fastest; on a cluster one rank per GPU."""
    cpus: int | None = runtime(None, ge=1)
    """CPU cores of each rank; null gives each rank as many as all can have alike."""
    gpu: bool | None = runtime(None)
    """True gives each rank one GPU, false none; null uses GPUs when the cluster has any."""
    timeout_minutes: float = runtime(30.0, gt=0)
    """How long no rank may get on before the group is ended, as hanging, and started again. Must be longer than the
    longest part of a step: generating or scoring a batch, a micro batch, a checkpoint."""


class SamplingSettings(Settings):
    """How responses are sampled: from the whole vocabulary, at one temperature, here and in every log-probability."""

    temperature: float = semantic(1.0, gt=0)
    """Divides the logits wherever a probability is computed."""
    max_new_tokens: int = semantic(64, ge=1)
    """Longest response, in tokens."""
    fp32_head: bool = semantic(True)
    """Compute the logits in fp32 with ``precision: bf16`` too, here and in every log-probability: bf16 has three
    digits, and logits are large numbers with small differences."""
