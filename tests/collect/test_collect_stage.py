"""Stage collect with models whose responses say who wrote them, as which sample, to which prompt."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.attempt.context import Context
from rlhf.config.collect import CollectSettings, WriterSettings
from rlhf.data.records import read_rows
from rlhf.rollout.prompts import PromptBatch, draw
from rlhf.zero import group
from tests.collect.program import write_rows
from tests.models.tiny import make_tiny_llama

TRAIN = [f"film {number}" for number in range(5)]
HELDOUT = [f"held {number}" for number in range(3)]
WRITERS = [WriterSettings(model="sft", responses=2), WriterSettings(model="base")]


class StoppedError(Exception):
    """Stands for a kill."""


Collect = Callable[..., tuple[dict[str, float], list[tuple[Any, ...]]]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from rlhf.models.text import load_tokenizer

    return load_tokenizer(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def collect(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collect:
    from rlhf.stages import collect as stage

    write_rows(tmp_path / "train.jsonl", [{"prompt": prompt} for prompt in TRAIN])
    write_rows(tmp_path / "heldout.jsonl", [{"prompt": prompt} for prompt in HELDOUT])
    monkeypatch.setattr(group, "is_main", lambda: True)
    monkeypatch.setattr(group, "world_size", lambda: 1)
    monkeypatch.setattr(group, "from_main", lambda make: make())

    def collected(
        attempts: int = 1, stop_after: int | None = None, say: str = "{writer} {sample} {prompt}"
    ) -> tuple[dict[str, float], list[tuple[Any, ...]]]:
        """The metrics, and what the user saw; stopped after some batches where that is asked for."""
        batches, seen = 0, list[tuple[Any, ...]]()

        def roll_out(policy: Any, batch: PromptBatch, seed: int, length: int) -> Any:
            nonlocal batches
            batches += 1
            if stop_after is not None and batches > stop_after:
                raise StoppedError
            assert (seed, length) == (4, 9)
            assert [tokenizer.decode(ids).count(prompt) for ids, prompt in zip(batch.ids, batch.prompts, strict=True)]
            pairs = zip(batch.samples, batch.prompts, strict=True)
            texts = [say.format(writer=policy.name, sample=sample, prompt=prompt) for sample, prompt in pairs]
            return SimpleNamespace(texts=texts)

        monkeypatch.setattr(stage, "roll_out", roll_out)
        monkeypatch.setattr(
            stage, "load_writer", lambda _, writer: SimpleNamespace(name=writer.shown, tokenizer=tokenizer)
        )
        monkeypatch.setattr(Context, "progress", lambda _, *said: seen.append(said))
        settings = CollectSettings(
            models=WRITERS, prompts=4, prompts_heldout=2, seed=4, max_new_tokens=9, micro_batch_size=5
        )
        folders = [tmp_path / f"attempt-{number}" for number in range(attempts)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return stage.run(
            Context(
                "collect",
                "key",
                settings,
                {"prompts": tmp_path},
                tmp_path / "out",
                folders[-1],
                tmp_path,
                tuple(folders),
            )
        ), seen

    (tmp_path / "out").mkdir()
    return collected


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [row for part in ("train", "heldout") for row in read_rows(tmp_path / "out" / f"{part}.jsonl")]


def test_every_prompt_is_answered_by_every_model_with_samples_of_its_own(collect: Collect, tmp_path: Path) -> None:
    """Some prompts that the seed draws, and the first that are held out; no two responses share a sample's number."""
    metrics, seen = collect()
    drawn = draw(TRAIN, 4, 4)
    assert [row["prompt"] for row in read_rows(tmp_path / "out" / "train.jsonl")] == drawn
    assert [row["prompt"] for row in read_rows(tmp_path / "out" / "heldout.jsonl")] == HELDOUT[:2]
    prompts = [*drawn, *HELDOUT[:2]]
    for number, row in enumerate(written(tmp_path)):
        assert row["models"] == ["sft", "sft", "base"]
        assert row["responses"] == [
            f"{writer} {turn * len(prompts) + number} {row['prompt']}" for turn, writer in enumerate(row["models"])
        ]
    assert metrics == {"sets": 6, "responses": 18, "repeated": 0}
    assert seen == [
        ("loading sft", 0, 18),
        ("sft: response 5 of 18", 5, 18),
        ("sft: response 10 of 18", 10, 18),
        ("sft: response 12 of 18", 12, 18),
        ("loading base", 12, 18),
        ("base: response 17 of 18", 17, 18),
        ("base: response 18 of 18", 18, 18),
    ]


@pytest.mark.parametrize(("say", "repeated"), [("{writer} to {prompt}", 1 / 3), ("the same to all", 2 / 3)])
def test_responses_that_another_to_the_same_prompt_equals_are_counted(
    collect: Collect, say: str, repeated: float
) -> None:
    """To other prompts anything may be said again."""
    assert collect(say=say)[0]["repeated"] == pytest.approx(repeated)


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_stopped_collection_goes_on_where_it_was(collect: Collect, tmp_path: Path, stop_after: int) -> None:
    """It writes what an unbroken one writes, and loads no model that has written all of its own."""
    unbroken = collect()[0]
    expected = written(tmp_path)
    for file in ("out/train.jsonl", "out/heldout.jsonl", "attempt-0/written.jsonl"):
        (tmp_path / file).unlink()
    with pytest.raises(StoppedError):
        collect(stop_after=stop_after)
    metrics, seen = collect(attempts=2)
    assert metrics == unbroken
    assert written(tmp_path) == expected
    assert (seen[0][0] == "loading sft") == (stop_after < 3)
    assert len([said for said in seen if "response" in said[0]]) == 5 - stop_after
