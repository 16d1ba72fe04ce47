"""What a stage's memory is predicted to be, against the bytes that torch and DeepSpeed keep."""

import json
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from rich.console import Console
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig, Qwen3Config

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster import causes
from rlhf.cluster.devices import Device
from rlhf.cluster.worker import Call
from rlhf.config.grpo import GrpoSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import DpoSettings, RmSettings, SftSettings
from rlhf.config.tuning import FULL, LoraTuning
from rlhf.config.zero import BUCKET
from rlhf.errors import PreflightError
from rlhf.models import capacity, footprint
from rlhf.models.folders import copy_tokenizer
from rlhf.models.footprint import Architecture, Learned, learned
from rlhf.models.tuning import prepared
from rlhf.pipeline import fitting, memory
from rlhf.pipeline.memory import CONTEXT, FILLED, Prediction, Texts, Trained, limits, predict, with_micro_batch
from rlhf.terminal import memory_table
from rlhf.training import loading
from tests.models.tiny import make_tiny_llama, tiny_config
from tests.pipeline.memory_ranks import RESPONSE, ROWS, TIME
from tests.zero.groups import run_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WIDTHS = {torch.bfloat16: 2, torch.float32: 4}
COMMON: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = COMMON | {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA),
    "llama, tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(**COMMON, n_embd=96, n_layer=3, n_head=4, n_positions=128),
    "qwen3": Qwen3Config(**LLAMA, head_dim=32),
}
METHODS: dict[str, Any] = {
    "full": {},
    "top": {"blocks": 2},
    "bottom-frozen": {"blocks": 2},
    "gradual": {},
    "transfer": {},
    "transfer, trained": {"method": "transfer", "body": "trained"},
    "lora": {"rank": 8},
    "lora, chosen": {"method": "lora", "rank": 4, "targets": ["c_attn", "q_proj", "v_proj"]},
    "lora, dora": {"method": "lora", "dora": True},
    "prompt": {"tokens": 5},
    "p-tuning": {"template": [4]},
    "p-tuning, narrow": {"method": "p-tuning", "template": [4], "hidden_size": 16},
    "prefix": {"tokens": 5},
    "p-tuning-v2": {"tokens": 5},
    "ia3": {},
}


EXACT = [method for method in METHODS if method != "ia3"]
Made = dict[str, tuple[Path, Any]]


def tuning_of(name: str) -> Any:
    return SftSettings.model_validate({"tuning": {"method": name} | METHODS[name]}).tuning


def written(config: Any, folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Folder and model of each configuration."""
    models: Made = {}
    tokenizer = make_tiny_llama(tmp_path_factory.mktemp("tokenizer"))
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("model")
        models[name] = folder, written(config, folder).eval()
        copy_tokenizer(tokenizer, folder)
    return models


def adapted(made: Made, name: str, method: str, *, dtype: torch.dtype = torch.float32) -> Any:
    folder, model = made[name]
    return prepared(deepcopy(model).to(dtype), tuning_of(method), folder, scores=False, seed=0)


def bytes_saved(model: Any, rows: int, time: int) -> int:
    """The bytes that the body keeps for its backward pass, of each storage once, but for its weights."""
    weights = [*model.parameters(), *model.buffers()]
    kept = {tensor.untyped_storage().data_ptr(): tensor for tensor in weights}
    own = set(kept)

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.enable_input_require_grads()
    body, ids = model.base_model, torch.zeros(rows, time, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        body(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


@pytest.fixture(autouse=True)
def torch_s_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed puts its own in its place for the rest of a process, once another test has sharded a model."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, torch.bfloat16) for method in ("full", "top", "lora", "lora, chosen", "transfer")),
        ("full", torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_forward_pass_keeps_what_was_said(made: Made, name: str, method: str, dtype: torch.dtype) -> None:
    """Within 3 %, whatever the batch; adapters on some matrices alone are counted as if these shared no input."""
    model = adapted(made, name, method, dtype=dtype)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    architecture = Architecture.of(made[name][0])
    part = learned(architecture, tuning_of(method), scores=False)
    for rows, time in ((1, 96), (4, 64)):
        said = footprint.saved(architecture, part, WIDTHS[dtype], rows, time)
        tolerance = 0.1 if method == "lora, chosen" else 0.03
        assert said == pytest.approx(bytes_saved(model, rows, time), rel=tolerance)


@pytest.mark.parametrize("method", ["full", "top", "bottom-frozen", "transfer", "lora", "lora, chosen"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_deepspeed_s_linear_layers_keep_what_was_said(
    made: Made, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 those that are frozen keep their inputs too, which torch's own do not."""
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    model = adapted(made, name, method, dtype=torch.bfloat16)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    architecture = Architecture.of(made[name][0])
    part = learned(architecture, tuning_of(method), scores=False)
    said = footprint.saved(architecture, part, 2, 4, 64, keeps_inputs=True)
    tolerance = 0.1 if method == "lora, chosen" else 0.03
    assert said == pytest.approx(bytes_saved(model, 4, 64), rel=tolerance)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma", "gemma2", "phi", "phi3", "opt", "olmo2", "stablelm"])
def test_other_decoders_keep_about_as_much(kind: str, tmp_path: Path) -> None:
    """Within 20 %."""
    model = written(tiny_config(kind, num_hidden_layers=4), tmp_path).to(torch.bfloat16).eval()
    architecture = Architecture.of(tmp_path)
    said = footprint.saved(architecture, learned(architecture, FULL, scores=False), 2, 2, 48)
    assert said == pytest.approx(bytes_saved(model, 2, 48), rel=0.2)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in ("llama", "gpt2", "qwen3") for method in EXACT),
        *(("llama, tied", method) for method in ("full", "top", "bottom-frozen", "transfer")),
    ],
)
def test_as_many_weights_train_as_were_said(made: Made, name: str, method: str) -> None:
    """Exactly; of the gradual method all that will. Those of (IA)³ depend on PEFT's list of modules, and are few."""
    model = adapted(made, name, method)
    said = learned(Architecture.of(made[name][0]), tuning_of(method), scores=False)
    assert said.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("method", EXACT)
def test_a_score_head_trains_too(made: Made, method: str) -> None:
    """Whole, in place of the language head."""
    folder, _ = made["llama"]
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model = prepared(model, tuning_of(method), folder, scores=True, seed=0)
    said = learned(Architecture.of(folder), tuning_of(method), scores=True)
    assert said.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Architecture, dict[int, dict[str, int]]]:
    """A model, and the bytes alive in the first rank of one and of two that trained it, less the empty buffer."""
    folder = tmp_path_factory.mktemp("ranks")
    shape: dict[str, Any] = LLAMA | {"vocab_size": 2000, "num_hidden_layers": 6}
    written(LlamaConfig(**shape), folder / "model")
    run_groups("tests.pipeline.memory_ranks", folder)
    measured = {world: json.loads((folder / str(world) / "bytes-0.json").read_text()) for world in (1, 2)}
    return Architecture.of(folder / "model"), measured


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_holds_what_was_said(counted: tuple[Architecture, dict[int, dict[str, int]]], world: int) -> None:
    """Weights, gradients, optimiser, activations and logits of a real update and step, by every tensor alive."""
    architecture, by_world = counted
    settings = ppo(precision="bf16", workers={"count": world})
    trained = Trained(settings, "the", architecture, learned(architecture, FULL, scores=False), False, gpu=True)
    # Buffers count whole on a CPU too. One rank has none that stays, and in an update two on a GPU and one on a CPU.
    empty = 4 * trained.sharding.bucket if world > 1 else 0
    other = trained.width * trained.sharding.bucket if world == 1 else 0
    standing = sum(trained.standing().values())
    # The head's gradient in fp32 and in bf16 beside the logits is the most.
    matrix, logits = architecture.vocabulary * architecture.hidden, ROWS * RESPONSE * architecture.vocabulary
    moments = dict(trained.moments(ROWS, TIME, max(8 * logits, 4 * logits + 6 * matrix)))
    *updates, step = [standing + sum(parts.values()) - empty for parts in moments.values()]
    # Small weights stay gathered.
    kept = 2 * architecture.parameters if world > 1 else 0
    measured = {name: count - empty for name, count in by_world[world].items()}
    assert standing - empty <= measured["standing"] * 1.01
    assert measured["standing"] <= (standing - empty + kept) * 1.01
    assert max(updates) - other == pytest.approx(measured["update"], rel=0.02)
    # That of one rank, in stage 2, stays below the peak of its update.
    assert step == pytest.approx(measured["step"], rel=0.02 if world > 1 else 0.07)


def ppo(**values: Any) -> PpoSettings:
    return PpoSettings.model_validate({"rewards": [{"function": "a.py:f"}], "value_init": "policy"} | values)


BILLION = Architecture(
    parameters=1_235_814_400,
    layer=60_821_504,
    head=0,
    embeddings=262_668_288,
    linear={
        f"layers.{layer}.{name}": shape
        for layer in range(16)
        for name, shape in {
            "q_proj": (2048, 2048),
            "k_proj": (2048, 512),
            "v_proj": (2048, 512),
            "o_proj": (2048, 2048),
            "gate_proj": (2048, 8192),
            "up_proj": (2048, 8192),
            "down_proj": (8192, 2048),
        }.items()
    },
    layers=16,
    hidden=2048,
    vocabulary=128_256,
    heads=32,
    queries=2048,
    keys=512,
    intermediate=8192,
    gated=True,
    activation="silu",
    norms=2,
    rms=True,
    normed_heads=False,
    wide_norms=False,
    eager=False,
)
"""Llama 3.2 1B."""
MODELS = {"base": BILLION, "policy": BILLION, "reward": BILLION}
STAGES: dict[str, Any] = {
    "sft": SftSettings.model_validate({"precision": "bf16", "max_length": 2048, "micro_batch_size": 8}),
    "rm": RmSettings.model_validate({"precision": "bf16", "micro_batch_size": 8, "batch_size": 64}),
    "dpo": DpoSettings.model_validate({"precision": "bf16", "micro_batch_size": 8, "batch_size": 64}),
    "ppo": ppo(precision="bf16", micro_batch_size=16, sampling={"max_new_tokens": 512}, rollout={"tensor_parallel": 1}),
}


ROWS_OF = {
    "sft": ["batch_size=48"],
    "rm": ["batch_size=48"],
    "dpo": ["batch_size=48"],
    "ppo": ["rollouts=96", "minibatches=2"],
}
"""24 rows for each of two ranks."""


def changed(settings: Any, *overrides: str) -> Any:
    """The settings as the command line's words change them."""
    values = settings.model_dump()
    for override in overrides:
        path, _, value = override.partition("=")
        *above, last = path.split(".")
        section = values
        for name in above:
            section = section[name]
        section[last] = yaml.safe_load(value)
        if path == "tuning.method":
            values["tuning"] = {"method": value}
    return type(settings).model_validate(values)


@pytest.mark.parametrize("stage", STAGES)
def test_memory_follows_the_settings(stage: str) -> None:
    """More ranks never need more on each, nor smaller micro batches, nor LoRA."""
    settings = STAGES[stage]
    total = predict(settings, MODELS).total
    for smaller in (["workers.count=2"], ["micro_batch_size=4"], ["tuning.method=lora"]):
        assert predict(changed(settings, *smaller), MODELS).total < total
    by_ranks = [predict(changed(settings, f"workers.count={count}"), MODELS).total for count in (2, 4, 8, 16)]
    assert by_ranks == sorted(by_ranks, reverse=True)
    if stage != "sft":  # which packs short texts into long sequences
        assert predict(settings, MODELS, Texts(100, 50)).total < total


def test_the_reference_of_dpo_takes_no_memory() -> None:
    """A pair is two texts: those of as many texts of sft, each padded, and nothing more."""
    sft = changed(STAGES["sft"], "max_length=512", "packing=false", "micro_batch_size=16", "batch_size=128")
    assert predict(STAGES["dpo"], MODELS) == predict(sft, MODELS)


def test_checkpointing_keeps_a_layer_and_the_inputs_of_all() -> None:
    """So that doubling the layers adds their inputs alone."""
    part = learned(BILLION, FULL, scores=False)
    shallow = footprint.saved(BILLION, part, 2, 4, 512, checkpointing=True)
    twice_as_deep = Learned(part.parameters, head=True, whole_layers=32)
    deep = footprint.saved(replace(BILLION, layers=32), twice_as_deep, 2, 4, 512, checkpointing=True)
    assert deep - shallow == 16 * 4 * 512 * 2048 * 2
    assert shallow < footprint.saved(BILLION, part, 2, 4, 512) / 5


def test_texts_computed_one_by_one_need_no_mask() -> None:
    """So that activations grow with the tokens of a packed row, and not with their square; in bf16 on GPUs alone."""
    by_text: dict[str, Any] = {role: replace(model, by_text=True) for role, model in MODELS.items()}
    part = learned(BILLION, FULL, scores=False)
    whole = footprint.saved(BILLION, part, 2, 1, 2048, masked=False)
    assert whole == 2 * footprint.saved(BILLION, part, 2, 1, 1024, masked=False)
    # Of each layer the mask, and keys and values that were repeated for each of their queries.
    spared = 2 * (2048 + 2 * (BILLION.queries - BILLION.keys))
    assert footprint.saved(BILLION, part, 2, 1, 2048) - whole == BILLION.layers * 2048 * spared
    for stage, overrides, spares in (
        ("sft", [], True),
        ("rm", [], True),
        ("ppo", [], True),
        ("ppo", ["packing=false"], False),
        ("ppo", ["tuning={method: prompt}"], False),
        ("sft", ["packing=false"], False),
        ("sft", ["precision=fp32"], False),
    ):
        settings = changed(STAGES[stage], *overrides)
        assert (predict(settings, by_text).total < predict(settings, MODELS).total) == spares
        assert predict(settings, by_text, gpu=False) == predict(settings, MODELS, gpu=False)


def test_fused_kernels_keep_their_inputs_alone() -> None:
    """In bf16, for each token of a layer: two norms' fp32 and scaled copies less, and one tensor of the gate."""
    fused = replace(BILLION, fused=True)
    part = learned(BILLION, FULL, scores=False)
    spared = footprint.saved(BILLION, part, 2, 1, 100) - footprint.saved(fused, part, 2, 1, 100)
    norms = (16 * 2 + 1) * (4 + 2 - 2) * 2048
    assert spared == 100 * (norms + 16 * 2 * 8192)
    models = dict.fromkeys(MODELS, fused)
    for settings in STAGES.values():
        assert predict(settings, models).total < predict(settings, MODELS).total
        assert predict(settings, models, gpu=False) == predict(settings, MODELS, gpu=False)


def test_gradients_of_one_model_are_there_at_a_time() -> None:
    """One rank computes ZeRO's stage 2, which gives them back after each step: the policy's and the value model's."""
    for ranks, models in ((1, 1), (2, 2)):
        kept = predict(changed(STAGES["ppo"], f"workers.count={ranks}"), MODELS).parts["gradients"]
        assert kept == pytest.approx(4 * models * BILLION.parameters / ranks, abs=1.3e9)


def test_grpo_is_ppo_without_a_value_model() -> None:
    """Of as many ranks, a model's share of weights, gradients and optimiser less, and nothing else that stays."""
    of_ppo = changed(STAGES["ppo"], "workers.count=4")
    shared = GrpoSettings.model_fields.keys() & of_ppo.model_fields_set
    of_grpo = GrpoSettings.model_validate({name: getattr(of_ppo, name) for name in shared})
    ppo, grpo = (predict(settings, MODELS) for settings in (of_ppo, of_grpo))
    assert ppo.moment == grpo.moment
    less = {name: size - grpo.parts[name] for name, size in ppo.parts.items() if size != grpo.parts[name]}
    share = BILLION.parameters / 4
    # bf16 weights; gradients, with a buffer of each engine, and of AdamW weights and two moments in fp32.
    assert less == pytest.approx(
        {"weights": 2 * share, "gradients": 4 * share + 4 * BUCKET, "optimiser": 12 * share}, rel=1e-5
    )


def test_adapters_on_one_base_are_counted_with_one_base() -> None:
    """In place of those of policy, value model and reward model; several ranks have generation's copy beside them."""
    # So many that the sampler's cache does not stay.
    lora, shared = (["rollouts=4096", "tuning.method=lora", *more] for more in ([], ["share_base=true"]))
    held: dict[tuple[int, bool], float] = {}
    for ranks in (1, 4):
        for overrides in (lora, shared):
            parts = predict(changed(STAGES["ppo"], *overrides, f"workers.count={ranks}"), MODELS).parts
            weights = sum(parts.get(name, 0.0) for name in ("weights", "frozen models", "generation"))
            held[ranks, overrides is shared] = weights / (2 * BILLION.parameters)
    assert held[1, False] == pytest.approx(3, abs=0.1)
    assert held[1, True] == pytest.approx(1, abs=0.1)
    # Beside them there are layers that are whole while a rank computes.
    assert held[4, False] - held[4, True] == pytest.approx(2 / 4, abs=0.1)


def test_an_average_and_a_frozen_reference_are_counted() -> None:
    """Four bytes a weight, and two; with adapters the reference is the policy itself."""
    plain, averaged = (predict(changed(STAGES["ppo"], *more), MODELS) for more in ([], ["average_decay=0.9"]))
    assert averaged.total - plain.total == 4 * BILLION.parameters
    assert plain.parts["frozen models"] == 2 * 2 * BILLION.parameters
    assert (
        predict(changed(STAGES["ppo"], "tuning.method=lora"), MODELS).parts["frozen models"] == 2 * BILLION.parameters
    )


def test_models_that_are_apart_are_counted_where_they_are() -> None:
    """Two ranks of which one scores: the other has what one rank has, less the frozen models; or the first has more."""
    alone = predict(STAGES["ppo"], MODELS)
    apart = changed(STAGES["ppo"], "workers.count=2", "placement=apart")
    trains = predict(apart, MODELS)
    assert trains.moment == alone.moment
    assert "frozen models" not in trains.parts
    assert trains.total == alone.total - alone.parts["frozen models"]
    large = MODELS | {"reward": replace(BILLION, parameters=80 * BILLION.parameters)}
    scores = predict(changed(apart, "value_init=policy"), large)
    assert scores.moment == "while others score"
    assert scores.parts["frozen models"] == 2 * (1 + 80) * BILLION.parameters
    shared = predict(changed(apart, "workers.count=3", "scorers=2", "value_init=policy"), large)
    assert shared.parts["frozen models"] == scores.parts["frozen models"] / 2


def context_of(settings: Any, folder: Path, model: Path) -> Context[Any]:
    roles = ("policy", "reward") if isinstance(settings, PpoSettings) else ("base",)
    return Context("stage", "key", settings, dict.fromkeys(roles, model), folder, folder, folder)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a GPU of so many bytes, or the main memory, under each rank; the model is always Llama's billion."""
    monkeypatch.setattr(fitting, "architectures", lambda _: MODELS)

    def put(size: float, *, gpu: bool = True) -> Device:
        device = Device(gpu, int(size))
        monkeypatch.setattr(fitting, "device_of_ranks", lambda _: device)
        return device

    return put


@pytest.mark.parametrize("share", [0.8, 0.6, 0.3, 0.15])
@pytest.mark.parametrize("stage", STAGES)
def test_the_advice_is_enough(gpu: Any, stage: str, share: float, tmp_path: Path) -> None:
    """A refused stage whose settings are changed as the error says is not refused, and fits beside CUDA's context."""
    settings = STAGES[stage]
    texts = Texts(1024, 512, in_list=4)
    device = gpu(share * predict(settings, MODELS, texts).total)
    with pytest.raises(PreflightError) as refused:
        fitting.check(context_of(settings, tmp_path, tmp_path), texts)
    assert "for activations" in refused.value.what
    words = [word.removeprefix("stage.") for word in refused.value.next_step.split()]
    better = changed(settings, *words)
    fitting.check(context_of(better, tmp_path, tmp_path), texts)
    assert not AttemptFolder(tmp_path).notes()
    assert fitting.fits(predict(better, MODELS, texts), better, device)


def test_what_costs_least_is_advised_first(gpu: Any, tmp_path: Path) -> None:
    """The largest micro batch that fits; where none does, something beside it."""
    settings, texts = STAGES["sft"], Texts(2048)
    sizes = {count: predict(changed(settings, f"micro_batch_size={count}"), MODELS, texts).total for count in (1, 2, 4)}
    assert fitting.advice(settings, MODELS, texts, gpu(sizes[4] + 1.1e9)) == ["micro_batch_size=4"]
    assert fitting.advice(settings, MODELS, texts, gpu(sizes[2] + 1.1e9)) == ["micro_batch_size=2"]
    assert "micro_batch_size" not in fitting.advice(settings, MODELS, texts, gpu(sizes[1] + 0.9e9))[-1]
    assert fitting.advice(settings, MODELS, texts, gpu(1e9)) == []


@pytest.mark.parametrize("share", [0.5, 0.8, 1.5])
@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_of_no_set_size_fill_a_gpu(stage: str, share: float) -> None:
    """By the largest divisor of a rank's rows that leaves a fifth of the memory; by one row where none does."""
    unset = changed(STAGES[stage], "micro_batch_size=null", "workers.count=2", *ROWS_OF[stage])
    memory = int(share * predict(changed(unset, "micro_batch_size=24"), MODELS).total)
    found = with_micro_batch(unset, MODELS, memory)
    fitting_sizes = [
        size
        for size in (1, 2, 3, 4, 6, 8, 12, 24)
        if predict(changed(unset, f"micro_batch_size={size}"), MODELS).total + CONTEXT <= FILLED * memory
    ]
    assert found.micro_batch_size == max(fitting_sizes, default=1)
    decided = ["packing=false"] if stage == "ppo" else []
    assert found == changed(unset, f"micro_batch_size={found.micro_batch_size}", *decided)
    assert with_micro_batch(STAGES[stage], MODELS, 1) == changed(STAGES[stage], *decided)


def test_ppo_packs_where_a_gpu_s_kernel_computes_policy_and_value_model(tmp_path: Path) -> None:
    """Unless the settings say otherwise; and the tokens that they set stand for a number of samples."""
    by_text: dict[str, Any] = {role: replace(model, by_text=True) for role, model in MODELS.items()}
    for models, overrides, packing in (
        (by_text, [], True),
        (by_text, ["packing=false"], False),
        (by_text, ["precision=fp32"], False),
        (by_text, ["tuning={method: prefix}"], False),
        (by_text | {"policy": BILLION}, [], False),
        (by_text | {"reward": BILLION}, ["rewards=[{}]", "value_init=reward"], False),
        (by_text | {"reward": BILLION}, ["value_init=policy"], True),
        (None, [], False),
    ):
        given = changed(STAGES["ppo"], *overrides)
        assert with_micro_batch(given, models, 10**12).packing == packing
    tokens = changed(STAGES["ppo"], "micro_batch_size=null", f"micro_batch_tokens={5 * 768 + 700}")
    assert with_micro_batch(tokens, by_text, 1) == changed(tokens, "packing=true")
    five = changed(STAGES["ppo"], "micro_batch_size=5")
    assert predict(tokens, by_text).parts == predict(five, by_text).parts
    smallest = Device(True, int(predict(changed(tokens, "micro_batch_tokens=1200"), by_text).total + 1.5e9))
    assert fitting.advice(tokens, by_text, None, smallest) == ["micro_batch_tokens=1135"]
    call = Call("", context_of(tokens, tmp_path, tmp_path))
    assert "stage.micro_batch_tokens=2270" in causes._less_memory(call)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("stage", "longest"), [("sft", 2048), ("sft, padded", 2048), ("rm", 4 * 512), ("dpo", 2 * 512)]
)
def test_tokens_stand_for_rows_of_sft_rm_and_dpo(gpu: Any, stage: str, longest: int, tmp_path: Path) -> None:
    """As many as they hold, no more than a rank's share; less of them is advised where they are too many."""
    plain = changed(STAGES[stage.partition(",")[0]], *(["packing=false"] if "padded" in stage else []))
    tokens, four = (
        changed(plain, f"micro_batch_size={size}", f"micro_batch_tokens={count}")
        for size, count in (("null", 4 * longest), (4, "null"))
    )
    assert tokens.micro_batch == (8 if stage == "rm" else 4)  # lists of the fewest responses, of which the data has 4
    assert predict(tokens, MODELS) == predict(four, MODELS)
    share = changed(tokens, f"micro_batch_tokens={10**9}")
    assert predict(share, MODELS) == predict(changed(plain, f"micro_batch_size={plain.batch_size}"), MODELS)
    assert with_micro_batch(tokens, MODELS, 1) == tokens
    half = changed(tokens, f"micro_batch_tokens={2 * longest}")
    device = gpu(predict(half, MODELS).total + CONTEXT)
    assert fitting.advice(tokens, MODELS, None, device) == [f"micro_batch_tokens={2 * longest}"]
    call = Call("", context_of(tokens, tmp_path, tmp_path))
    assert f"stage.micro_batch_tokens={2 * longest}" in causes._less_memory(call)  # pyright: ignore[reportPrivateUsage]


def test_a_size_that_is_not_set_is_predicted_and_advised_as_ranks_will_choose_it(gpu: Any, tmp_path: Path) -> None:
    """So that nothing is refused that a smaller micro batch makes fit; on a CPU it is one sequence of sft."""
    unset, texts = changed(STAGES["sft"], "micro_batch_size=null"), Texts(2048)
    assert unset.micro_batch == 1
    sizes = {count: predict(changed(unset, f"micro_batch_size={count}"), MODELS, texts).total for count in (1, 2, 4)}
    for held in ((sizes[2] + CONTEXT) / FILLED, sizes[1] + CONTEXT):
        gpu(held)
        fitting.check(context_of(unset, tmp_path, tmp_path), texts)
    assert not AttemptFolder(tmp_path).notes()
    gpu(0.5 * sizes[1])
    with pytest.raises(PreflightError) as refused:
        fitting.check(context_of(unset, tmp_path, tmp_path), texts)
    assert "micro_batch_size" not in refused.value.next_step


def test_ranks_choose_by_the_smallest_gpu_and_say_what_they_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's message about a lack of memory then names half of it; a set number is left alone, and not noted."""
    unset, smallest = changed(STAGES["sft"], "micro_batch_size=null"), 60 * 10**9
    expected = with_micro_batch(unset, MODELS, smallest).micro_batch
    assert 1 < expected < 16
    given = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: given)
    others = torch.tensor(-smallest)
    ranks = {"device": lambda: torch.device("cuda"), "all_max": others.maximum, "is_main": lambda: True}
    for name, behaviour in ranks.items():
        monkeypatch.setattr(loading.group, name, behaviour)
    monkeypatch.setattr(loading, "architectures", lambda _: MODELS)
    context = context_of(unset, tmp_path, tmp_path)
    fixed = context_of(STAGES["sft"], tmp_path, tmp_path)
    assert loading.with_micro_batch(fixed) is fixed
    assert not AttemptFolder(tmp_path).notes()
    assert loading.with_micro_batch(context).settings.micro_batch_size == expected
    assert AttemptFolder(tmp_path).notes() == [f"micro_batch_size {expected}, as many as fit"]
    advice = causes._less_memory(Call("", context))  # pyright: ignore[reportPrivateUsage]
    assert f"stage.micro_batch_size={expected // 2}" in advice
    # The driver writes this before it starts a group again after a lack of memory.
    context.folder.micro_batch.write({"size": 1})
    assert loading.with_micro_batch(context).settings.micro_batch_size == 1
    assert len(AttemptFolder(tmp_path).notes()) == 1


@pytest.mark.parametrize(("size", "gpu_there"), [(1.05, True), (0.95, True), (0.1, False)])
def test_what_may_fit_after_all_is_noted_alone(gpu: Any, size: float, gpu_there: bool, tmp_path: Path) -> None:
    """Within the tolerance of a GPU, and always on CPUs."""
    settings, texts = STAGES["sft"], Texts(2048)
    predicted = predict(settings, MODELS, texts, gpu=gpu_there).total
    gpu(size * predicted if size < 1 else predicted + 0.5e9, gpu=gpu_there)
    fitting.check(context_of(settings, tmp_path, tmp_path), texts)
    (note,) = AttemptFolder(tmp_path).notes()
    assert "may not fit" in note


def test_nothing_is_said_of_unknown_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster of other machines, neither error nor note."""
    monkeypatch.setattr(fitting, "device_of_ranks", lambda _: None)
    monkeypatch.setattr(fitting, "architectures", lambda _: MODELS)
    fitting.check(context_of(STAGES["ppo"], tmp_path, tmp_path), Texts(1024, 512))
    assert not AttemptFolder(tmp_path).notes()


def test_doctors_table_shows_each_part_and_their_sum(gpu: Any) -> None:
    """A column for each stage, whose numbers add up."""
    gpu(40e9)
    rows: list[dict[str, Any]] = [
        {"stage": stage, "ranks": 1} | fitting._forecast(settings, MODELS)  # pyright: ignore[reportPrivateUsage]
        for stage, settings in STAGES.items()
    ]
    for row in rows:
        assert sum(row["parts"].values()) == row["total"]
        assert Prediction(row["moment"], row["parts"]).total == predict(STAGES[row["stage"]], MODELS).total
    console = Console(width=100, file=StringIO(), record=True)
    console.print(memory_table(rows))
    lines = {line[:16].strip(): line[16:].split() for line in console.export_text().splitlines()}
    assert lines["GB on each rank"] == list(STAGES)
    assert lines["sum"] == [f"{row['total'] / 1e9:.2f}" for row in rows]
    assert lines["available"] == ["40.00"] * len(STAGES)
    assert lines["weights"] == [f"{row['parts']['weights'] / 1e9:.2f}" for row in rows]


def test_lora_with_dropout_keeps_each_adapters_input() -> None:
    """Its inputs and a mask of each, where without dropout those of the norms are shared."""
    plain, dropped = (learned(BILLION, LoraTuning(dropout=share), scores=False) for share in (0.0, 0.1))
    inputs = 6 * 2048 + 8192
    assert dropped.adapter_masks == inputs
    assert dropped.adapter_elements - plain.adapter_elements == inputs - (2 * 2048 + 8192)


def test_sampling_never_decides_what_fits_a_gpu() -> None:
    """It has the rows that there is memory for; a small cache stays beside everything else."""
    settings = STAGES["ppo"]
    for more in ([], ["micro_batch_size=1"], ["rollouts=4096"], ["rollouts=4096", "micro_batch_size=1"]):
        assert predict(changed(settings, *more), MODELS).moment != "while responses are sampled"
    few, many = (predict(changed(settings, f"rollouts={count}"), MODELS).parts for count in (16, 32))
    # Of a place in each of 16 layers, 512 keys and values in bf16.
    places = capacity.rounded(limits(settings).longest - 1, capacity.COLUMNS_ON_GPU)
    assert many["generation"] - few["generation"] == 16 * places * 16 * 2 * 512 * 2
    # A large one does not, and one rank needs no copy of the policy.
    assert "generation" not in predict(changed(settings, "rollouts=4096"), MODELS).parts


def test_an_engine_of_its_own_has_a_copy_while_it_samples() -> None:
    """On a GPU it is dropped while the models train; natively it stays where weights are sharded."""
    whole = "while responses are sampled"
    copy = pytest.approx(2 * BILLION.parameters, abs=1e8)  # the cache of one row or a few
    few = ["rollouts=4", "micro_batch_size=1"]
    held: dict[tuple[str, int], tuple[float, float]] = {}
    for engine, ranks in product(("native", "vllm", "auto"), (1, 4)):
        settings = changed(STAGES["ppo"], *few, f"rollout.engine={engine}", f"workers.count={ranks}")
        moments = dict(memory._policy_gradient(settings, MODELS, limits(settings), gpu=True))  # pyright: ignore[reportPrivateUsage]
        sampling = moments.pop(whole)["generation"]
        held[engine, ranks] = sampling, min(parts["generation"] for parts in moments.values())
    for ranks in (1, 4):
        assert held["vllm", ranks][0] - held["native", 1][0] == copy
        assert held["auto", ranks][0] - held["native", 1][0] == copy
        assert held["vllm", ranks][1] == 0
    assert held["native", 4][1] - held["native", 1][1] == copy
    assert held["auto", 4][1] == held["native", 4][1]


SPLIT_BILLION = replace(
    BILLION,
    config={"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8},
)


def test_a_copy_that_ranks_hold_together_takes_its_part_of_each() -> None:
    """While responses are sampled, and it is dropped then; without a copy layers are gathered instead."""
    held: dict[Any, dict[str, Any]] = {}
    for together in (1, 2, 4, "gathered"):
        few = ["rollouts=4", "micro_batch_size=1", "workers.count=4"]
        settings = changed(STAGES["ppo"], *few, f"rollout.tensor_parallel={together}")
        moments = memory._policy_gradient(settings, MODELS, limits(settings), gpu=True)  # pyright: ignore[reportPrivateUsage]
        held[together] = dict(moments)
    whole, norms = 2 * BILLION.parameters, 2 * 16 * 2 * 2048
    sampling, loss = "while responses are sampled", "at the policy's loss"
    assert held[1][loss]["generation"] > whole
    for together in (2, 4):
        # Beside a cache of one row or a few.
        assert held[together][sampling]["generation"] == pytest.approx(norms + (whole - norms) / together, rel=0.1)
        assert held[together][loss]["generation"] == 0
    assert held["gathered"][sampling]["generation"] < 1e8
    assert held["gathered"][sampling]["weights"] == held["gathered"][loss]["weights"] > held[2][sampling]["weights"]


def test_the_fewest_ranks_whose_copy_fits_hold_it_together() -> None:
    """Of those that divide a node's ranks and the heads; where none fits, or none can, layers are gathered."""
    settings = changed(STAGES["ppo"], "workers.count=6", "rollout.tensor_parallel=auto")

    def chosen(bytes_of_gpu: float, model: Architecture = SPLIT_BILLION, node: int | None = None) -> Any:
        models = {"policy": model, "reward": model}
        return with_micro_batch(settings, models, int(bytes_of_gpu), node=node).rollout.tensor_parallel

    def needed(together: Any) -> float:
        return predict(changed(settings, f"rollout.tensor_parallel={together}"), MODELS).total + memory.CONTEXT

    assert needed(1) > needed(2) >= needed("gathered")
    assert chosen(needed(1) + 1) == 1
    assert chosen(needed(1) - 1) == 2
    assert chosen(needed(1) - 1, node=3) == "gathered"  # three ranks do not divide 32 heads
    assert chosen(needed(1) - 1, BILLION) == "gathered"
    assert chosen(needed(2) - 1) == "gathered"
    models, gpu = {"policy": SPLIT_BILLION, "reward": SPLIT_BILLION}, int(needed(1) - 1)
    taken = with_micro_batch(settings, models, gpu)
    why = memory.why_together(settings, taken, models, gpu) or ""
    assert why.startswith("rollout.tensor_parallel auto is 2: with a whole copy of the policy a rank would take about ")
    assert memory.why_together(taken, taken, models, gpu) is None


def test_where_the_copy_does_not_fit_the_other_engine_is_advised(gpu: Any) -> None:
    """Rather than adapters, which vLLM is not given."""
    few = ["tuning={method: top, blocks: 1}", "micro_batch_size=1", "activation_checkpointing=true"]
    settings, texts = changed(STAGES["ppo"], *few), Texts(64, 32)
    by_vllm = changed(settings, "rollout.engine=vllm")
    assert predict(by_vllm, MODELS, texts).moment == "while responses are sampled"
    device = gpu(predict(settings, MODELS, texts).total + 1.1e9)
    assert fitting.advice(by_vllm, MODELS, texts, device) == ["rollout.engine=native"]
