"""The whole pipeline with real parts, Ray, DeepSpeed ZeRO-3, TRL and PPO, with one rank and with two."""

import json
import re
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from rlhf.attempt.folder import AttemptFolder
from rlhf.data.records import read_rows
from rlhf.errors import DivergedError
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.stage import stages
from rlhf.pipeline.transfer import export_artifact
from rlhf.report.card import model_card
from rlhf.store import ActionRecord, Store
from rlhf.training.checkpoint_writer import newest_complete
from tests.small import TINY, Pipeline

# Two launches of a worker group and their imports on two slow cores.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets of dead actors to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


VALUES = "max_length: 128, batch_size: 4, micro_batch_size: 2"
# A second reward model, an adapter, and a third one that starts from it on its own data with another loss.
MORE = f"""
pmp: {{uses: rm, {VALUES}, tuning: {{method: lora, rank: 4}}, loss: soft-share, optimizer: {{learning_rate: 1.0e-2}}}}
fine: {{uses: rm, {VALUES}, sees: response, inputs: {{base: pmp}}, loss: listwise, responses_per_list: 8,
        tuning: {{method: lora, rank: 4, merge: true}},
        optimizer: {{learning_rate: 1.0e-3}}}}
"""


def record_of(planned: dict[str, Planned], name: str) -> ActionRecord:
    record = planned[name].record
    assert record is not None
    return record


def weights(store: Store, record: ActionRecord, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(store.checkout(record.artifact, folder) / "model.safetensors")


def test_every_stage_commits_its_contracts_metrics(unbroken: dict[str, Planned]) -> None:
    """DESIGN's names of final metrics are what dashboards and `jq` rely on."""
    expected = {
        "sft": {"eval/loss"},
        "rm": {"eval/accuracy", "eval/accuracy_confident"},
        "ppo": {"objective/scores_first", "objective/scores", "objective/kl"},
        "evaluate": {
            "score/before",
            "score/after",
            "judge/delta",
            "judge/delta_low",
            "judge/delta_high",
            "kl/response",
        },
    }
    for name, metrics in expected.items():
        assert metrics <= record_of(unbroken, name).metrics.keys()


def test_running_again_is_a_hit_for_every_stage(pipeline: Pipeline, unbroken: dict[str, Planned]) -> None:
    """Nothing changed: nothing runs, and the results are the same artifacts."""
    start = time.monotonic()
    again = pipeline.run()
    assert time.monotonic() - start < 3
    for name in unbroken:
        assert record_of(again, name) == record_of(unbroken, name)
    assert "running" not in pipeline.output.getvalue()


def test_metrics_of_every_iteration_stay_in_the_attempt(pipeline: Pipeline, unbroken: dict[str, Planned]) -> None:
    """metrics.jsonl has each PPO iteration once, under the field's names, and its ratio begins at 1."""
    record = record_of(unbroken, "ppo")
    lines = (pipeline.store.root / "work" / record.key / record.attempt / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert all(row["policy/approxkl_first"] < 1e-8 for row in rows)
    assert {"objective/scores", "val/ratio", "loss/value_avg", "time/rollout_s", "perf/tokens_per_s"} <= rows[0].keys()


def test_no_pickle_leaves_a_stage(pipeline: Pipeline, unbroken: dict[str, Planned]) -> None:
    """What passes between stages is safetensors, JSON, JSONL or text; a picture is text too."""
    for name in unbroken:
        for file in pipeline.store.manifest(record_of(unbroken, name).artifact).files:
            assert Path(file.path).suffix in {".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".md", ".svg"}


def test_two_ranks_equal_one(
    pipeline: Pipeline, unbroken: dict[str, Planned], two_ranks: tuple[Store, dict[str, Planned]], tmp_path: Path
) -> None:
    """Sharding is no part of a result: same keys, the same weights but for rounding, the same first rollouts."""
    store, planned = two_ranks
    for name, limit in {"sft": 2e-3, "rm": 5e-3}.items():
        assert planned[name].key == unbroken[name].key
        ours = weights(store, record_of(planned, name), tmp_path / name)
        single = weights(pipeline.store, record_of(unbroken, name), tmp_path / f"single-{name}")
        for tensor, value in single.items():
            torch.testing.assert_close(ours[tensor], value, atol=limit, rtol=0, msg=f"{name} {tensor}")
    # The stages before differ by rounding, so PPO's key does too; what it learns must not.
    first = record_of(planned, "ppo").metrics["objective/scores_first"]
    assert first == pytest.approx(record_of(unbroken, "ppo").metrics["objective/scores_first"], abs=0.1)


def test_rewards_of_several_kinds_add_up(pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path: Path) -> None:
    """Two reward models, one of them an adapter that sees the conversation, and a function, in ppo and evaluate.

    The policies are adapters that are folded in.
    """
    file, function = tmp_path / "rewards.yaml", tmp_path / "reward.py"
    file.write_text(TINY.read_text() + MORE)
    function.write_text("def reward(prompts, responses):\n    return [float(len(one)) for one in responses]\n")
    parts = f"[{{model: rm, weight: 0.5}}, {{model: pmp, weight: 2}}, {{function: '{function}:reward', std: 40}}]"
    merged = "tuning={method: lora, rank: 4, merge: true}"
    settings = (
        f"ppo.rewards={parts}",
        f"evaluate.rewards={parts}",
        "ppo.samples_kept=16",
        f"sft.{merged}",
        f"ppo.{merged}",
    )
    planned = pipeline.run("evaluate", settings=settings, file=file)
    assert planned["rm"].key == unbroken["rm"].key

    ppo = record_of(planned, "ppo")
    samples = read_rows(pipeline.store.root / "work" / ppo.key / ppo.attempt / "samples.jsonl")[-4:]
    report = pipeline.store.checkout(record_of(planned, "evaluate").artifact, tmp_path / "report")
    rows = [(row["prompt"], row["response"], row["score"]) for row in samples]
    rows += [(row["prompt"], row["before"], row["score_before"]) for row in read_rows(report / "samples.jsonl")[:4]]
    for name in ("rm", "pmp", "ppo"):
        exported(pipeline, planned[name], tmp_path / "exports" / name, merge=name == "pmp")
    alone = asked_in_a_fresh_environment(tmp_path, [row[:2] for row in rows])
    for number, (_, response, score) in enumerate(rows):
        expected = 0.5 * alone["rm"][number] + 2 * alone["pmp"][number] + len(response) / 40
        assert score == pytest.approx(expected, abs=1e-3)
    assert {score for *_, score in rows} != {0.0}
    assert 0 < alone["ppo"]["tokens"] <= 12, "as generation_config.json says"


def exported(pipeline: Pipeline, one: Planned, target: Path, **options: bool) -> Path:
    return export_artifact(one, target, pipeline.store, partial(model_card, one, "tiny", pipeline.store), **options)


# Nothing of this package can be imported, and what is run is what the cards say, in their folders.
FRESH = """
import importlib.util, json, os, sys
from pathlib import Path
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("rlhf") is None
answers, pairs = {}, json.loads(sys.argv[3])
for name in ("rm", "pmp", "ppo"):
    os.chdir(Path(sys.argv[2], name))
    card = {}
    exec(Path("README.md").read_text().split("```python\\n")[1].split("```")[0], card)
    if name == "ppo":
        answers[name] = {"tokens": card["ids"].shape[1] - card["inputs"]["input_ids"].shape[1]}
    else:
        answers[name] = card["score"](*zip(*pairs)).tolist()
print(json.dumps(answers))
"""


def asked_in_a_fresh_environment(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Scores of pairs of prompt and response by the reward models in ``exports``, and a length of the policy's."""
    packages = folder / "packages"
    packages.mkdir()
    for path in Path(transformers.__file__).parents[1].iterdir():
        if not path.name.startswith(("rlhf", "__editable__")):
            (packages / path.name).symlink_to(path)
    words = [str(packages), str(folder / "exports"), json.dumps(pairs)]
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", FRESH, *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_model_s_card_says_what_the_records_say(
    pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path: Path
) -> None:
    """Metrics with intervals, samples, sources, keys, settings that a pipeline file takes; nothing of this machine."""
    evaluation = record_of(unbroken, "evaluate")
    # A card quotes the evaluations that the refs name, and other tests leave those of other policies there.
    assert pipeline.store.set_ref("tiny", "evaluate", evaluation.key)
    text = (exported(pipeline, unbroken["ppo"], tmp_path / "out") / "README.md").read_text()
    head = ModelCard(text).data.to_dict()
    assert head["tags"] == ["rlhf", "ppo", "sft"]
    assert (head["library_name"], head["pipeline_tag"], "license" in head) == ("transformers", "text-generation", False)
    for name in ("data", "model", "rank", "sft", "rm", "ppo"):
        assert f"| {name} | {record_of(unbroken, name).version} | {record_of(unbroken, name).key} |" in text
    delta, low, high = (evaluation.metrics[f"judge/delta{end}"] for end in ("", "_low", "_high"))
    assert f"| evaluate | judge/delta | {delta:.4g} | {low:.4g} to {high:.4g} |" in text
    assert "| judge/delta_low |" not in text
    report = pipeline.store.checkout(evaluation.artifact, tmp_path / "report")
    for row in read_rows(report / "samples.jsonl")[:3]:
        assert f"Answer, score {row['score_after']:.2f}:\n\n```text\n{row['after']}\n```" in text
    assert "A judge that no stage was trained against has rated it" in text
    assert "Hutto" in text
    assert "| judge | movie" not in text, "it was not made from the judge's ratings"
    assert "responses of up to 12 tokens" in text
    for settings in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        ((name, section),) = yaml.safe_load(settings).items()
        assert section == dict(record_of(unbroken, name).settings)
    private = (socket.gethostname(), str(pipeline.store.root), str(pipeline.sdist.parent), str(tmp_path))
    assert [word for word in private if word in text] == []


def test_a_diverged_run_keeps_its_last_good_checkpoint_and_is_no_result(pipeline: Pipeline, tmp_path: Path) -> None:
    """It is told as what it is, with what to change, and not tried again: it would diverge again."""
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, responses):\n    return [float(len(one)) for one in responses]\n")
    settings = (
        f"ppo.rewards=[{{function: '{reward}:reward'}}]",
        "ppo.value_init=policy",
        "ppo.policy_learning_rate=0.05",
        "ppo.kl.limit=0.5",
    )
    with pytest.raises(DivergedError) as caught:
        pipeline.run("ppo", settings=settings)
    assert type(caught.value) is DivergedError
    assert caught.value.exit_status == 1
    assert "nats a response from its reference; the limit is 0.5" in caught.value.what
    assert "raise kl.coef or lower policy_learning_rate" in caught.value.next_step
    assert "starting again" not in pipeline.output.getvalue()

    planned = plan(pipeline.config(*settings), stages(), pipeline.store)["ppo"]
    assert (planned.state, planned.record) == ("missing", None)
    assert planned.key is not None
    attempts = pipeline.store.attempts(planned.key)
    assert len(attempts) == 1
    assert newest_complete(attempts) == AttemptFolder(attempts[0]).checkpoint(1)


def test_a_reward_model_starts_from_another_and_says_how_good_it_is(
    pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path: Path
) -> None:
    """Preference-model pre-training is a second instance, here with another loss, of an adapter, and folded in."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.read_text() + MORE)
    planned = pipeline.run("fine", file=file)
    record = planned["fine"].record
    assert record is not None
    assert record.inputs["base"]["key"] == planned["pmp"].key
    folder = pipeline.store.checkout(record.artifact, tmp_path / "fine")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["accuracy"]["share"] == pytest.approx(record.metrics["eval/accuracy"], abs=0.02)
    assert record.metrics["eval/accuracy_low"] <= quality["accuracy"]["share"] <= record.metrics["eval/accuracy_high"]
    assert 0.5 < record.metrics["eval/human_accuracy_within"] < record.metrics["eval/human_accuracy"] < 1
    assert quality["accuracy_within"]["share"] == pytest.approx(record.metrics["eval/accuracy_within"])
    assert (folder / "reliability.svg").read_text().startswith("<?xml")
