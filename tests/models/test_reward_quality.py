"""What a reward model's folder says of it, out of scores that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.stages import RmSettings
from rlhf.errors import StageError
from rlhf.models.evaluation import QUANTILES, check_padding, draw_reliability, write_quality
from rlhf.ranking.quality import quality
from rlhf.zero import group


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context[RmSettings]:
    """The one rank of a group."""
    monkeypatch.setattr(group, "is_main", lambda: True)
    monkeypatch.setattr(group, "barrier", lambda: None)
    return Context("rm", "key", RmSettings(eval_pairs=500), {}, tmp_path, tmp_path, tmp_path)


def heldout(seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(30, 4))
    ratings = truth[:, :, None] + rng.normal(size=(30, 4, 5))
    sets = [{"responses": list("abcd"), "ratings": one.tolist(), "pool": n // 10} for n, one in enumerate(ratings)]
    sets = [one | {"responses": [f"{n} {text}" for text in "abcd"]} for n, one in enumerate(sets)]
    return sets, torch.tensor(truth.ravel() + rng.normal(size=120))


def test_final_metrics_are_the_figures_of_quality_json(context: Context[RmSettings]) -> None:
    """Each under its name, the human ones with ties as halves; quantiles on the demonstrations' scale."""
    sets, scores = heldout(0)
    texts = [[1] * (5 + index % 7) for index in range(120)]
    demonstrations = torch.tensor([1.0, 3.0, 5.0])
    metrics = write_quality(context, sets, scores, demonstrations, texts)
    written = json.loads((context.output / "quality.json").read_text())
    expected = quality(sets, scores.numpy(), [len(text) for text in texts], 500, 0)
    assert {name: value for name, value in written.items() if name != "scores"} == json.loads(json.dumps(expected))
    assert metrics == {
        "eval/accuracy_low": expected["accuracy"]["low"],
        "eval/accuracy_high": expected["accuracy"]["high"],
        "eval/human_accuracy": expected["beside_people"]["all"]["ties_half"]["human"],
        "eval/human_accuracy_within": expected["beside_people"]["within"]["ties_half"]["human"],
        "eval/kendall_tau": expected["kendall_tau"]["mean"],
        "eval/calibration_error": expected["calibration"]["expected_error"],
    }
    assert len(set(metrics.values())) == len(metrics)
    assert written["scores"]["heldout"] == pytest.approx(np.quantile((scores.numpy() - 3) / 2, QUANTILES))
    assert written["scores"]["demonstrations"] == pytest.approx([-1, -0.9, -0.5, 0, 0.5, 0.9, 1])
    assert (context.output / "reliability.svg").exists()


@pytest.mark.parametrize(("follow", "said"), [(1.0, True), (-1.0, True), (0.0, False)])
def test_scores_that_follow_length_more_than_people_do_are_noted(
    context: Context[RmSettings], *, follow: float, said: bool
) -> None:
    """Longer or shorter alike; people's ratings have nothing to do with length here."""
    sets, scores = heldout(1)
    texts = [[1] * int(length) for length in np.random.default_rng(2).integers(1, 60, 120)]
    lengths = torch.tensor([float(len(text)) for text in texts])
    write_quality(context, sets, scores + follow * lengths, torch.tensor([0.0, 1.0]), texts)
    assert ("may learn to write to a length" in "\n".join(context.folder.notes())) == said


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 0.01), ("bf16", 0.5)])
def test_scores_that_depend_on_the_batch_are_refused_in_deviations(precision: Any, largest: float) -> None:
    """The difference counts by the spread of scores: the same shift passes where scores spread twice as far."""
    texts = [[1] * (length + 1) for length in range(40)]
    scores = torch.zeros(40, dtype=torch.float64)

    def alone(rows: Any) -> Tensor:
        return torch.full((len(rows),), -3.0 * largest, dtype=torch.float64)

    check_padding(alone, texts, scores, 3.1, precision)
    with pytest.raises(StageError, match="depends on the batch"):
        check_padding(alone, texts, scores, 2.9, precision)


def test_eight_texts_of_all_lengths_are_scored_alone_and_the_worst_of_them_counts() -> None:
    """Every fifth of forty, from the shortest up; three are all there is of three."""
    texts = [[1] * length for length in (7, 3, *range(1, 3), *range(4, 7), *range(8, 41))]
    scores = torch.tensor([10.0 + len(text) for text in texts], dtype=torch.float64)
    asked: list[list[int]] = []
    wrong: dict[int, float] = {}

    def alone(rows: Any) -> Tensor:
        asked.append([len(row) for row in rows])
        return torch.tensor([10.0 + len(row) + wrong.get(len(row), 0.0) for row in rows], dtype=torch.float64)

    check_padding(alone, texts, scores, 1.0, "bf16")
    check_padding(alone, texts[:3], scores[:3], 1.0, "bf16")
    assert asked == [[1, 6, 11, 16, 21, 26, 31, 36], [1, 3, 7]]
    wrong[16] = -0.5
    check_padding(alone, texts, scores, 1.0, "bf16")
    wrong[16] = -0.75
    with pytest.raises(StageError, match=r"by up to 0\.75 deviations"):
        check_padding(alone, texts, scores, 1.0, "bf16")


def test_one_rank_writes_and_all_wait_for_it(context: Context[RmSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank has the same metrics to report, and nothing of its own in the folder."""
    waited: list[bool] = []
    monkeypatch.setattr(group, "is_main", lambda: False)
    monkeypatch.setattr(group, "barrier", lambda: waited.append(True))
    sets, scores = heldout(0)
    assert write_quality(context, sets, scores, torch.tensor([1.0, 3.0]), [[1]] * 120)
    assert waited == [True]
    assert not list(context.output.iterdir())


def test_the_picture_shows_each_bin_beside_the_line_of_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points at (said, seen), the area growing with the comparisons, all within the axes, the same bytes each time."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, path: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    rows = [
        {"predicted": 0.5, "observed": 1.0, "comparisons": 30.0},
        {"predicted": 0.75, "observed": 0.5, "comparisons": 15.0},
        {"predicted": 1.0, "observed": 0.875, "comparisons": 60.0},
    ]
    calibration = {"expected_error": 0.1234, "bins": rows}
    files = [tmp_path / "one.picture", tmp_path / "other.picture"]
    for file in files:
        draw_reliability(calibration, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<svg" in files[0].read_bytes()
    assert b"<dc:date>" not in files[0].read_bytes()

    (axes,) = drawn[0].axes
    assert isinstance(axes, Axes)
    (line,), (points,) = axes.lines, axes.collections
    assert isinstance(points, PathCollection)
    assert np.asarray(line.get_data()).T.tolist() == [[0.5, 0.5], [1, 1]]
    assert np.asarray(points.get_offsets()).tolist() == [[0.5, 1], [0.75, 0.5], [1, 0.875]]
    smallest, *areas = np.asarray(points.get_sizes())[[1, 0, 2]]
    assert smallest > 0
    assert (areas[1] - smallest) == pytest.approx(3 * (areas[0] - smallest))
    assert areas[1] == pytest.approx(200), "the largest bin is as large in every picture"
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0.5 < 1 < right < 1.1
    assert low < 0.5 < 1 < high < 1.1
    assert left > 0.4
    assert low > 0.2
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [line.get_label(), points.get_label()]
    assert "said" in str(line.get_label())
    assert "comparisons" in str(points.get_label())
    assert "by the scores" in axes.get_xlabel()
    assert "by annotators" in axes.get_ylabel()
    assert "0.123" in axes.get_title()
    assert drawn[0].get_figwidth() == drawn[0].get_figheight()
