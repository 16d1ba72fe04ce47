"""Stage rm, with a trainer and a model that are known: what is learned from, by which loss, and what is said of it."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.config.stages import RmSettings
from rlhf.errors import DivergedError, StageError
from rlhf.models import reward_losses
from rlhf.models.response_lists import ListBatch, collate
from rlhf.models.text import load_tokenizer, scored_ids
from rlhf.pipeline.context import Context
from rlhf.ranking.heldout import heldout_accuracy
from rlhf.zero import group
from stages import rm
from tests.models.tiny import make_tiny_llama

TRAIN: list[dict[str, Any]] = [
    {"prompt": "a film", "responses": ["a joy", "dull", "of two halves"], "ratings": [[3, 4], [1, 0], [1, 2]]},
    {"prompt": "the film", "responses": ["is a joy", "is dull"], "ratings": [[2, 2], [1, 3]]},
]
STRENGTHS = [[2.0, -1.0, 0.5], [3.0, 0.5]]
TRAIN = [
    one | {"strengths": strengths, "elo": [100 * strength for strength in strengths], "pool": number}
    for number, (one, strengths) in enumerate(zip(TRAIN, STRENGTHS, strict=True))
]
HELDOUT: list[dict[str, Any]] = [
    one | {"prompt": "two", "responses": ["!", *(f"{text} , dull" for text in one["responses"][1:])]} for one in TRAIN
]
DEMONSTRATIONS = [{"prompt": "a film", "completion": text} for text in ("is a joy", "of joy", "of two dull halves")]


def raw(ids: Sequence[int]) -> float:
    """A score that every token changes."""
    return sum((number + 1) * (token % 17) for number, token in enumerate(ids)) / 1000


class Trainers:
    """Stands for :mod:`rlhf.zero.trainers`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.loss: Any = None
        self.calls: list[Any] = []
        self.scored: list[tuple[list[list[int]], int]] = []
        self.config: dict[str, Any] = {}

    def reward_trainer(self, context: Any, model: Any, tokenizer: Any, rows: Any, loss: Any) -> str:
        del context, tokenizer
        self.rows, self.loss = list(rows), loss
        self.calls.append(model())
        return "trainer"

    def train(self, trainer: str, context: Any) -> None:
        self.calls.append((trainer, context.stage))

    def scores(self, trainer: str, texts: Sequence[list[int]], at_once: int) -> Tensor:
        assert self.calls[-1] == (trainer, "rm"), "scores are those of the trained model"
        self.scored.append((list(texts), at_once))
        return torch.tensor([raw(ids) for ids in texts])

    def export(self, trainer: str, base: Path, context: Any, *, scores: bool, config: dict[str, Any]) -> None:
        self.config = config
        self.calls.append(("export", trainer, base, context.stage, scores))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> Trainers:
    """In the one rank of a group."""
    monkeypatch.setattr(group, "is_main", lambda: True)
    monkeypatch.setattr(group, "barrier", lambda: None)
    monkeypatch.setattr(rm, "load_scorer", lambda *args, **more: ("model", args[:2], more))
    found = Trainers()
    monkeypatch.setattr(rm, "trainers", found)
    return found


def context(base: Path, folder: Path, demonstrations: list[Any] = DEMONSTRATIONS, **settings: Any) -> Context[Any]:
    for name, rows in {
        "comparisons/train": TRAIN,
        "comparisons/heldout": HELDOUT,
        "demonstrations/train": demonstrations,
    }.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"base": base, "comparisons": folder / "comparisons", "demonstrations": folder / "demonstrations"}
    return Context("rm", "key", RmSettings(**settings), inputs, folder, folder, folder)


@pytest.mark.parametrize("sees", ["conversation", "response"])
def test_a_list_is_its_sets_texts_with_strengths_about_their_mean(
    base: Path, trainers: Trainers, tmp_path: Path, sees: str
) -> None:
    """The mean is that over all responses of all sets, 1 here; a response alone is encoded without its prompt."""
    metrics = rm.run(context(base, tmp_path, sees=sees, max_length=8))
    tokenizer = load_tokenizer(base)
    assert [row["ids"] for row in trainers.rows] == [
        [scored_ids(tokenizer, one["prompt"] if sees == "conversation" else None, text, 8) for text in one["responses"]]
        for one in TRAIN
    ]
    assert [row["strengths"] for row in trainers.rows] == [[1.0, -2.0, -0.5], [2.0, -0.5]]
    assert metrics["lists"] == 2
    assert "preferences" not in trainers.rows[0]


def test_drawn_lists_are_as_many_as_are_asked_for(base: Path, trainers: Trainers, tmp_path: Path) -> None:
    """Three pairs of three responses and one of two, where every response is to be in two and more."""
    metrics = rm.run(context(base, tmp_path, responses_per_list=2, lists_per_response=9.0))
    assert [len(row["ids"]) for row in trainers.rows] == [2] * 4
    assert metrics["lists"] == 4


@pytest.mark.parametrize(("loss", "first"), [("soft-strengths", 1 / (1 + 10**-0.75)), ("soft-share", 1.0)])
def test_soft_losses_are_given_the_probabilities_of_their_kind(
    base: Path, trainers: Trainers, tmp_path: Path, loss: str, first: float
) -> None:
    """300 Elo points apart, and preferred by both annotators."""
    rm.run(context(base, tmp_path, loss=loss))
    assert trainers.rows[0]["preferences"][0][1] == pytest.approx(first)
    assert trainers.rows[0]["preferences"][1][0] == pytest.approx(1 - first)


@pytest.mark.parametrize("loss", ["pairwise", "soft-strengths", "soft-share", "listwise", "regression"])
def test_the_loss_is_that_of_the_settings_and_the_centring(
    base: Path, trainers: Trainers, tmp_path: Path, loss: str
) -> None:
    """With the settings' margin, smoothing and weight of the centring."""
    smoothing = 0.0 if loss in ("listwise", "regression") else 0.1
    rm.run(context(base, tmp_path, loss=loss, margin=0.3, label_smoothing=smoothing, centering=0.7))
    lists = ListBatch(**collate(trainers.rows, padding=0))
    scores = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.25, 0.0]])
    expected = {
        "pairwise": lambda: reward_losses.pairwise(scores, lists.strengths, lists.present, 0.3, 0.1),
        "soft-strengths": lambda: reward_losses.soft(scores, lists.preferences, 0.1),
        "soft-share": lambda: reward_losses.soft(scores, lists.preferences, 0.1),
        "listwise": lambda: reward_losses.listwise(scores, lists.strengths, lists.present),
        "regression": lambda: reward_losses.regression(scores, lists.strengths, lists.present),
    }[loss]()
    torch.testing.assert_close(
        trainers.loss(scores, lists), expected + 0.7 * reward_losses.centring(scores, lists.present)
    )


def test_the_normaliser_is_that_of_demonstrations_and_the_range_that_of_all_that_was_scored(
    base: Path, trainers: Trainers, tmp_path: Path
) -> None:
    """The model is written with it and with what it sees; the metrics are of held-out responses."""
    run = context(base, tmp_path, micro_batch_size=3, eval_pairs=5, max_length=20, seed=4)
    metrics = rm.run(run)
    tokenizer = load_tokenizer(base)
    known = [raw(scored_ids(tokenizer, one["prompt"], one["completion"], 20)) for one in DEMONSTRATIONS]
    texts = [scored_ids(tokenizer, one["prompt"], text, 20) for one in HELDOUT for text in one["responses"]]
    scores = [raw(text) for text in texts]
    mean, deviation = statistics.mean(known), statistics.stdev(known)
    normal = [(score - mean) / deviation for score in known + scores]
    assert min(normal) < min(normal[:3])
    assert max(normal) > max(normal[:3])
    assert trainers.config == {
        "score_mean": pytest.approx(mean, rel=1e-6),
        "score_std": pytest.approx(deviation, rel=1e-6),
        "score_low": pytest.approx(min(normal), rel=1e-5),
        "score_high": pytest.approx(max(normal), rel=1e-5),
        "sees": "conversation",
        "score_max_length": 20,
    }
    model, *others = trainers.calls
    assert model == ("model", (base, "fp32"), {"head_seed": 4})
    assert others == [("trainer", "rm"), ("export", "trainer", base, "rm", True)]
    assert trainers.scored[1] == (texts, 2 * 3 * 3), "twice the responses of a micro batch of lists of three"
    assert trainers.scored[2][1] == 1, "padding is looked for with texts alone"
    expected = heldout_accuracy(HELDOUT, np.array(scores, np.float32), 5, 4)
    assert {name: metrics[name] for name in expected} == expected
    assert metrics.keys() >= {"eval/human_accuracy", "lists"}
    assert (tmp_path / "quality.json").exists()


def test_one_score_for_everything_is_a_divergence(base: Path, trainers: Trainers, tmp_path: Path) -> None:
    """There is no deviation to divide by, and nothing is written."""
    with pytest.raises(DivergedError, match="all demonstrations one score"):
        rm.run(context(base, tmp_path, demonstrations=DEMONSTRATIONS[:1] * 3))
    assert trainers.config == {}


def test_a_score_that_depends_on_the_batch_is_refused(
    base: Path, trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is written."""

    def scores(_: Any, texts: Sequence[list[int]], at_once: int) -> Tensor:
        return torch.tensor([raw(ids) + (at_once > 1) * len(ids) for ids in texts])

    monkeypatch.setattr(trainers, "scores", scores)
    with pytest.raises(StageError, match="depends on the batch"):
        rm.run(context(base, tmp_path))
    assert trainers.config == {}


def test_from_scratch_the_model_of_random_weights_is_trained_and_written(
    base: Path, trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made by the stage's seed, and the base gives its shape and tokenizer alone."""
    random = make_tiny_llama(tmp_path / "random")
    made: list[SimpleNamespace] = []

    def from_scratch(folder: Path, target: Path, seed: int) -> Path:
        made.append(SimpleNamespace(folder=folder, target=target, seed=seed))
        return random

    monkeypatch.setattr(rm, "from_scratch", from_scratch)
    rm.run(context(base, tmp_path, init="scratch", seed=3))
    assert made == [SimpleNamespace(folder=base, target=tmp_path / "reward", seed=3)]
    assert trainers.calls[0][1] == (random, "fp32")
    assert trainers.calls[-1][2] == random


@pytest.mark.parametrize("config", [{}, {"score_mean": 0.5}])
def test_training_starts_from_plain_weights_of_whichever_kind_is_given(
    base: Path, trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, float]
) -> None:
    """An adapter's are folded in beside the attempt, and a reward model keeps the head that scores."""
    asked: list[Any] = []

    def plain_folder(folder: Path, target: Path, precision: str, *, scores: bool) -> Path:
        asked.append((folder, target, precision, scores))
        return base

    monkeypatch.setattr(rm, "plain_folder", plain_folder)
    (given := tmp_path / "given").mkdir()
    (given / "config.json").write_text(json.dumps(config))
    run = context(given, tmp_path)
    rm.run(run)
    assert asked == [(given, run.attempt / "policy", "fp32", bool(config))]
    assert trainers.calls[0][1] == (base, "fp32")
