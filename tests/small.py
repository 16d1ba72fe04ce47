"""A pipeline of a few steps a stage, run for real, and its unbroken runs, which the tests share."""

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rlhf.cluster.session import Session
from rlhf.config.pipeline import PipelineConfig, load_pipeline
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.runner import Runner
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from rlhf.terminal import Display

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"

# Little data, a very small model, and checkpoints often enough that a kill finds one.
SMALL = (
    "tracking.wandb=disabled",
    "cluster.cpus=2",
    "cluster.gpus=0",
    "data.snippets={demonstrations: 3, demonstrations_heldout: 1, comparisons: 4, comparisons_heldout: 3, prompts: 2, "
    "prompts_heldout: 1, judge: 6, set_size: 5}",
    "model.scratch={vocabulary: 512, hidden_size: 32, layers: 2, heads: 2, context: 192}",
    "sft={epochs: 1, batch_size: 4, max_length: 128, checkpoint_every: 2, optimizer: {learning_rate: 1e-2}}",
    "rm={sees: response, epochs: 1, batch_size: 4, micro_batch_size: 2, max_length: 128, responses_per_list: 4, "
    "checkpoint_every: 2, optimizer: {learning_rate: 1e-2}}",
    "ppo={iterations: 4, rollouts: 16, minibatches: 2, epochs: 2, sampling: {max_new_tokens: 12}, "
    "kl: {coef: 0.02}, max_prompt_length: 128, policy_learning_rate: 3e-4, value_learning_rate: 1e-3, "
    "micro_batch_size: 4, checkpoint_every: 1}",
    "evaluate={prompts: 8, sampling: {max_new_tokens: 12}, max_prompt_length: 128, micro_batch_size: 4}",
)


@dataclass
class Pipeline:
    """Runs the small pipeline in the shared session."""

    session: Session
    store: Store
    sdist: Path

    def overrides(self, *more: str, file: Path = TINY) -> list[str]:
        sections = yaml.safe_load(file.read_text()).keys() | {"tracking", "cluster"}
        small = [one for one in SMALL if re.split("[.=]", one)[0] in sections]
        return [*small, f"store.uri={self.store.root}", f"data.downloads={self.sdist.parent}", *more]

    def config(self, *settings: str, file: Path = TINY) -> PipelineConfig:
        return load_pipeline(
            file, self.overrides(*settings, file=file), {name: stage.settings for name, stage in stages().items()}
        )

    def run(
        self,
        *targets: str,
        settings: tuple[str, ...] = (),
        store: Store | None = None,
        file: Path = TINY,
        checked: bool = True,
    ) -> dict[str, Planned]:
        """Run what targets need; without ``checked`` nothing is looked at before a stage starts, which takes 5 s."""
        known, config = stages(), self.config(*settings, file=file)
        if not checked:
            known = {name: replace(stage, preflight=None) for name, stage in known.items()}
        self.output = io.StringIO()
        display = Display(Console(file=self.output, width=160), list(config.instances))
        return Runner(config, known, store or self.store, self.session, display).run(targets)

    def fresh_store(
        self, folder: Path, *without: str, source: Store | None = None, address: str | None = None
    ) -> Store:
        """A store that has what the shared one or another has, but for the results of some stages.

        It lies in the folder, or has that for its scratch folder if it has an address.
        """
        copy = Store.open(address, scratch=folder) if address else Store.open(folder)
        source = source or self.store
        for name, ref in source.refs("tiny").items():
            record = source.action(ref.key)
            assert record is not None
            if name not in without:
                copy.put_artifact(source.checkout(record.artifact, folder / "copies" / name), _kind(record.stage))
                copy.commit(record)
        return copy


def _kind(stage: str) -> str:
    return stages()[stage].kind


TWO_RANKS = tuple(f"{stage}.workers.count=2" for stage in ("sft", "rm", "ppo"))


@pytest.fixture(scope="session")
def pipeline(session: Session, tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Pipeline:
    return Pipeline(session, Store.open(tmp_path_factory.mktemp("store")), sdist)


@pytest.fixture(scope="session")
def unbroken(pipeline: Pipeline) -> dict[str, Planned]:
    """All stages, one rank each, nothing gone wrong."""
    return pipeline.run()


@pytest.fixture(scope="session")
def two_ranks(
    pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, dict[str, Planned]]:
    """Sft, rm and ppo by two ranks each, in a store of their own."""
    assert unbroken
    store = pipeline.fresh_store(tmp_path_factory.mktemp("two") / "store", "sft", "rm", "ppo", "evaluate")
    return store, pipeline.run("ppo", settings=TWO_RANKS, store=store)
