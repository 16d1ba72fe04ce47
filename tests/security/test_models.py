"""A model's folder comes from anywhere: whatever is in it, loading it runs nothing of it."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf.models.folders as folders
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import PreflightError, RequestError
from rlhf.models import base_models, safe_loading
from rlhf.models.text import load_tokenizer
from rlhf.pipeline.stage import stages
from rlhf.pipeline.transfer import import_folder
from rlhf.store import Store
from tests.models.tiny import make_tiny_llama
from tests.pipeline.helpers import REPOSITORY, load_toy, write_pipeline

CODE = "from pathlib import Path\nPath({mark!r}).touch()\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_tiny_llama(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return load_toy(write_pipeline(tmp_path))


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def with_code(folder: Path, model_type: str) -> Path:
    """Give a model's folder code that leaves a mark when it runs; the mark."""
    mark = folder.parent / "ran"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(CODE.format(mark=str(mark)))
    change(
        folder / "config.json",
        model_type=model_type,
        auto_map={"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
    )
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Tokenizer", None]})
    return mark


def test_a_model_that_needs_code_of_its_own_is_refused_and_nothing_runs(
    model: Path, tmp_path: Path, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
):
    """As a base model, as an import and when it is loaded; and nobody is asked on the terminal whether it may."""
    mark = with_code(model, "evil")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    told = "needs code of its own (configuration_evil.Config), and no model's code is ever run"
    with pytest.raises(PreflightError) as caught:
        base_models.check(model)
    assert told in caught.value.what
    store = Store.open(tmp_path / "store")
    with pytest.raises(RequestError) as caught:
        import_folder(model, config, "sft", stages()["sft"], store)
    assert told in caught.value.what
    with pytest.raises(PreflightError):
        folders.load_whole(model, scores=False, dtype=torch.float32)
    assert not mark.exists()


def test_code_beside_a_known_architecture_is_left_behind_and_not_run(
    model: Path, tmp_path: Path, config: PipelineConfig
):
    """Many models of hubs have both: transformers' own class reads them, and their code stays where it is."""
    mark = with_code(model, json.loads((model / "config.json").read_text())["model_type"])
    copy = tmp_path / "copy"
    copy.mkdir()
    base_models.copy_local(str(model), copy)
    assert not list(copy.glob("*.py"))
    assert base_models.check(copy) > 0
    load_tokenizer(model)
    folders.load_whole(model, scores=False, dtype=torch.float32)
    store = Store.open(tmp_path / "store")
    record = import_folder(model, config, "sft", stages()["sft"], store)
    assert not [file.path for file in store.manifest(record.artifact).files if file.path.endswith(".py")]
    assert not mark.exists()


def test_code_that_is_to_be_fetched_from_a_hub_is_refused(model: Path):
    """A folder without any file of code may name another repository's, or compiled kernels."""
    shutil.copytree(model, kernels := model.with_name("kernels"))
    change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "owner/repository--file.Config"})
    with pytest.raises(PreflightError, match="code of its own"):
        base_models.check(model)
    change(kernels / "config.json", text_config={"_attn_implementation": "owner/kernels"})
    with pytest.raises(PreflightError, match="compiled code from a hub"):
        base_models.check(kernels)


def test_an_adapter_cannot_name_a_module_to_be_imported(model: Path):
    """PEFT imports what `megatron_core` says, if there is a `megatron_config`."""
    (model / "base").mkdir()
    shutil.copyfile(model / "config.json", model / "base" / "config.json")
    (model / "adapter_config.json").write_text(
        json.dumps({"megatron_config": {"x": 1}, "megatron_core": "antigravity"})
    )
    with pytest.raises(PreflightError, match="names a Python module"):
        safe_loading.refuse_code(model)


def test_weights_that_are_pickles_are_never_read(model: Path):
    """Not even where they are all that there is."""
    weights = {"lm_head.weight": torch.zeros(1)}
    for file in model.glob("*.safetensors"):
        file.unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        folders.load_whole(model, scores=False, dtype=torch.float32)


def test_every_load_of_ours_refuses_code_and_pickles():
    """Whoever adds a ``from_pretrained`` or a ``torch.load`` says so: the libraries' own defaults are not ours."""
    loads = 0
    for file in [*REPOSITORY.glob("rlhf/**/*.py"), *REPOSITORY.glob("stages/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
            called = ast.unparse(node.func)
            given = " ".join(ast.unparse(keyword) for keyword in node.keywords)
            if node.func.attr == "from_pretrained":
                loads += 1
                if called == "PeftConfig.from_pretrained":
                    assert "local_files_only=True" in given, place
                elif "Tokenizer" in called or "Config" in called:
                    assert "safe_loading.TOKENIZER" in given or "**named" in given, place
                else:
                    safe = ("safe_loading.MODEL", "loading_options(", "**named")
                    assert any(part in given for part in safe) or "gguf" in ast.unparse(node), place
            assert called not in ("pickle.load", "pickle.loads", "np.load", "numpy.load", "yaml.load"), place
            assert called != "torch.load" or "weights_only=True" in given, place
    assert loads > 10
