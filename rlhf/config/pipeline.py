"""The settings of a pipeline file: where the pipeline runs, and its stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from rlhf.config.base import Seed, Settings, runtime

# Names are parts of paths in the store and of overrides, whose parts are separated by dots.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class StoreSettings(Settings):
    """Where results are kept."""

    uri: str = runtime("store", min_length=1)
    """The artifact store: a folder, relative to the working folder unless absolute, or ``s3://bucket/prefix``."""
    scratch: str | None = runtime(None, min_length=1)
    """For a store in a bucket, the local folder of attempts and copies; null is one in the user's cache folder."""

    @model_validator(mode="after")
    def _scratch_belongs_to_a_bucket(self) -> Self:
        if self.scratch is not None and not self.uri.startswith("s3://"):
            raise ValueError("scratch is for a store in a bucket: one in a folder has its attempts in that folder")
        return self


class ClusterSettings(Settings):
    """The Ray cluster that stages run on: an existing one, or one started for the run."""

    address: str | None = runtime(None, min_length=1)
    """Address of a running cluster, ``host:port`` or ``auto``; null takes the environment's RAY_ADDRESS, and without
    one starts a cluster on this machine."""
    cpus: int | None = runtime(None, ge=1)
    """CPU cores that a cluster started here may use; null allows all of the machine's."""
    gpus: int | None = runtime(None, ge=0)
    """GPUs that a cluster started here may use; null allows all of the machine's."""
    max_failures: int = runtime(3, ge=0)
    """Restarts of a stage's worker group from the same checkpoint before the stage fails. Each new checkpoint allows as
    many again."""


class TrackingSettings(Settings):
    """Where metrics are sent besides ``metrics.jsonl``, which is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = runtime("auto")
    """Weights & Biases: ``auto`` is online with an API key and offline otherwise."""
    project: str = runtime("rlhf", min_length=1)
    """Project of the W&B runs."""
    entity: str | None = runtime(None, min_length=1)
    """User or team of the W&B runs; null is the key's own."""


class PipelineSettings(Settings):
    """The top-level settings of a pipeline file; every other top-level section is a stage instance."""

    pipeline: str | None = runtime(None, pattern=NAME_PATTERN)
    """Name under which the store keeps the pipeline's latest results; null takes the file's name."""
    seed: Seed = runtime(0)
    """Fills in ``seed`` in every stage instance that has such a setting and does not set it itself. It enters the keys
    through those."""
    store: StoreSettings = runtime(StoreSettings())
    """The artifact store."""
    cluster: ClusterSettings = runtime(ClusterSettings())
    """The Ray cluster."""
    tracking: TrackingSettings = runtime(TrackingSettings())
    """Metric sinks."""


@dataclass(frozen=True)
class StageInstance:
    """One use of a stage in a pipeline."""

    name: str
    """The section's name, which everything outside the stage's code uses."""
    uses: str
    """The stage's name."""
    settings: Settings
    """The stage's settings, complete and valid."""
    inputs: Mapping[str, str]
    """Roles that this pipeline rewires: role -> ``instance`` or ``instance/part``."""


@dataclass(frozen=True)
class PipelineConfig:
    """A pipeline file with its overrides, complete and valid."""

    name: str
    path: Path
    seed: int
    store: StoreSettings
    cluster: ClusterSettings
    tracking: TrackingSettings
    instances: Mapping[str, StageInstance]
    """By name, in the file's order."""


def resolved(config: PipelineConfig) -> dict[str, Any]:
    """Return the whole pipeline as JSON values with every default; written as YAML it loads to the same pipeline."""
    sections = {"store": config.store, "cluster": config.cluster, "tracking": config.tracking}
    values: dict[str, Any] = {"pipeline": config.name, "seed": config.seed}
    values |= {name: section.model_dump(mode="json") for name, section in sections.items()}
    for instance in config.instances.values():
        wiring = {"uses": instance.uses, "inputs": dict(instance.inputs)}
        values[instance.name] = wiring | instance.settings.model_dump(mode="json")
    return values
