"""Ways of fine-tuning: turn a loaded model into one of which the right weights train, and write what came out.

docs/tuning.md compares the methods; their settings are in :mod:`rlhf.config.tuning`. This is the one module that knows
them.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.prompt_tuning.model import PromptEmbedding
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.config.tuning import (
    BottomFrozenTuning,
    FullTuning,
    GradualTuning,
    Ia3Tuning,
    LoraTuning,
    LowRankTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    QLoraTuning,
    TopTuning,
    TransferTuning,
    Tuning,
)
from rlhf.errors import PreflightError
from rlhf.models import folders, reward, safe_loading, text, virtual_tokens
from rlhf.models.layout import ADAPTER_CONFIG, BASE, update_json, virtual_tokens_in
from rlhf.models.virtual_tokens import TRAINED, AnchoredEncoder, StartedPrefixEncoder
from rlhf.randomness import seed_of
from rlhf.zero import group
from rlhf.zero.engine import Schedule, is_sharded, set_schedule

INITIAL = "initial"
"""PEFT's name of a frozen copy of the adapter as it was at the start."""


def prepared(model: Any, tuning: Tuning, source: Path, *, scores: bool, seed: int, fresh_head: bool = False) -> Any:
    """Return the model with the weights that train marked as requiring a gradient, adapters included.

    A collective where the model is sharded, and then to be called inside ``rlhf.zero.engine.sharded_loading``.

    source      the folder that the stage was given; virtual tokens in it go on training
    scores      whether the model scores rather than writes
    fresh_head  whether the method ``transfer`` draws a language head anew

    Raises:
        PreflightError: the method does not fit the model.
    """
    torch.manual_seed(seed_of("adapters", seed, scores))
    match tuning:
        case FullTuning():
            return model
        case TopTuning() | BottomFrozenTuning() | GradualTuning():
            _freeze_by_depth(model, tuning)
            return model
        case TransferTuning():
            _with_own_head(model, tuning, scores=scores, fresh=fresh_head)
            return model
        case _:
            return _with_adapter(model, tuning, source, scores=scores)


class Depth(NamedTuple):
    """A model's parameters from the bottom to the top, whatever the architecture calls them."""

    below: list[nn.Parameter]
    """Embeddings, and a head that is tied to them."""
    blocks: list[list[nn.Parameter]]
    """Those of each decoder block, the lowest first."""
    above: list[nn.Parameter]
    """The last norm and the head."""


def by_depth(model: Any) -> Depth:
    """Sort a model's parameters by depth; its blocks are the list of as many modules as it has hidden layers."""
    body = getattr(model, model.base_model_prefix)
    layers = body.config.get_text_config().num_hidden_layers
    blocks = next(part for part in body.modules() if isinstance(part, nn.ModuleList) and len(part) == layers)
    owner = next(part for part in body.modules() if blocks in part.children())
    inside = {id(parameter) for parameter in blocks.parameters()}
    # Whatever the body holds before its blocks is below them, but for a last norm that is made before (OPT).
    below: dict[int, nn.Parameter] = {}
    for name, part in owner.named_children():
        if part is blocks:
            break
        if not name.startswith(("final", "project_out")):
            below |= {id(parameter): parameter for parameter in part.parameters()}
    rest = {id(parameter): parameter for parameter in model.parameters()}
    above = [parameter for key, parameter in rest.items() if key not in inside and key not in below]
    return Depth(list(below.values()), [list(block.parameters()) for block in blocks], above)


def _freeze_by_depth(model: Any, tuning: TopTuning | BottomFrozenTuning | GradualTuning) -> None:
    below, blocks, above = by_depth(model)
    depth = len(blocks)
    match tuning:
        case TopTuning(blocks=count):
            frozen = [*below, *chain.from_iterable(blocks[: max(0, depth - count)])]
        case BottomFrozenTuning(blocks=count):
            frozen = [*below, *chain.from_iterable(blocks[:count])]
        case GradualTuning():
            frozen = []
            for number, block in enumerate(blocks):
                from_top = depth - 1 - number
                turn = from_top if tuning.start == "top" else number
                schedule = Schedule(turn * tuning.every, tuning.decay ** -(from_top + 1))
                for parameter in block + (below if number == 0 else []):
                    set_schedule(parameter, schedule)
            for parameter in above:
                set_schedule(parameter, Schedule(0, 1.0))
    for parameter in frozen:
        parameter.requires_grad_(False)


def _with_own_head(model: Any, tuning: TransferTuning, *, scores: bool, fresh: bool) -> None:
    if tuning.body == "frozen":
        model.requires_grad_(False)
    if scores:
        model.score.requires_grad_(True)
        return
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    with gather_params_ctx([head.weight], modifier_rank=None):
        weight = head.weight.detach().clone()
    if fresh:
        weight.normal_(std=config.initializer_range)
    # A head of its own, which embeddings that it was tied to do not follow.
    head.weight = nn.Parameter(weight)
    config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _peft_config(tuning: Tuning, model: Any, *, scores: bool) -> PeftConfig:
    """Return PEFT's settings; a score head is trained whole."""
    width = model.config.get_text_config().hidden_size
    common: dict[str, Any] = {"task_type": "SEQ_CLS" if scores else "CAUSAL_LM"}
    whole: dict[str, Any] = common | {"modules_to_save": ["score"] if scores else None}
    match tuning:
        case LowRankTuning():
            more: dict[str, Any] = {}
            if isinstance(tuning, LoraTuning):
                more = {"use_rslora": tuning.rslora, "use_dora": tuning.dora}
                more["init_lora_weights"] = "pissa" if tuning.init == "pissa" else True
            return LoraConfig(
                r=tuning.rank,
                lora_alpha=tuning.alpha,  # pyright: ignore[reportArgumentType] - PEFT takes fractions, its annotation does not
                lora_dropout=tuning.dropout,
                target_modules=tuning.targets or "all-linear",
                **whole,
                **more,
            )
        case Ia3Tuning():
            return IA3Config(**whole)
        case PromptTuning():
            return PromptTuningConfig(num_virtual_tokens=tuning.tokens, **common)
        case PTuning():
            return PromptEncoderConfig(
                num_virtual_tokens=tuning.tokens,
                encoder_reparameterization_type="LSTM",
                encoder_hidden_size=tuning.hidden_size or width,
                **common,
            )
        case PrefixTuning():
            hidden = tuning.hidden_size or width
            return PrefixTuningConfig(
                num_virtual_tokens=tuning.tokens,
                prefix_projection=True,
                encoder_hidden_size=hidden,
                init_weights="zero",
                **common,
            )
        case PTuningV2():
            return PrefixTuningConfig(num_virtual_tokens=tuning.tokens, **common)
        case _:
            raise AssertionError(tuning)


def _with_adapter(model: Any, tuning: Tuning, source: Path, *, scores: bool) -> PeftModel:
    config = _peft_config(tuning, model, scores=scores)
    going_on = virtual_tokens_in(source) > 0
    if going_on:
        config = virtual_tokens.without_encoder(config)
    try:
        # ZeRO-3 gathers small weights together and takes the type of the first for all: adapters must have the base's.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, AttributeError) as error:
        # PiSSA asks the experts of a mixture for one matrix.
        raise PreflightError(
            f"PEFT cannot apply {tuning.method} to a model of type {model.config.model_type}: {error}",
            "tuning",
            "name the modules as tuning.targets, or choose another method",
        ) from error
    if isinstance(tuning, LoraTuning) and tuning.init == "pissa":
        vars(adapted)[INITIAL] = {
            name: weight.detach().cpu().clone() for name, weight in adapted.named_parameters() if ".lora_" in name
        }
    if not config.is_prompt_learning:
        return adapted
    adapted.prompt_encoder.to(model.dtype)
    if going_on:
        folders.fill(adapted, source, fresh_head=scores and not reward.is_reward_model(source))
    elif isinstance(tuning, PromptTuning):
        tokens = _first_tokens(tuning, source)
        encoder: Any = adapted.prompt_encoder[TRAINED]
        encoder.embedding.weight.data = virtual_tokens.embeddings_of(model, tokens)
    elif isinstance(tuning, PrefixTuning | PTuningV2):
        if group.on_gpu() and not is_sharded(model):
            model.to(group.device())  # fused kernels compute there alone
        start = virtual_tokens.keys_and_values(model, _first_tokens(tuning, source))
        if isinstance(tuning, PTuningV2):
            encoder = adapted.prompt_encoder[TRAINED]
            encoder.embedding.weight.data = start
        else:
            encoder = StartedPrefixEncoder(config, start)
            adapted.prompt_encoder[TRAINED] = encoder.to(model.device, model.dtype)
    elif isinstance(tuning, PTuning):
        places, words = anchors(tuning, source)
        embeddings = virtual_tokens.embeddings_of(model, words) if words else []
        encoder = AnchoredEncoder(config, dict(zip(places, embeddings, strict=True)))
        adapted.prompt_encoder[TRAINED] = encoder.to(model.device, model.dtype)
    virtual_tokens.apply_in_body(adapted)
    return adapted


def experts_left_out(folder: Path, tuning: LoraTuning | QLoraTuning) -> list[str]:
    """Return the names of the weights of a mixture's experts that an adapter does not reach.

    transformers keeps all experts of a layer as one tensor. PEFT adapts it where it knows the architecture.

    folder  a plain folder; its weights are not loaded

    Raises:
        PreflightError: PEFT adapts experts, but not by this variant of the method.
    """
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, **safe_loading.TOKENIZER)
        model = AutoModelForCausalLM.from_config(config)
        adapted = _with_adapter(model, tuning, folder, scores=False)
    reached = {part.parameter_name for part in adapted.modules() if isinstance(part, ParamWrapper)}
    weights = [name for name, weight in adapted.named_parameters() if weight.dim() == 3 and ".experts." in name]
    return sorted({name.rpartition(".")[2] for name in weights} - reached)


def _first_tokens(tuning: PromptTuning | PrefixTuning | PTuningV2, source: Path) -> list[int]:
    """Return the tokens that virtual tokens start from, as many as there are."""
    tokenizer = text.load_tokenizer(source)
    if tuning.text is None:
        return torch.randint(len(tokenizer), (tuning.tokens,)).tolist()
    ids = tokenizer(tuning.text, add_special_tokens=False)["input_ids"]
    return (ids * -(-tuning.tokens // len(ids)))[: tuning.tokens]


def anchors(tuning: PTuning, folder: Path, setting: str = "tuning.template") -> tuple[list[int], list[int]]:
    """Return the places of a template's anchors in the prompt, and their token ids.

    setting  the template's name in errors

    Raises:
        PreflightError: the tokenizer splits an anchor.
    """
    tokenizer = text.load_tokenizer(folder)
    places: list[int] = []
    words: list[int] = []
    at = 0
    for part in tuning.template:
        if isinstance(part, int):
            at += part
            continue
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids)
            raise PreflightError(
                f"the tokenizer splits the anchor {part!r} into {len(ids)} tokens ({pieces}), and an anchor is one",
                setting,
                "choose a word of one token; words within a text begin with a space",
            )
        places.append(at)
        words += ids
        at += 1
    return places, words


def with_reference(model: Any) -> Any:
    """Return the model with a frozen copy, :data:`INITIAL`, of an adapter that begins with an effect.

    model  as :func:`prepared` returns it, a language model, not yet sharded
    """
    if not isinstance(model, PeftModel):
        return model
    config: Any = model.peft_config[TRAINED]
    if config.is_prompt_learning:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        # Where the trained encoder will compute, so that the policy begins as its reference exactly.
        tokens = virtual_tokens.computed(model, weights, group.device())
        plain = virtual_tokens.without_encoder(config)
        prefix = isinstance(plain, PrefixTuningConfig)
        model.add_adapter(INITIAL, plain if prefix else replace(config))
        encoder: Any = model.prompt_encoder[INITIAL] if prefix else PromptEmbedding(plain, None)
        encoder.embedding.weight = nn.Parameter(tokens.to(model.device, copy=True))
        model.prompt_encoder[INITIAL] = encoder.requires_grad_(False)
    elif INITIAL in vars(model):
        model.add_adapter(INITIAL, replace(config, init_lora_weights=True), autocast_adapter_dtype=False)
        own = dict(model.named_parameters())
        for name, weight in vars(model)[INITIAL].items():
            copy = own[name.replace(f".{TRAINED}.", f".{INITIAL}.")]
            copy.data.copy_(weight)
            copy.requires_grad_(False)
    return model


@contextmanager
def as_at_start(model: PeftModel) -> Generator[None]:
    """Inside, an adapted model is what it was before its first step."""
    if INITIAL not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(INITIAL, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def save(
    model: Any,
    weights: dict[str, Tensor],
    source: Path,
    target: Path,
    tuning: Tuning,
    *,
    scores: bool,
    config: dict[str, Any] | None = None,
) -> None:
    """Write a trained model's folder, tokenizer included.

    weights  by name, whole: of an adapted model those that train, of another all
    source   the plain folder that the model was loaded from
    config   entries to add to ``config.json``; of a reward model its normaliser and what it reads
    """
    if not isinstance(model, PeftModel):
        folders.save_whole(model, weights, target)
        folders.copy_tokenizer(source, target)
        update_json(target / "config.json", config or {}, ensure_ascii=True)
    elif isinstance(tuning, LoraTuning | Ia3Tuning) and tuning.merge:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            adapter = Path(scratch)
            _save_adapter(model, weights, source, adapter, config or {})
            # In bf16 updates below half a step of a weight would be lost.
            folders.write_plain(adapter, target, scores=scores, dtype=torch.float32)
    else:
        _save_adapter(model, weights, source, target, config or {})
    if scores:
        reward.complete(target)
    else:
        folders.write_end_of_turn(target)


def _save_adapter(
    model: PeftModel, weights: dict[str, Tensor], source: Path, target: Path, config: dict[str, Any]
) -> None:
    trained: Any = model.peft_config[TRAINED]
    saved = trained
    if trained.is_prompt_learning:
        tokens = virtual_tokens.computed(model, weights)
        # PEFT would ask the encoder, which is sharded.
        vars(model)["get_prompt_embedding_to_save"] = lambda _: tokens
        saved = virtual_tokens.without_encoder(trained)
    elif INITIAL in vars(model):
        saved, weights = _as_plain_lora(trained, weights, vars(model)[INITIAL])
    model.peft_config[TRAINED] = saved
    model.save_pretrained(str(target), state_dict=weights, selected_adapters=[TRAINED])
    model.peft_config[TRAINED] = trained
    (target / "README.md").unlink(missing_ok=True)  # PEFT's model card names the folder that the base was loaded from
    folders.copy_tokenizer(source, target)
    _name_tokenizer(source, target)
    base = target / BASE
    base.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            copy = base / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)
    update_json(target / ADAPTER_CONFIG, {"base_model_name_or_path": BASE}, ensure_ascii=True)
    if config:
        update_json(base / "config.json", config, ensure_ascii=True)


def _name_tokenizer(source: Path, target: Path) -> None:
    """Name the class of the source's tokenizer where transformers would take another for the copy beside an adapter.

    It chooses by ``config.json`` too, which an adapter's folder has not: for Qwen 2 and Phi 3, for instance.
    """
    own, copy = (
        type(AutoTokenizer.from_pretrained(folder, **safe_loading.TOKENIZER)).__name__ for folder in (source, target)
    )
    if own != copy:
        update_json(target / "tokenizer_config.json", {"tokenizer_class": own})


def _as_plain_lora(
    config: Any, weights: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return PiSSA's adapter as LoRA on the unchanged base: with W = W' + s·B₀A₀, it is s·(BA - B₀A₀), of rank 2r."""
    joined: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in start:
            joined[name] = weight
        elif "lora_A" in name:
            joined[name] = torch.cat([weight, start[name].to(weight)], dim=0)
        else:
            joined[name] = torch.cat([weight, -start[name].to(weight)], dim=1)
    factor = math.sqrt(2) if config.use_rslora else 2
    plain = {"r": 2 * config.r, "lora_alpha": factor * config.lora_alpha, "init_lora_weights": True}
    return replace(config, **plain), joined
