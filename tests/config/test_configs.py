from pathlib import Path

import pytest

from rlhf.config.pipeline import PipelineConfig, load_pipeline, resolved
from rlhf.config.yaml_tree import to_yaml
from rlhf.pipeline.stage import stages

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def load(path: Path) -> PipelineConfig:
    return load_pipeline(path, [], {name: stage.settings for name, stage in stages().items()})


def test_the_documented_pipelines_are_there() -> None:
    """The README and the Makefile name these files."""
    assert {"quickstart.yaml", "tiny.yaml", "cluster.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_pipeline_in_configs_loads(path: Path) -> None:
    """A file that we hand out must never be refused, and its pipeline is named after it."""
    config = load(path)
    assert config.name == path.stem
    whole = path.name in ("quickstart.yaml", "tiny.yaml", "cluster.yaml")
    assert not whole or {"data", "model", "rank", "sft", "rm", "ppo", "evaluate"} <= set(config.instances)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_rlhf_config_prints_is_the_same_pipeline(path: Path, tmp_path: Path) -> None:
    """`rlhf config > new.yaml` is a way to write a pipeline with every default spelt out."""
    config = load(path)
    printed = tmp_path / path.name
    printed.write_text(to_yaml(resolved(config)), encoding="utf-8")
    assert resolved(load(printed)) == resolved(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_minibatches_can_be_shared_among_the_ranks_that_a_pipeline_asks_for(path: Path) -> None:
    """What preflight would refuse only on the cluster must be right in the file."""
    config = load(path)
    for instance in config.instances.values():
        settings = instance.settings.model_dump()
        if instance.uses in ("sft", "rm"):
            assert settings["batch_size"] % settings["workers"]["count"] == 0
        if instance.uses in ("ppo", "grpo", "rloo"):
            assert settings["rollouts"] // settings["minibatches"] % settings["workers"]["count"] == 0
