"""Import models from folders; export results as folders that other programs can load."""

import errno
import json
import math
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.attempt.folder import AttemptFolder
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import NextCommand, RequestError, is_no_room
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
            f"the reward model's config.json lacks {', '.join(missing)}: PPO could not tell what its scores mean",
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


def export_artifact(planned: Planned, target: Path, store: Store, *, adapter: bool = False) -> Path:
    """Write a stage's result to a folder of the user's, which can be moved anywhere.

    adapter  whether an adapter stays beside its base; else it is folded into the weights, in fp32: bf16 would lose
             updates below half a step of a weight

    Raises:
        RequestError: there is no result yet, the folder is not empty or cannot be written, or virtual tokens are to be
            folded.
    """
    record = result_of(planned)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError("the folder to export to is not empty", str(target), "name a folder that does not exist")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target and not in the store, which the user may have no right to write.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            folder = store.checkout(record.artifact, Path(scratch) / "linked")
            if not adapter and (tokens := virtual_tokens_in(folder)):
                raise RequestError(
                    f"the result of {planned.name} is an adapter of {tokens} virtual tokens, which no weights can hold",
                    f"stage {planned.name}",
                    NextCommand("export", (planned.name, str(target), "--adapter")),
                )
            if is_adapter(folder) and not adapter:
                import torch
                from transformers.utils.logging import disable_progress_bar, set_verbosity_error

                from rlhf.models import folders, reward

                disable_progress_bar()
                # transformers reports that a base has no score head, which the adapter has.
                set_verbosity_error()
                scores = planned.stage.kind == "reward-model"
                folders.write_plain(folder, target, scores=scores, dtype=torch.float32)
                if (folder / "README.md").exists():
                    reward.write_card(target)
            else:
                # Copies, not links: a change to an exported file must not reach the store.
                shutil.copytree(folder, target, dirs_exist_ok=True)
        for path in target.rglob("*"):
            path.chmod((0o755 if path.is_dir() else 0o644) & ~umask())
    except OSError as error:
        raise RequestError(
            f"the folder to export to cannot be written: {error.strerror or error}", str(target), "name another folder"
        ) from error
    return target
