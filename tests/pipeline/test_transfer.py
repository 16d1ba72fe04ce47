import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf.errors import DamageError, DiskFullError, RequestError
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.transfer import export_artifact, import_folder
from rlhf.store import ActionRecord, Store
from rlhf.store.blobs import blob_name
from tests.models.tiny import make_tiny_llama
from tests.pipeline.helpers import load_toy, make, planned, states, write_pipeline, write_weights
from tests.pipeline.toys import KNOWN
from tests.privileges import permissions_obeyed
from tests.store.helpers import flip_bit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path)


def model_folder(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("mine")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "tokenizer.json").write_text("{}")
    write_weights(folder)
    return folder


def no_card(folder: Path) -> str:
    assert (folder / "config.json").exists(), "it is asked for last"
    return "a card"


def imported(path: Path, folder: Path) -> ActionRecord:
    config = load_toy(path)
    return import_folder(folder, config, "total", KNOWN["total"], Store.open(config.store.uri))


def one(path: Path, name: str) -> Planned:
    return planned(path)[name]


def test_an_import_is_the_stages_result_whatever_its_settings_and_inputs(path: Path, tmp_path: Path):
    """It stays so until it is forgotten, and nothing upstream of it is needed."""
    record = imported(path, model_folder(tmp_path / "model"))
    for override in ("total.factor=3.0", "words.left=other"):
        found = planned(path, override)
        assert states(found) == {"words": "unused", "count": "unused", "total": "cached"}
        assert (found["total"].key, found["total"].why) == (record.key, "imported")

    store = Store.open(tmp_path / "store")
    store.delete_ref("toy", "total")
    assert one(path, "total").state == "blocked"
    make(path)
    assert one(path, "total").why == "unchanged"


def test_an_import_takes_what_an_artifact_may_hold_and_leaves_no_folder_behind(path: Path, tmp_path: Path):
    """Pickles and the model's README stay out, and no attempt is left in the store."""
    record = imported(path, model_folder(tmp_path / "model"))
    store = Store.open(tmp_path / "store")
    assert [file.path for file in store.manifest(record.artifact).files] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert list((tmp_path / "store" / "work").iterdir()) == []


def test_the_same_folder_imported_again_is_the_same_result(path: Path, tmp_path: Path):
    """Its name and place are no part of it; its content is."""
    first = imported(path, model_folder(tmp_path / "a"))
    assert imported(path, model_folder(tmp_path / "b")) == first
    assert imported(path, model_folder(tmp_path / "c", size=2)).key != first.key


def test_an_import_that_cannot_be_a_result_is_refused(path: Path, tmp_path: Path):
    """A stage that makes no model, and a folder that holds none."""
    config, store = load_toy(path), Store.open(tmp_path / "store")
    with pytest.raises(RequestError, match="it makes a data"):
        import_folder(model_folder(tmp_path / "a"), config, "words", KNOWN["words"], store)
    with pytest.raises(RequestError, match="holds no model"):
        import_folder(tmp_path / "nothing", config, "total", KNOWN["total"], store)
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="an adapter without the model"):
        import_folder(adapter, config, "total", KNOWN["total"], store)


def test_an_import_that_would_fail_later_or_carry_something_off_is_refused(path: Path, tmp_path: Path):
    """Pickles alone, damaged weights, a configuration that is none, links out of the folder; a hub's own are fine."""
    (secret := tmp_path / "secret.txt").write_text("mine")
    for number, (said, harm) in enumerate(
        {
            "no weights in safetensors": lambda model: (model / "model.safetensors").unlink(),
            "the weights cannot be read": lambda model: (model / "model.safetensors").write_bytes(b"garbage"),
            "a model without a tokenizer": lambda model: (model / "tokenizer.json").unlink(),
            "holds no JSON object": lambda model: (model / "config.json").write_text("[]"),
            "a link to nowhere or out": lambda model: (model / "notes.txt").symlink_to(secret),
        }.items()
    ):
        model = model_folder(tmp_path / f"bad-{number}")
        harm(model)
        with pytest.raises(RequestError, match=said):
            imported(path, model)
    assert not list((tmp_path / "store").rglob("*.json"))

    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    (tmp_path / "hub" / "snapshots").mkdir()
    model = model_folder(tmp_path / "hub" / "snapshots" / "0123")
    (model / "config.json").rename(tmp_path / "hub" / "blobs" / "abc")
    (model / "config.json").symlink_to("../../blobs/abc")
    assert imported(path, model).stage == "import"


def test_an_export_is_a_copy_that_may_be_changed(path: Path, tmp_path: Path):
    """What its owner does with an exported file never reaches the store, and nothing else is left beside it."""
    make(path)
    target = tmp_path / "deep" / "out"
    work = sorted((tmp_path / "store" / "work").rglob("*"))
    export_artifact(one(path, "total"), target, Store.open(tmp_path / "store", create=False), no_card)
    assert {file.name: file.read_text() for file in target.iterdir()} == {"config.json": "2.0", "README.md": "a card"}
    (target / "config.json").write_text("changed")
    assert list(target.parent.iterdir()) == [target]
    assert sorted((tmp_path / "store" / "work").rglob("*")) == work
    assert Store.open(tmp_path / "store").verify().damaged == []


def test_an_export_reads_what_a_plan_trusts(path: Path, tmp_path: Path):
    """A file of the store that lost a bit, size and times as they were, is not passed on."""
    make(path)
    store, found = Store.open(tmp_path / "store"), one(path, "total")
    assert found.record is not None
    (file,) = store.manifest(found.record.artifact).files
    blob = tmp_path / "store" / blob_name(file.sha256)
    times = (blob.stat().st_atime_ns, blob.stat().st_mtime_ns)
    flip_bit(blob)
    os.utime(blob, ns=times)
    with pytest.raises(DamageError, match=r"config\.json has the digest"):
        export_artifact(one(path, "total"), tmp_path / "out", store, no_card)
    assert not (tmp_path / "out").exists()


def test_an_export_never_mixes_with_what_is_there(path: Path, tmp_path: Path):
    """A folder that holds something, a file in the way, and the store's own folder are refused."""
    store = Store.open(tmp_path / "store")
    with pytest.raises(RequestError, match="no result yet"):
        export_artifact(one(path, "total"), tmp_path / "out", store, no_card)
    make(path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for target in (tmp_path / "full", path):
        with pytest.raises(RequestError, match="not empty"):
            export_artifact(one(path, "total"), target, store, no_card)
    with pytest.raises(RequestError, match="is no adapter: there is nothing to merge"):
        export_artifact(one(path, "total"), tmp_path / "out", store, no_card, merge=True)
    with pytest.raises(RequestError, match="cannot be written"):
        export_artifact(one(path, "total"), path / "below", store, no_card)
    with pytest.raises(RequestError, match="inside the store"):
        export_artifact(one(path, "total"), tmp_path / "store" / "out", store, no_card)


def test_an_empty_folder_is_filled_where_it_is(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It may be a mount point, the working folder, a link to elsewhere, or in a folder that cannot be written."""
    make(path)
    store = Store.open(tmp_path / "store")
    (empty := tmp_path / "parent" / "empty").mkdir(parents=True)
    (link := tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(empty)
    inode = empty.stat().st_ino
    empty.parent.chmod(0o555)

    def interrupted(source: Path, target: Path) -> Path:
        if target == empty / "README.md":
            raise KeyboardInterrupt
        return Path(os.rename(source, target) or target)  # noqa: PTH104 - Path.rename is replaced

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_artifact(one(path, "total"), link, store, no_card)
    assert list(empty.iterdir()) == []
    for target in (empty, Path(), link):
        with permissions_obeyed():
            export_artifact(one(path, "total"), target, store, no_card)
        assert {file.name for file in empty.iterdir()} == {"config.json", "README.md"}
        assert empty.stat().st_ino == inode
        for file in empty.iterdir():
            file.unlink()
    empty.parent.chmod(0o755)


def test_an_export_that_fails_leaves_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether what follows the copying fails, there is no room, or what was asked for is no model."""
    make(path)
    store, target = Store.open(tmp_path / "store"), tmp_path / "deep" / "out"

    def interrupted(folder: Path) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_artifact(one(path, "total"), target, store, interrupted)
    with pytest.raises(RequestError, match="words makes a data, which is no model"):
        export_artifact(one(path, "words"), target, store, no_card)
    monkeypatch.setattr("rlhf.pipeline.transfer.free_bytes_at", lambda _: 2)
    with pytest.raises(DiskFullError, match="No room for a file: 3 bytes needed") as error:
        export_artifact(one(path, "total"), target, store, no_card)
    assert "name another DIR" in error.value.next_step
    assert list(target.parent.iterdir()) == []


CONVERTER = """#!/bin/sh
test "$2" = --outfile || exit 3
test -f "$1/config.json" && echo "of $1" > "$3" && echo said >&2 && exit $(cat {status})
"""


def test_gguf_is_what_llama_cpps_converter_writes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By either of its names. Without it, or when it fails, the reason is told, and nothing is left."""
    imported(path, model_folder(tmp_path / "model"))
    store, status, target = Store.open(tmp_path / "store"), tmp_path / "status", tmp_path / "out" / "model"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(RequestError, match=r"llama\.cpp's converter, which is not on PATH") as error:
        export_artifact(one(path, "total"), target, store, no_card, gguf=True)
    assert "llama.cpp" in error.value.next_step
    for name in ("convert-hf-to-gguf", "convert_hf_to_gguf.py"):
        program = tmp_path / name
        program.write_text(CONVERTER.format(status=status))
        program.chmod(0o755)
        status.write_text("1")
        with pytest.raises(RequestError, match=r"converter wrote no model\.gguf: said") as error:
            export_artifact(one(path, "total"), target, store, no_card, gguf=True)
        assert error.value.where == str(program)
        assert list(target.parent.iterdir()) == []
    status.write_text("0")
    export_artifact(one(path, "total"), target, store, no_card, gguf=True)
    assert (target / "model.gguf").read_text().startswith(f"of {target.parent}/.model-")


def test_an_export_samples_as_its_stage_did(path: Path, tmp_path: Path):
    """From the whole vocabulary, at its temperature, with the tokens that end a turn; nothing of the base's remains."""
    folder = model_folder(tmp_path / "model")
    base = {"eos_token_id": [7, 2], "repetition_penalty": 1.1, "top_k": 50}
    (folder / "generation_config.json").write_text(json.dumps(base))
    record = imported(path, folder)
    store, planned_total = Store.open(tmp_path / "store"), one(path, "total")
    export_artifact(planned_total, tmp_path / "as-it-is", store, no_card)
    assert json.loads((tmp_path / "as-it-is" / "generation_config.json").read_text()) == base
    sampled = replace(record, settings={"sampling": {"temperature": 0.8, "max_new_tokens": 32, "fp32_head": True}})
    with permissions_obeyed():  # the store's files are read-only, and this one is written again
        export_artifact(replace(planned_total, record=sampled), tmp_path / "out", store, no_card)
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.temperature, config.max_new_tokens, config.do_sample, config.eos_token_id) == (0.8, 32, True, [7, 2])
    assert (config.top_k, config.top_p, config.repetition_penalty) == (0, 1.0, None)


def test_virtual_tokens_are_exported_beside_their_base_alone(path: Path, tmp_path: Path):
    """No weights can hold them; the refusal says which command writes them."""
    base, adapter = make_tiny_llama(tmp_path / "tiny"), tmp_path / "adapter"
    shutil.copytree(base, adapter / "base")
    write_weights(adapter)
    entries = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(RequestError, match="an adapter without a tokenizer"):
        imported(path, adapter)
    shutil.copyfile(base / "tokenizer.json", adapter / "tokenizer.json")
    imported(path, adapter)
    store = Store.open(tmp_path / "store")
    with pytest.raises(RequestError, match="an adapter of 4 virtual tokens") as error:
        export_artifact(one(path, "total"), tmp_path / "out", store, lambda _: "", merge=True)
    assert error.value.next_step == f"rlhf export total {tmp_path / 'out'}"
    assert (export_artifact(one(path, "total"), tmp_path / "out", store, lambda _: "") / "base").is_dir()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@torch.no_grad()
def test_an_exported_adapter_is_the_trained_model_wherever_it_is_moved(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Beside its base; or folded into a base in bf16 without losing what bf16 could not hold."""
    base = make_tiny_llama(tmp_path / "tiny")
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "adapter" / "base")
    (base / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(base / name, tmp_path / "adapter" / name)
    model: Any = get_peft_model(plain.float(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight += 0.002 * torch.randn(weight.shape)
    model.save_pretrained(tmp_path / "adapter")
    imported(path, tmp_path / "adapter")
    store, ids = Store.open(tmp_path / "store"), torch.tensor([[5, 17, 40, 41, 99, 60]])
    monkeypatch.setattr("rlhf.pipeline.transfer.shutil.which", lambda name: name)
    with pytest.raises(RequestError, match="a GGUF file holds whole weights") as error:
        export_artifact(one(path, "total"), tmp_path / "first", store, lambda _: "", gguf=True)
    assert error.value.next_step == f"rlhf export total {tmp_path / 'first'} --merge --gguf"
    for adapter in (False, True):
        export_artifact(one(path, "total"), tmp_path / "first", store, lambda _: "", merge=not adapter)
        moved = (tmp_path / "first").rename(tmp_path / f"moved-{adapter}")
        whole = AutoModelForCausalLM.from_pretrained(moved / "base" if adapter else moved, dtype="auto").float()
        found: Any = PeftModel.from_pretrained(whole, str(moved)) if adapter else whole
        torch.testing.assert_close(found.eval()(ids).logits, model.eval()(ids).logits, atol=1e-3, rtol=1e-4)
        with model.disable_adapter():
            assert (found(ids).logits - model(ids).logits).abs().max() > 0.01
        assert AutoTokenizer.from_pretrained(moved).chat_template
        assert json.loads((moved / "generation_config.json").read_text()) == {"repetition_penalty": 1.1}
        assert adapter or not [file.name for file in moved.rglob("*.json") if str(tmp_path) in file.read_text()]
