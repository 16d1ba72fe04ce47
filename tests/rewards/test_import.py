import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.pipeline import load_pipeline
from rlhf.errors import RequestError
from rlhf.pipeline.stage import stages
from rlhf.pipeline.transfer import import_folder
from rlhf.store import ActionRecord, Store
from tests.pipeline.helpers import write_weights

SOUND: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "max_position_embeddings": 64,
    "id2label": {"0": "LABEL_0"},
    "score_mean": 0,
    "score_std": 1.5,
    "sees": "response",
    "score_max_length": 64,
}


def imported(folder: Path, config: dict[str, Any]) -> ActionRecord:
    (model := folder / "model").mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    write_weights(model)
    (folder / "p.yaml").write_text("model: {}\ndata: {}\nrank: {}\nrm: {}\n")
    known = stages()
    pipeline = load_pipeline(folder / "p.yaml", [], {name: stage.settings for name, stage in known.items()})
    return import_folder(model, pipeline, "rm", known["rm"], Store.open(folder / "store"))


def test_an_encoder_that_says_what_its_scores_mean_is_a_reward_model(tmp_path: Path) -> None:
    """Four entries in its config.json are all that is asked of a model from elsewhere."""
    record = imported(tmp_path, SOUND)
    assert Store.open(tmp_path / "store").manifest(record.artifact).kind == "reward-model"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score_mean": "0"}, "score_mean cannot be '0'"),
        ({"score_mean": float("nan")}, "score_mean cannot be nan"),
        ({"score_std": 0.0}, "score_std cannot be 0.0"),
        ({"score_std": -1}, "score_std cannot be -1"),
        ({"sees": "both"}, "sees cannot be 'both'"),
        ({"score_max_length": 65}, "score_max_length cannot be 65; its context is 64 tokens"),
        ({"score_max_length": 0}, "score_max_length cannot be 0"),
        ({"architectures": ["BertForMaskedLM"]}, "no reward model but a BertForMaskedLM"),
        ({"id2label": {"0": "bad", "1": "good", "2": "best"}}, "answers 3 numbers a text"),
        ({"id2label": None}, "answers 2 numbers a text"),
    ],
)
def test_a_model_whose_scores_would_mean_nothing_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """At the import and not in the middle of PPO: an unknown view, a head of chance, several numbers a text."""
    config = {name: value for name, value in (SOUND | change).items() if value is not None}
    with pytest.raises(RequestError, match=said) as caught:
        imported(tmp_path, config)
    assert caught.value.where.endswith("config.json")


@pytest.mark.parametrize("name", ["score_mean", "score_std", "sees", "score_max_length"])
def test_a_model_that_does_not_say_what_its_scores_mean_is_refused(tmp_path: Path, name: str) -> None:
    """The message names what lacks, and an example of it."""
    with pytest.raises(RequestError, match=f"lacks {name}") as caught:
        imported(tmp_path, {key: value for key, value in SOUND.items() if key != name})
    assert f'"{name}": ' in caught.value.next_step
