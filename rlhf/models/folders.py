"""Read and write model folders: plain folders, which ``from_pretrained`` reads, and adapters'."""

import json
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import deepspeed

from rlhf.config.tuning import FULL, QLoraTuning, Tuning
from rlhf.errors import PreflightError
from rlhf.models import heads, kernels, safe_loading, text, virtual_tokens
from rlhf.models.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, config_file, is_adapter

VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""PEFT's types of adapters whose virtual tokens :mod:`rlhf.models.virtual_tokens` applies."""


def loading_options(tuning: Tuning, dtype: torch.dtype) -> dict[str, Any]:
    """Return what ``from_pretrained`` takes to load the base that a method trains on: of 4 bits for QLoRA.

    Raises:
        PreflightError: there is no GPU, or no bitsandbytes.
    """
    options: dict[str, Any] = {"dtype": dtype} | safe_loading.MODEL
    if not isinstance(tuning, QLoraTuning):
        return options
    if not torch.cuda.is_available():
        raise PreflightError(
            "qlora computes with 4-bit weights, for which this worker has no GPU",
            "tuning.method",
            "run it where workers have GPUs, or write {method: lora}",
        )
    if find_spec("bitsandbytes") is None:
        raise PreflightError(
            "qlora needs bitsandbytes, which is not installed", "tuning.method", "pip install 'rlhf-pipeline[qlora]'"
        )
    # NF4 and double quantisation: Dettmers et al. 2023, §3.
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=tuning.double_quantisation,
        bnb_4bit_compute_dtype=dtype,
    )
    return options | {"quantization_config": quantised}


def load(folder: Path, *, scores: bool, dtype: torch.dtype, tuning: Tuning = FULL) -> Any:
    """Load a folder's model; an adapter stays beside the weights of its base.

    tuning  the method that it is loaded for

    Inside ``rlhf.zero.engine.sharded_loading`` the weights are sharded as they are read, and this is a collective.

    Raises:
        PreflightError: the model needs code of its own, or an adapter does not fit its configuration and base.
    """
    safe_loading.refuse_code(folder)
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    named = {"num_labels": 1} if scores else {}
    kernels.fuse(folder)
    plain = folder / BASE if is_adapter(folder) else folder
    model = auto.from_pretrained(plain, **named, **loading_options(tuning, dtype))
    without_router_logits(model)
    return _with_adapter(model, folder) if is_adapter(folder) else model


def without_router_logits(model: Any) -> None:
    """Make a mixture of experts return no logits of its routers, whatever its configuration asks for.

    From them it would compute a loss in every forward pass, which fails where a cache holds a part of the text.
    """
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False


def adapter_config(folder: Path) -> Any:
    """Read the configuration of an adapter that can stand beside its base.

    Raises:
        PreflightError: it changes its base, or is of a kind that nothing here computes with.
    """
    config: Any = PeftConfig.from_pretrained(str(folder), local_files_only=True)
    kind = getattr(config.peft_type, "value", config.peft_type)
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if kind not in VIRTUAL_TOKENS and not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        raise PreflightError(
            f"the adapter is of type {kind}, which can neither be folded into weights nor be trained further",
            str(folder / ADAPTER_CONFIG),
            f"take an adapter of LORA, IA3, {', '.join(VIRTUAL_TOKENS)} or another type that PEFT can merge",
        )
    start = str(getattr(config, "init_lora_weights", "")).lower()
    # PEFT begins these adapters by also changing the weights under them, which can only be done with whole weights.
    if start.startswith(("pissa", "olora", "corda", "loftq")):
        raise PreflightError(
            f"the adapter, LoRA begun by {start}, cannot be read beside its base's weights: it changes them",
            str(folder / ADAPTER_CONFIG),
            "convert it to plain LoRA, or merge it into the weights (PEFT's merge_and_unload), and import that",
        )
    config.base_model_name_or_path = None
    return config


def _with_adapter(model: Any, folder: Path) -> Any:
    config = adapter_config(folder)
    if config.is_prompt_learning:
        config = virtual_tokens.without_encoder(config)
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT's own loading copies into whole weights only. Adapters get the base's type, as in training.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if config.is_prompt_learning:
        adapted.prompt_encoder.to(model.dtype)
        virtual_tokens.apply_in_body(adapted)
    fill(adapted, folder)
    return adapted


def fill(
    adapted: Any,
    folder: Path,
    *,
    fresh_head: bool = False,
    adapter_name: str = virtual_tokens.TRAINED,
    head: Any = None,
) -> None:
    """Copy the weights of a folder's adapter into a model with an adapter of its shape. A collective where sharded.

    fresh_head    whether the model has a score head that the folder lacks
    adapter_name  PEFT's name of the adapter in the model
    head          the weights of the adapter's score head, where they are no part of the model

    Raises:
        PreflightError: they do not fit.
    """
    own: dict[str, Any] = dict(adapted.named_parameters(remove_duplicate=False))  # a tied head may be in the file
    adapter: dict[str, Any] = get_peft_model_state_dict(
        adapted, state_dict=own, adapter_name=adapter_name, save_embedding_layers=False
    )
    if head is not None:
        adapter["base_model.model.score.weight"] = head
    if adapted.active_peft_config.is_prompt_learning:
        adapter["prompt_embeddings"] = adapted.prompt_encoder[virtual_tokens.TRAINED].embedding.weight
    # Weights that are no adapter's, such as embeddings, have the names of the model's parameters in the file.
    parameters = own | adapter
    saved = load_file(folder / ADAPTER_WEIGHTS)
    missing = {name for name in adapter.keys() - saved.keys() if not (fresh_head and name.endswith("score.weight"))}
    wrong = (saved.keys() - parameters.keys()) | missing
    with torch.no_grad(), gather_params_ctx([parameters[name] for name in saved.keys() - wrong]):
        wrong |= {name for name in saved.keys() - wrong if saved[name].shape != parameters[name].shape}
        if wrong:
            raise PreflightError(
                f"{len(wrong)} weights of the adapter do not fit its configuration and base; the first is {min(wrong)}",
                str(folder / ADAPTER_WEIGHTS),
                "save the adapter again with PEFT's save_pretrained, beside the model that it was trained on",
            )
        for name, weight in saved.items():
            parameters[name].copy_(weight)


def load_policy(folder: Path, dtype: torch.dtype, *, fp32_head: bool = True, tuning: Tuning = FULL) -> Any:
    """Load a language model for sampling or log-probabilities; embeddings without a token get the probability 0.

    tuning     the method that it is loaded for
    fp32_head  whether the logits are computed in fp32, whatever ``dtype`` is
    """
    model = load(folder, scores=False, dtype=dtype, tuning=tuning)
    if fp32_head:
        heads.compute_in_fp32(heads.unwrapped(model).get_output_embeddings())
    heads.forbid_rows_without_token(heads.unwrapped(model), text.load_tokenizer(folder))
    return model


def load_whole(folder: Path, *, scores: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder's model unsharded; an adapter is folded into the weights in fp32, and the sum cast to ``dtype``."""
    with _unsharded():
        if not is_adapter(folder):
            return load(folder, scores=scores, dtype=dtype)
        adapted = load(folder, scores=scores, dtype=torch.float32)
        _untie(adapted)
        model = adapted.merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _untie(adapted: Any) -> None:
    """Give a head a weight of its own where an adapter changes it, or the embeddings that it is tied to, alone."""
    model = adapted.get_base_model()
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    plain = [getattr(part, "base_layer", part) for part in parts]
    changed = any(isinstance(part, BaseTunerLayer) for part in parts)
    if changed and len(plain) == 2 and plain[0].weight is plain[1].weight:
        plain[1].weight = torch.nn.Parameter(plain[1].weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


@contextmanager
def _unsharded() -> Generator[None]:
    # transformers shards what it loads for as long as a trainer with ZeRO-3 exists, which it refers to weakly.
    reference = deepspeed._hf_deepspeed_config_weak_ref  # pyright: ignore[reportPrivateUsage] - it has no getter
    config = reference() if reference else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def save_whole(model: Any, weights: Mapping[str, Tensor], target: Path) -> None:
    """Write a model's configuration and ``weights`` by the names that they had in the files it was loaded from."""
    # Loading into shards, transformers keeps every renaming that it knows for the type, and saving reverts them all.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        used = [one for one in conversions if one.was_used() or not isinstance(one, WeightRenaming)]
        model._weight_conversions = used  # pyright: ignore[reportPrivateUsage] - it has no setter
    model.save_pretrained(target, state_dict=weights)


def write_plain(folder: Path, target: Path, *, scores: bool, dtype: torch.dtype) -> Path:
    """Write an adapter folder as a plain folder, tokenizer included; :func:`load_whole` folds the adapter in."""
    load_whole(folder, scores=scores, dtype=dtype).save_pretrained(target)
    copy_tokenizer(folder, target)
    return target


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's files but weights, configuration and card: the tokenizer, its chat template, and
    ``generation_config.json``, which no stage obeys but other programs do.
    """
    for path in source.iterdir():
        if path.name in ("config.json", ADAPTER_CONFIG, "README.md") or not path.is_file():
            continue
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(path, target / path.name)


def write_end_of_turn(folder: Path) -> None:
    """Name the token that closes a turn in a folder's ``generation_config.json``, for other programs to stop there.

    A base model's file names the tokenizer's EOS alone, which its chat template may not write.
    """
    end = text.load_tokenizer(folder).eos_token_id
    # An adapter's users generate with its base's configuration.
    for path in {place / "generation_config.json" for place in (folder, config_file(folder).parent)}:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        named = content.get("eos_token_id")
        ends = named if isinstance(named, list) else [] if named is None else [named]
        if end not in ends:
            path.unlink(missing_ok=True)  # it may be a link to a file of the base's, which must not change
            path.write_text(json.dumps(content | {"eos_token_id": [end, *ends] if ends else end}, indent=2))
