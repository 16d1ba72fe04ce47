"""Stage collect, with models that say who they are, which response it is and to which prompt."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.collect.written import JOURNAL
from rlhf.config.collect import CollectSettings, WriterSettings
from rlhf.pipeline.context import Context
from rlhf.rollout.prompts import PromptBatch, draw
from rlhf.zero import group
from stages import collect

TRAIN = [f"train {number}" for number in range(5)]
HELDOUT = [f"heldout {number}" for number in range(3)]


class Models:
    """Stands for the loading and the sampling, and remembers both."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.asked: list[list[int]] = []
        self.same = False

    def load_writer(self, context: Context[CollectSettings], writer: WriterSettings) -> Any:
        assert context.stage == "collect"
        self.loaded.append(writer.shown)
        return SimpleNamespace(name=writer.shown, tokenizer="tokenizer")

    def prompt_batch(self, prompts: list[Any], samples: Sequence[int], tokenizer: str, max_length: int) -> PromptBatch:
        assert (tokenizer, max_length) == ("tokenizer", 11)
        return PromptBatch(prompts, [[1]] * len(prompts), list(samples))

    def roll_out(self, policy: Any, batch: PromptBatch, seed: int, length: int) -> Any:
        assert (seed, length) == (3, 7)
        self.asked.append(batch.samples)
        rows = zip(batch.prompts, batch.samples, strict=True)
        texts = [f"{policy.name} to {prompt}" + ("" if self.same else f", sample {sample}") for prompt, sample in rows]
        return SimpleNamespace(texts=texts)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    """In the one rank of a group."""
    for name, answer in {"is_main": lambda: True, "world_size": lambda: 1, "from_main": lambda call: call()}.items():
        monkeypatch.setattr(group, name, answer)
    found = Models()
    for name in ("load_writer", "prompt_batch", "roll_out"):
        monkeypatch.setattr(collect, name, getattr(found, name))
    return found


def context(folder: Path, attempts: Sequence[str] = ("attempt",), **settings: Any) -> Context[CollectSettings]:
    for name in ("prompts", *attempts):
        (folder / name).mkdir(exist_ok=True)
    for part, prompts in (("train", TRAIN), ("heldout", HELDOUT)):
        (folder / "prompts" / f"{part}.jsonl").write_text(
            "".join(json.dumps({"prompt": one}) + "\n" for one in prompts)
        )
    values = {"models": [{"model": "sft", "responses": 2}, {"model": "ppo"}], "prompts": 4, "prompts_heldout": 2}
    values |= {"seed": 3, "max_new_tokens": 7, "max_prompt_length": 11, "micro_batch_size": 5}
    paths = tuple(folder / name for name in attempts)
    inputs = {"prompts": folder / "prompts"}
    made = CollectSettings.model_validate(values | settings)
    return Context("collect", "key", made, inputs, paths[-1], paths[-1], paths[-1], attempts=paths)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_model_answers_the_same_prompts_each_response_with_a_number_of_its_own(
    models: Models, tmp_path: Path
) -> None:
    """Two of the one and one of the other to each of the drawn and the first held-out prompts."""
    run = context(tmp_path)
    metrics = collect.run(run)
    drawn = draw(TRAIN, 4, 3)
    assert drawn != TRAIN[:4]
    for part, prompts, first in (("train", drawn, 0), ("heldout", HELDOUT[:2], 4)):
        assert rows(run.output / f"{part}.jsonl") == [
            {
                "prompt": prompt,
                "responses": [
                    f"sft to {prompt}, sample {number}",
                    f"sft to {prompt}, sample {number + 6}",
                    f"ppo to {prompt}, sample {number + 12}",
                ],
                "models": ["sft", "sft", "ppo"],
            }
            for number, prompt in enumerate(prompts, start=first)
        ]
    assert models.loaded == ["sft", "ppo"]
    assert [len(samples) for samples in models.asked] == [5, 5, 2, 5, 1]
    assert [sample for samples in models.asked for sample in samples] == list(range(18))
    assert metrics == {"sets": 6, "responses": 18, "repeated": 0}


def test_the_share_of_repeated_responses_is_of_those_that_equal_another(models: Models, tmp_path: Path) -> None:
    """The first model says the same twice: of each three responses two are different."""
    models.same = True
    assert collect.run(context(tmp_path))["repeated"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("written", "loaded"), [(11, ["sft", "ppo"]), (12, ["ppo"]), (13, ["ppo"]), (18, [])])
def test_a_killed_run_goes_on_with_the_first_response_that_is_missing(
    models: Models, tmp_path: Path, written: int, loaded: list[str]
) -> None:
    """No model is loaded that has nothing left to say, and the result is that of a run that was not killed."""
    (tmp_path / "whole").mkdir()
    whole = context(tmp_path / "whole")
    metrics = collect.run(whole)
    models.loaded, models.asked = [], []
    run = context(tmp_path, attempts=("killed", "attempt"))
    lines = (whole.attempt / JOURNAL).read_text().splitlines(keepends=True)
    (run.attempts[0] / JOURNAL).write_text("".join(lines[:written]))
    assert collect.run(run) == metrics
    assert models.loaded == loaded
    assert [sample for samples in models.asked for sample in samples] == list(range(written, 18))
    for part in ("train", "heldout"):
        assert rows(run.output / f"{part}.jsonl") == rows(whole.output / f"{part}.jsonl")
