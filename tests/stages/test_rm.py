"""Stage rm around a training that is made up: what is learned from, and what the result says of its scores."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rlhf.training.trl_trainers
from rlhf.attempt.context import Context
from rlhf.config.stages import RmSettings
from rlhf.errors import DivergedError, StageError
from rlhf.models import reward_losses
from rlhf.models.reward_losses import ListBatch, collate
from rlhf.models.text import load_tokenizer, response_ids
from rlhf.ranking.lists import ResponseIndex, by_share, by_strength
from rlhf.ranking.quality import heldout_accuracy
from rlhf.zero import group
from tests.models.tiny import make_tiny_llama

# DeepSpeed's, torch's, TRL's and transformers' own.
pytestmark = pytest.mark.filterwarnings("ignore")


def a_set(number: int, prompt: str, responses: list[str], strengths: list[float]) -> dict[str, Any]:
    ratings = [[strength, strength + 0.5 * (-1) ** place] for place, strength in enumerate(strengths)]
    elo = [100.0 * strength for strength in strengths]
    return {
        "prompt": prompt,
        "responses": responses,
        "strengths": strengths,
        "elo": elo,
        "ratings": ratings,
        "pool": number,
    }


TRAIN = [
    a_set(0, "a film", ["a joy", "dull , dull", "two halves of a film"], [2.0, -1.0, 0.25]),
    a_set(1, "the film", ["a film", "the joy"], [1.0, 3.0]),
    a_set(2, "two", ["dull", "joy"], [5.0, 5.0]),  # no order to learn from
]
HELDOUT = [
    a_set(0, "halves", ["the", "of a joy", "dull film"], [1.0, -2.0, 0.5]),
    a_set(1, "a joy", ["film", "two films of joy"], [-1.0, 1.5]),
]
DEMONSTRATIONS = [{"prompt": "film", "completion": text} for text in ("a joy", "is dull", "the halves of the film")]


def made_up(ids: Sequence[int]) -> float:
    """A score that depends on every id of a text and on nothing else."""
    return 0.3 * math.sin(sum((place + 1) * token for place, token in enumerate(ids)))


@dataclass
class Training:
    """What the stage gave to training, and what of it was kept."""

    context: Context[RmSettings]
    score: Callable[[Sequence[int]], float] = made_up
    alone: float = 0.0
    """By how much a text read alone scores more."""
    load: Any = None
    lists: list[dict[str, Any]] = field(default_factory=list)
    loss: Any = None
    trained: int = 0
    at_once: list[int] = field(default_factory=list)
    exported: list[tuple[Path, bool, dict[str, Any]]] = field(default_factory=list)

    def reward_trainer(self, context: Any, load: Any, tokenizer: Any, lists: Any, loss: Any) -> "Training":
        del context, tokenizer
        self.load, self.lists, self.loss = load, lists.to_list(), loss
        return self

    def train(self, trainer: Any, context: Any) -> None:
        assert (trainer, context) == (self, self.context)
        self.trained += 1

    def scores(self, trainer: Any, texts: Sequence[list[int]], at_once: int) -> Tensor:
        assert trainer is self
        assert self.trained == 1
        self.at_once.append(at_once)
        return torch.tensor([self.score(ids) + self.alone * (at_once == 1) for ids in texts])

    def export(self, trainer: Any, source: Path, context: Any, *, scores: bool, config: dict[str, Any]) -> None:
        assert (trainer, context) == (self, self.context)
        self.exported.append((source, scores, config))


Start = Callable[..., tuple[Training, Callable[[], dict[str, float]]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    from rlhf.stages import rm

    for role, parts in (
        ("comparisons", {"train": TRAIN, "heldout": HELDOUT}),
        ("demonstrations", {"train": DEMONSTRATIONS}),
    ):
        (tmp_path / role).mkdir()
        for part, rows in parts.items():
            (tmp_path / role / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"base": base, "comparisons": tmp_path / "comparisons", "demonstrations": tmp_path / "demonstrations"}
    monkeypatch.setattr(group, "is_main", lambda: True)
    monkeypatch.setattr(group, "barrier", lambda: None)
    monkeypatch.setattr(group, "device", lambda: torch.device("cpu"))

    def started(*, given: Path = base, **values: Any) -> tuple[Training, Callable[[], dict[str, float]]]:
        settings = RmSettings.model_validate({"micro_batch_size": 3, "max_length": 32} | values)
        context = Context("rm", "key", settings, inputs | {"base": given}, tmp_path, tmp_path, tmp_path)
        training = Training(context)
        for name in ("reward_trainer", "train", "scores", "export"):
            monkeypatch.setattr(rlhf.training.trl_trainers, name, getattr(training, name))
        return training, lambda: rm.run(context)

    return started


def read(base: Path, sees: str, prompt: str, response: str, max_length: int) -> list[int]:
    """What a model reads: the chat up to the assistant's turn where it sees one, response and EOS; cut at the start."""
    tokenizer: Any = load_tokenizer(base)
    before: list[int] = []
    if sees == "conversation":
        chat = [{"role": "user", "content": prompt}]
        before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return [*before, *response_ids(tokenizer, response)][-max_length:]


@pytest.mark.parametrize(("sees", "max_length"), [("response", 32), ("conversation", 32), ("conversation", 8)])
def test_each_list_has_its_responses_as_they_are_read_and_strengths_less_the_mean_of_all(
    start: Start, base: Path, sees: str, max_length: int
) -> None:
    """The set without an order is no list, and its strengths count in the mean."""
    training, run = start(sees=sees, max_length=max_length)
    assert run()["lists"] == 2
    middle = (2 - 1 + 0.25 + 1 + 3 + 5 + 5) / 7
    for row, one in zip(training.lists, TRAIN[:2], strict=True):
        assert row["ids"] == [read(base, sees, one["prompt"], text, max_length) for text in one["responses"]]
        assert row["strengths"] == pytest.approx([strength - middle for strength in one["strengths"]])
        assert "preferences" not in row
    assert training.at_once == [2 * 3 * 3, 2 * 3 * 3, 1]


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [("pairwise", 0.2), ("soft-strengths", 0.2), ("soft-share", 0.0), ("listwise", 0.0), ("regression", 0.0)],
)
def test_the_loss_asked_for_is_the_loss_trained_with(start: Start, name: str, smoothing: float) -> None:
    """With its margin, smoothing, preferences and centring."""
    training, run = start(loss=name, margin=0.7, label_smoothing=smoothing, centering=0.3)
    run()
    lists = ListBatch(**collate(training.lists, padding=0))
    preferences = {"soft-strengths": by_strength(TRAIN), "soft-share": by_share(TRAIN)}.get(name)
    if preferences is not None:
        for number, one in enumerate(TRAIN[:2]):
            size = len(one["responses"])
            expected = preferences([ResponseIndex(number, place) for place in range(size)])
            np.testing.assert_allclose(lists.preferences[number, :size, :size], expected, rtol=1e-6)
    scores = torch.tensor([[0.3, -1.0, 2.0], [0.1, 0.9, 0.0]])
    strengths, present = lists.strengths, lists.present
    found = {
        "pairwise": lambda: reward_losses.pairwise(scores, strengths, present, 0.7, 0.2),
        "soft-strengths": lambda: reward_losses.soft(scores, lists.preferences, 0.2),
        "soft-share": lambda: reward_losses.soft(scores, lists.preferences),
        "listwise": lambda: reward_losses.listwise(scores, strengths, present),
        "regression": lambda: reward_losses.regression(scores, strengths, present),
    }[name]()
    # Of the sums of two scores of a list: -0.7, 2.3, 1; 1.
    centring = 0.3 * torch.tensor([(0.7**2 + 2.3**2 + 1) / 3, 1.0])
    torch.testing.assert_close(training.loss(scores, lists), found + centring)


@pytest.mark.parametrize("extreme", ["demonstrations", "heldout"])
def test_the_exported_normaliser_gives_demonstrations_mean_0_and_deviation_1(
    start: Start, base: Path, extreme: str
) -> None:
    """And says between which scores, so normalised, all lay that the model was asked for."""
    training, run = start(sees="conversation", max_length=30)
    known = [read(base, "conversation", "film", d["completion"], 30) for d in DEMONSTRATIONS]
    texts = [read(base, "conversation", one["prompt"], text, 30) for one in HELDOUT for text in one["responses"]]
    wide = known if extreme == "demonstrations" else texts
    training.score = lambda ids: made_up(ids) * (3 if ids in wide else 1)
    run()
    normal, heldout = [training.score(ids) for ids in known], [training.score(ids) for ids in texts]
    mean, deviation = statistics.mean(normal), statistics.stdev(normal)
    normalised = [(score - mean) / deviation for score in normal + heldout]
    [(source, scores, config)] = training.exported
    assert source == base
    assert scores
    assert config == {
        "score_mean": pytest.approx(mean, abs=1e-6),
        "score_std": pytest.approx(deviation, abs=1e-6),
        "score_low": pytest.approx(min(normalised), abs=1e-5),
        "score_high": pytest.approx(max(normalised), abs=1e-5),
        "sees": "conversation",
        "score_max_length": 30,
    }


def test_the_final_metrics_are_of_the_held_out_responses_scores(start: Start, base: Path, tmp_path: Path) -> None:
    """Against the same measures of the same scores, computed beside the stage."""
    training, run = start(sees="response", seed=5, eval_pairs=3)
    metrics = run()
    texts = [read(base, "response", "", text, 32) for one in HELDOUT for text in one["responses"]]
    accuracy = heldout_accuracy(HELDOUT, np.array([training.score(ids) for ids in texts]), 3, 5)
    assert {name: metrics[name] for name in accuracy} == accuracy
    assert set(metrics) > set(accuracy) | {"lists", "eval/kendall_tau", "eval/human_accuracy"}
    quantiles = json.loads((tmp_path / "quality.json").read_text())["scores"]
    normal = [training.score(read(base, "response", "", d["completion"], 32)) for d in DEMONSTRATIONS]
    for name, scores in (("heldout", [training.score(ids) for ids in texts]), ("demonstrations", normal)):
        ends = [(end(scores) - statistics.mean(normal)) / statistics.stdev(normal) for end in (min, max)]
        assert [quantiles[name][0], quantiles[name][-1]] == pytest.approx(ends, abs=1e-5)


@pytest.mark.parametrize("score", [0.25, 0.1, 1.7])
def test_a_model_that_scores_all_demonstrations_alike_has_diverged(start: Start, score: float) -> None:
    """It is no result, whatever rounding makes of the mean."""
    training, run = start()
    training.score = lambda _: score
    with pytest.raises(DivergedError, match="all demonstrations one score"):
        run()
    assert not training.exported


def test_a_model_whose_scores_depend_on_padding_is_no_result(start: Start) -> None:
    """Read alone, texts have other scores than in batches."""
    training, run = start()
    training.alone = 0.5
    with pytest.raises(StageError, match="depends on the batch"):
        run()
    assert not training.exported


def test_training_begins_at_the_base_or_at_random_weights_of_its_shape(
    start: Start, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a head drawn by the seed; of an adapter, what it adapts is folded in as a reward model or as none."""
    from rlhf.stages import rm
    from rlhf.training import loading

    loaded: list[tuple[Any, ...]] = []
    folded: list[tuple[Any, ...]] = []
    plain = loading.plain_folder

    def plain_folder(folder: Path, target: Path, precision: str, *, scores: bool) -> Path:
        folded.append((folder, target, precision, scores))
        return plain(folder, target, "fp32", scores=scores)

    monkeypatch.setattr(loading, "plain_folder", plain_folder)
    monkeypatch.setattr(
        rm,
        "load_scorer",
        lambda folder, precision, tuning, tokenizer, head_seed: loaded.append(
            (folder, precision, tokenizer.name_or_path, head_seed)
        ),
    )
    for init, folder in (("base", base), ("scratch", tmp_path / "reward")):
        training, run = start(init=init, seed=7)
        run()
        training.load()
        assert loaded.pop() == (folder, "fp32", str(folder), 7)
        assert folded.pop() == (base, tmp_path / "policy", "fp32", False)
        assert training.exported[0][0] == folder
    shapes = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "reward")]
    assert shapes[0]["hidden_size"] == shapes[1]["hidden_size"]
    assert (base / "model.safetensors").read_bytes() != (tmp_path / "reward" / "model.safetensors").read_bytes()

    scorer = tmp_path / "scorer"
    scorer.mkdir()
    for file in base.iterdir():
        (scorer / file.name).symlink_to(file)
    (scorer / "config.json").unlink()
    (scorer / "config.json").write_text(json.dumps(shapes[0] | {"score_mean": 0.0}))
    _, run = start(given=scorer)
    run()
    assert folded.pop() == (scorer, tmp_path / "policy", "fp32", True)


def test_the_accuracies_of_a_task_are_those_of_its_sets_alone() -> None:
    """Beside those over all sets; a task whose sets order nothing has none."""
    from rlhf.stages.rm import accuracies

    tasks = ["x", "y", "x", "flat"]
    sets = [a_set(number, "p", ["a", "b", "c"], [1.0, number, -2.0]) for number in range(3)]
    sets.append(a_set(3, "p", ["a", "b", "c"], [0.0, 0.0, 0.0]))
    sets[3]["ratings"] = [[1.0]] * 3
    scores = torch.linspace(-1, 1, 12).sin() * torch.tensor([1.0, -1.0] * 6)
    overall = heldout_accuracy(sets, scores.numpy(), 50, 1)
    found = accuracies([row | {"task": task} for row, task in zip(sets, tasks, strict=True)], scores, 50, 1)
    of_x = heldout_accuracy([sets[0], sets[2]], scores[[0, 1, 2, 6, 7, 8]].numpy(), 50, 1)
    of_y = heldout_accuracy([sets[1]], scores[3:6].numpy(), 50, 1)
    by_task = {f"{name}/{task}": value for task, alone in (("x", of_x), ("y", of_y)) for name, value in alone.items()}
    assert found == overall | by_task
    assert found["eval/accuracy/x"] != found["eval/accuracy/y"]
