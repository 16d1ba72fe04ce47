"""Import models from folders; export results as folders that other programs can load."""

import errno
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.attempt.folder import AttemptFolder
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import DiskFullError, NextCommand, RequestError, is_no_room, shortened
from rlhf.models.layout import (
    BASE,
    UNBOUNDED,
    config_file,
    context_length,
    count_parameters,
    is_adapter,
    licence_of,
    virtual_tokens_in,
)
from rlhf.models.safe_loading import CODE, refuse_code, refuse_foreign_links
from rlhf.pipeline.documents import provenance
from rlhf.pipeline.plan import Planned, result_of
from rlhf.pipeline.stage import Stage
from rlhf.store import ActionRecord, Store, key_of
from rlhf.store.backend import free_bytes_at, no_room, translated, umask

IMPORT = "import"
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
"""Files of which a tokenizer has at least one."""
KINDS = {"sft": "policy", "rm": "reward-model"}
MODELS = ("model", "policy", "reward-model")
"""Kinds of artifacts that are models."""
CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""llama.cpp's converter from model folders to GGUF, by its name there and in a package."""
GGUF = "model.gguf"
ROOM = "free some space there, or name another DIR: rlhf export STAGE DIR"


def import_folder(folder: Path, config: PipelineConfig, instance: str, stage: Stage, store: Store) -> ActionRecord:
    """Make a model's folder the result of a stage, until the stage's ref is deleted.

    Raises:
        RequestError: the stage makes no model, or the folder holds no model that fits.
    """
    if stage.kind not in KINDS.values():
        raise RequestError(
            f"{instance} cannot be imported: it makes a {stage.kind}", "--as", f"--as {' or '.join(KINDS)}"
        )
    check_model(folder)
    if stage.kind == "reward-model":
        _check_reward_model(folder)
    staged = AttemptFolder(store.new_attempt(key_of(IMPORT, 1, {"as": instance}, {}))).output
    try:
        with translated(staged):
            needed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if needed > free_bytes_at(staged):
                raise no_room(staged, needed)
            left_out = shutil.ignore_patterns(".*", "README.md", "*.bin", "*.pt", "*.pth", "training_args*", *CODE)
            try:
                shutil.copytree(folder, staged, ignore=left_out)
            except shutil.Error as error:
                # It lists the errors of all files, as texts; on a full disk the first file has failed already.
                source, _, reason = error.args[0][0]
                raise OSError(errno.ENOSPC if is_no_room(error) else errno.EIO, reason, source) from error
        digest = store.put_artifact(staged, stage.kind).digest
        origin = {"origin": {"model": {"source": str(folder.resolve()), "license": licence_of(folder)}}}
        record = ActionRecord(
            key=key_of(IMPORT, 1, {"as": stage.name}, {"folder": digest}),
            stage=IMPORT,
            version=1,
            settings={"as": stage.name},
            inputs={"folder": {"artifact": digest, "part": "", "digest": digest, "key": None}},
            artifact=digest,
            metrics={},
            provenance=provenance() | origin,
            seconds=0.0,
            attempt="import",
        )
        return store.publish(record, config.name, instance, imported=True)
    finally:
        shutil.rmtree(staged.parent, ignore_errors=True)
        with suppress(OSError):  # another import of the stage may be under way
            staged.parent.parent.rmdir()


def check_model(folder: Path) -> None:
    """Refuse a folder without a complete model, and one with code or with links that lead out of it."""
    config = config_file(folder)
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise RequestError(
            "the folder holds no model: it has no config.json", str(folder), "save one there with save_pretrained"
        )
    if is_adapter(folder) and not config.exists():
        raise RequestError(
            "the folder holds an adapter without the model that it was trained on",
            str(folder / BASE),
            f"save that model there, in {BASE}/, or merge the adapter into it (PEFT's merge_and_unload) and save that",
        )
    refuse_foreign_links(folder)
    try:
        is_object = isinstance(json.loads(config.read_text(encoding="utf-8")), dict)
    except (ValueError, OSError):
        is_object = False
    if not is_object:
        raise RequestError("the model's config.json holds no JSON object", str(config), "save it with save_pretrained")
    refuse_code(folder)
    if is_adapter(folder):
        from rlhf.models.folders import adapter_config

        adapter_config(folder)
    if not count_parameters(folder):
        raise RequestError(
            "the folder holds no weights in safetensors files", str(folder), "save them with save_pretrained"
        )
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        # PEFT itself saves none beside an adapter, nor does transformers beside a model.
        form, origin = ("an adapter", BASE) if is_adapter(folder) else ("a model", "ITS ORIGIN")
        raise RequestError(
            f"the folder holds {form} without a tokenizer",
            str(folder),
            f"save there the one it was trained with: AutoTokenizer.from_pretrained('{origin}').save_pretrained('.')",
        )


def _check_reward_model(folder: Path) -> None:
    """Refuse a model that is no reward model, or whose config.json does not say what its scores mean."""
    path = config_file(folder)
    config: dict[str, Any] = json.loads(path.read_text())
    example = '"score_mean": 0.0, "score_std": 1.0, "sees": "conversation", "score_max_length": 512'
    missing = [name for name in ("score_mean", "score_std", "sees", "score_max_length") if name not in config]
    if missing:
        raise RequestError(
            f"the reward model's config.json lacks {', '.join(missing)}: no stage could tell what its scores mean",
            str(path),
            f"add, for example, {example}",
        )
    limit = context_length(config)
    right = {
        "score_mean": _is_number(config["score_mean"]),
        "score_std": _is_number(config["score_std"]) and config["score_std"] > 0,
        "sees": config["sees"] in ("conversation", "response"),
        "score_max_length": _is_number(config["score_max_length"]) and 8 <= config["score_max_length"] <= limit,
    }
    for name, is_right in right.items():
        if is_right:
            continue
        longest = f"; its context is {limit} tokens" if name == "score_max_length" and limit < UNBOUNDED else ""
        raise RequestError(
            f"the reward model's {name} cannot be {config[name]!r}{longest}",
            str(path),
            f"set it as in this example: {example}",
        )
    if is_adapter(folder):
        return
    # transformers would make a head of random numbers, and mention it only in a log.
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if not any("ForSequenceClassification" in name for name in names):
        raise RequestError(
            f"the folder holds no reward model but a {' and '.join(names) or 'model of unknown architecture'}",
            str(path),
            "import a model that AutoModelForSequenceClassification saved, with num_labels=1",
        )
    # Two labels are transformers' default, which config.json leaves out.
    label_names = config.get("id2label", {"0": "", "1": ""})
    if (labels := len(label_names) if isinstance(label_names, dict) else 0) != 1:
        raise RequestError(
            f"the model answers {labels} numbers a text, and a reward model answers one",
            str(path),
            "import a model with num_labels=1",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def export_artifact(
    planned: Planned,
    target: Path,
    store: Store,
    card: Callable[[Path], str],
    *,
    merge: bool = False,
    gguf: bool = False,
) -> Path:
    """Write a model that a stage made to a folder of the user's, which can be moved anywhere; all of it or nothing.

    card   returns the text of ``README.md`` for a folder that is otherwise complete
    merge  whether an adapter is folded into the weights, in fp32, since bf16 would lose updates below half a step of a
           weight; else it stays beside its base
    gguf   whether llama.cpp's converter also writes ``model.gguf``

    Raises:
        RequestError: the stage makes no model, or has no result yet; the folder is not empty, is the
            store's or cannot be written; no adapter is there to fold, or one that no weights can hold; there is no
            converter, or it fails.
        DamageError: a file of the store fails its digest.
        DiskFullError: there is no room.
    """
    if planned.stage.kind not in MODELS:
        raise RequestError(
            f"{planned.name} makes a {planned.stage.kind}, which is no model",
            f"stage {planned.name}",
            "name a stage that makes a model, such as ppo; rlhf status lists the stages",
        )
    record = result_of(planned)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError("the folder to export to is not empty", str(target), "name a folder that does not exist")
    place = target.resolve()
    if place.is_relative_to(store.root.resolve()):
        raise RequestError("the folder to export to is inside the store", str(target), "name another folder")
    converter = _converter() if gguf else None
    # A folder that is there is filled, since it may be a mount point; another appears by its last step.
    beside = place if place.is_dir() else place.parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
        # There and not in the store, which the user may have no right to write.
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{place.name}-") as scratch:
            linked, folder = Path(scratch) / "linked", Path(scratch) / "exported"
            store.checkout(record.artifact, linked, anew=True)
            _check_form(planned, linked, target, merge=merge, gguf=gguf)
            _check_room(linked, beside, merge=merge, gguf=gguf)
            if merge:
                _fold(linked, folder, scores=planned.stage.kind == "reward-model")
            else:
                # Copies, not links: a change to an exported file must not reach the store. Without their mode, which is
                # read-only, since some of them are written again below.
                shutil.copytree(linked, folder, copy_function=shutil.copyfile)
            _write_generation_settings(folder, record.settings)
            if converter:
                _convert(converter, folder)
            (folder / "README.md").write_text(card(folder), encoding="utf-8")
            for path in (folder, *folder.rglob("*")):
                path.chmod((0o755 if path.is_dir() else 0o644) & ~umask())
            if beside == place:
                _move_files(folder, place)
            else:
                folder.rename(place)
    except DiskFullError as error:
        if Path(error.where).is_relative_to(store.root):  # the copies of a bucket's files
            raise
        raise DiskFullError(error.what, error.where, ROOM) from error
    except OSError as error:
        if is_no_room(error):
            raise DiskFullError("there is no room left to write the model", str(target), ROOM) from error
        raise RequestError(
            f"the folder to export to cannot be written: {error.strerror or error}", str(target), "name another folder"
        ) from error
    return target


def _move_files(folder: Path, target: Path) -> None:
    """Move all that is in a folder into another of the same file system; where that fails, nothing is moved."""
    names = [path.name for path in folder.iterdir()]
    try:
        for name in names:
            (folder / name).rename(target / name)
    except BaseException:
        for name in names:
            if not (folder / name).exists():
                (target / name).rename(folder / name)
        raise


def _check_form(planned: Planned, folder: Path, target: Path, *, merge: bool, gguf: bool) -> None:
    """Refuse to fold what is no adapter, or one that no weights can hold, and to convert an adapter."""
    where, plain = f"stage {planned.name}", NextCommand("export", (planned.name, str(target)))
    if merge and not is_adapter(folder):
        raise RequestError(f"the result of {planned.name} is no adapter: there is nothing to merge", where, plain)
    if merge and (tokens := virtual_tokens_in(folder)):
        what = f"the result of {planned.name} is an adapter of {tokens} virtual tokens, which no weights can hold"
        raise RequestError(what, where, plain)
    if gguf and is_adapter(folder) and not merge:
        raise RequestError(
            f"the result of {planned.name} is an adapter, and a GGUF file holds whole weights",
            where,
            NextCommand("export", (*plain.names, "--merge", "--gguf")),
        )


def _check_room(folder: Path, parent: Path, *, merge: bool, gguf: bool) -> None:
    """Raise a DiskFullError where the files that are about to be written do not fit."""
    base = folder / BASE if merge else folder
    weights = (
        4 * count_parameters(base) if merge else sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    )
    others = sum(path.stat().st_size for path in base.iterdir() if path.is_file() and path.suffix != ".safetensors")
    needed = weights + others + (2 * count_parameters(base) if gguf else 0)
    if needed > free_bytes_at(parent):
        raise no_room(parent, needed)


def _fold(source: Path, target: Path, *, scores: bool) -> None:
    """Write an adapter's folder as a plain one, a reward model's ``README.md`` included."""
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from rlhf.models import folders, reward

    disable_progress_bar()
    # transformers reports that a base has no score head, which the adapter has.
    set_verbosity_error()
    folders.write_plain(source, target, scores=scores, dtype=torch.float32)
    if (source / "README.md").exists():
        reward.write_card(target)


def _write_generation_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``generation_config.json`` sample as the stage did, if it sampled: from the whole vocabulary.

    Else the file stays what it is: the base model's, with the token that ends a turn.
    """
    sampling = settings.get("sampling")
    if not isinstance(sampling, Mapping) or not {"temperature", "max_new_tokens"} <= sampling.keys():
        return
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0}
    sampled |= {name: sampling[name] for name in ("temperature", "max_new_tokens")}
    # An adapter's users generate with its base's configuration.
    for path in {place / "generation_config.json" for place in (folder, config_file(folder).parent)}:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        tokens = {name: value for name, value in content.items() if name.endswith("_token_id")}
        path.write_text(json.dumps(tokens | sampled, indent=2), encoding="utf-8")


def _converter() -> str:
    """Return the program that converts to GGUF.

    Raises:
        RequestError: there is none on the path.
    """
    programs = (program for name in CONVERTERS if (program := shutil.which(name)))
    if (program := next(programs, None)) is None:
        raise RequestError(
            "--gguf needs llama.cpp's converter, which is not on PATH",
            CONVERTERS[0],
            "brew install llama.cpp; or git clone https://github.com/ggml-org/llama.cpp, install its "
            "requirements/requirements-convert_hf_to_gguf.txt, and add the folder to PATH",
        )
    return program


def _convert(program: str, folder: Path) -> None:
    """Write ``model.gguf`` beside a plain folder's weights; a RequestError where the converter fails."""
    command = [program, str(folder), "--outfile", str(folder / GGUF)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode or not (folder / GGUF).is_file():
        said = (ended.stderr.strip() or ended.stdout.strip() or f"status {ended.returncode}").splitlines()[-1]
        raise RequestError(
            f"llama.cpp's converter wrote no {GGUF}: {shortened(said, 300)}",
            program,
            "leave --gguf out; or update llama.cpp: not all architectures can be converted",
        )
