"""Collecting and comparing for real: models write under Ray, people and functions judge, and models are ranked."""

import json
from pathlib import Path

import pytest

from rlhf.collect.collection import Collection
from rlhf.errors import TryAgainError
from rlhf.pipeline.plan import Planned
from rlhf.store import Store
from tests.small import Pipeline
from tests.stages.test_pipeline import record_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = """
pipeline: tiny
data: {{}}
model: {{base: scratch}}
sft: {{}}
collect:
  models: [{{model: sft, responses: 2, temperature: 0.7}}, {{model: model, name: base}}]
  prompts: 12
  prompts_heldout: 4
  max_new_tokens: 8
  max_prompt_length: 128
  micro_batch_size: 5
compare: {{{compare}}}
rank: {{inputs: {{comparisons: compare}}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The pipeline, whose judge is people that have said nothing yet."""
    path = tmp_path / "flywheel.yaml"
    path.write_text(CONFIG.format(compare=f"file: {tmp_path / 'said.jsonl'}"))
    return path


def sets_of(store: Store, planned: dict[str, Planned], name: str) -> list[dict[str, list[str]]]:
    artifact = record_of(planned, name).artifact
    return [json.loads(line) for line in store.read_file(artifact, "train.jsonl").splitlines()]


def test_what_models_wrote_is_ranked_by_people_and_the_models_by_what_they_said(
    pipeline: Pipeline, file: Path, tmp_path: Path
) -> None:
    """The run does what it can, says what people are to do, and goes on from there: writing is done once."""
    with pytest.raises(TryAgainError) as caught:
        pipeline.run(file=file)
    assert caught.value.next_step.startswith(f"rlhf annotate collect {tmp_path / 'said.jsonl'}")
    assert caught.value.exit_status == 75

    planned = pipeline.run("collect", file=file)
    assert "running" not in pipeline.output.getvalue()
    sets = sets_of(pipeline.store, planned, "collect")
    assert len(sets) == 12
    assert sets[0]["models"] == ["sft at 0.7", "sft at 0.7", "base"]

    responses = pipeline.store.checkout(record_of(planned, "collect").artifact, tmp_path / "responses")
    with Collection(str(responses), tmp_path / "said.jsonl") as collection:
        for row, one in collection.annotation.sets.items():
            shown = collection.annotation.task("ann", row).responses
            # Positions from best to worst: base's response, which is the set's last, loses to both others.
            last = shown.index(one.responses[2])
            collection.answer("ann", row, [[place for place in range(3) if place != last], last], 0)
        collection.export()

    planned = pipeline.run(file=file)
    assert record_of(planned, "compare").metrics == {"train": 12, "heldout": 4, "left_out": 0}
    rows = json.loads(pipeline.store.read_file(record_of(planned, "rank").artifact, "leaderboard.json"))
    assert [row["model"] for row in rows] == ["sft at 0.7", "base"]
    assert rows[0]["low"] > rows[1]["high"]


def test_two_ranks_write_what_one_writes(pipeline: Pipeline, file: Path, tmp_path: Path) -> None:
    """The number of workers and what they write at once are no part of the key, so they must not change a response."""
    one = sets_of(pipeline.store, pipeline.run("collect", file=file), "collect")
    other = Store.open(tmp_path / "other")
    for name in ("data", "model", "sft"):
        record = record_of(pipeline.run("collect", file=file), name)
        manifest = pipeline.store.manifest(record.artifact)
        other.put_artifact(pipeline.store.checkout(record.artifact, tmp_path / "copies" / name), manifest.kind)
        other.commit(record)
    two = Pipeline(pipeline.session, other, pipeline.sdist)
    planned = two.run("collect", file=file, settings=("collect.workers.count=2", "collect.micro_batch_size=3"))
    assert sets_of(other, planned, "collect") == one
