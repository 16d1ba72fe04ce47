"""Stages that exist for the loader's tests only: every kind of setting, and nothing behind it."""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from rlhf.config.base import Settings, runtime, semantic, source


class KlExample(Settings):
    """A nested section."""

    coef: float = semantic(0.05, ge=0)
    """β."""
    target: float | None = semantic(None, gt=0)
    """Nats."""


class AdapterExample(Settings):
    """An optional section."""

    rank: int = semantic(8, ge=1)
    """Rank."""


class TrainExample(Settings):
    """A stage with every kind of setting."""

    seed: int = semantic(0, ge=0)
    """Seed."""
    learning_rate: float = semantic(1e-4, gt=0)
    """Learning rate."""
    discount: float = semantic(1.0, ge=0, le=1)
    """Discount."""
    precision: Literal["fp32", "bf16"] = semantic("fp32")
    """Precision."""
    packing: bool = semantic(True)
    """Packing."""
    kl: KlExample = semantic(KlExample())
    """KL."""
    adapter: AdapterExample | None = semantic(None)
    """Adapter."""
    layers: tuple[int, ...] = semantic(())
    """Layers."""
    weights: dict[str, float] = semantic({})
    """Weights by name."""
    prefix: str = semantic("")
    """Text."""
    steps: int | Literal["all"] = semantic("all")
    """Steps."""
    downloads: Path | None = runtime(None)
    """Folder."""
    rollouts: int = semantic(64, ge=1)
    """Rollouts."""
    minibatches: int = semantic(1, ge=1)
    """Minibatches."""

    @model_validator(mode="after")
    def _minibatches_divide_rollouts(self) -> "TrainExample":
        if self.rollouts % self.minibatches:
            raise ValueError(f"rollouts {self.rollouts} is not a multiple of minibatches {self.minibatches}")
        return self


class ReadExample(Settings):
    """A stage with no seed and a setting that must be given."""

    file: str = source()
    """The data."""


STAGES: dict[str, type[Settings]] = {"train": TrainExample, "read": ReadExample}
