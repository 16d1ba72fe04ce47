import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import IndexUnreachableError, PreflightError, RlhfError
from rlhf.models import base_models
from tests.models.tiny import SHAPE, TEXTS


def made(folder: Path, seed: int) -> dict[str, bytes]:
    base_models.make_from_scratch(SHAPE, TEXTS, seed, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_from_scratch_is_a_function_of_texts_and_seed(tmp_path: Path) -> None:
    """The same bytes again; another seed changes the weights and not the tokenizer."""
    first, again, other = (made(tmp_path / str(index), seed) for index, seed in enumerate((0, 0, 1)))
    assert first == again
    assert first["tokenizer.json"] == other["tokenizer.json"]
    assert first["model.safetensors"] != other["model.safetensors"]


def test_a_model_from_scratch_finds_all_tokens_about_equally_likely(tmp_path: Path) -> None:
    """Its loss is ln(vocabulary); a missed initialisation would start far above."""
    made(tmp_path, seed=0)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, SHAPE.vocabulary, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(SHAPE.vocabulary), abs=0.1)


def test_the_tokenizer_says_any_text_and_knows_the_chat(tmp_path: Path) -> None:
    """Byte-level: what was never seen survives; roles and the end are one token each."""
    made(tmp_path, seed=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the film", "naïve – 映画 🎬", " two  spaces\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert len(ids) == 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= SHAPE.vocabulary


def test_parameters_are_counted_once(tiny: Path) -> None:
    """Tied embeddings are stored and counted once."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    assert base_models.check(tiny) == sum(parameter.numel() for parameter in model.parameters())


def test_a_folder_that_is_no_model_is_told_by_what_is_wrong(tmp_path: Path, tiny: Path) -> None:
    """Before any worker starts: missing weights, an unknown model, a tokenizer too large for the embeddings."""

    def broken(name: str) -> Path:
        shutil.copytree(tiny, tmp_path / name)
        return tmp_path / name

    without_weights = broken("weights")
    (without_weights / "model.safetensors").unlink()
    with pytest.raises(PreflightError, match=r"no \.safetensors"):
        base_models.check(without_weights)

    def change_config(folder: Path, **entries: Any) -> Path:
        config = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    (cut := broken("cut") / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(PreflightError, match="the weights cannot be read"):
        base_models.check(cut.parent)
    (odd := broken("odd") / "config.json").write_text("[")
    with pytest.raises(PreflightError, match="the base model's configuration cannot be used"):
        base_models.check(odd.parent)
    with pytest.raises(PreflightError, match="unheard_of"):
        base_models.check(change_config(broken("unknown"), model_type="unheard_of"))
    with pytest.raises(PreflightError, match=r"the tokenizer has \d+ tokens and the model embeds 200"):
        base_models.check(change_config(broken("small"), vocab_size=200))


def test_a_copied_folder_has_no_pickles_and_nothing_hidden(tmp_path: Path, tiny: Path) -> None:
    """Weights of other kinds than safetensors could run code when they are read."""
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    for name in ("pytorch_model.bin", "model.gguf", ".cache", "README.md"):
        (source / name).write_text("x")
    (tmp_path / "target").mkdir()
    base_models.copy_local(str(source), tmp_path / "target")
    assert {path.name for path in (tmp_path / "target").iterdir()} == {path.name for path in tiny.iterdir()}
    assert base_models.check(tmp_path / "target") == base_models.check(tiny)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/hub"), PreflightError, "HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/.cache"), PreflightError, "HF_HOME"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), IndexUnreachableError, "network"),
    ],
)
def test_a_hub_cache_that_cannot_be_written_is_no_fault_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[RlhfError], said: str
) -> None:
    """The variable that places it is named; what the network does wrong stays an error of the network."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind) as caught:
        base_models.fetch_from_hub("owner/model", "0" * 40, tmp_path)
    assert said in caught.value.next_step
    if error.filename:
        assert caught.value.where == error.filename
