"""Activation checkpointing, accumulation and offloading, in a group of one."""

import copy
import json
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.config.stages import DpoSettings, RmSettings, SftSettings
from rlhf.config.tuning import FULL, LoraTuning, Tuning
from rlhf.config.zero import ZeroSettings
from rlhf.models import tuning
from rlhf.models.heads import TokenLogprobs
from rlhf.models.micro_batches import MicroBatch
from rlhf.stages import dpo, rm, sft
from rlhf.tracking import read_metrics
from rlhf.zero.engine import Engine, sharded_loading, whole_weights
from tests import accelerator
from tests.models.tiny import make_tiny_llama, tiny_config

pytestmark = [
    # DeepSpeed's, torch's, TRL's and transformers' own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("group", "under_deepspeed"),
]

ZEROS = {
    "stage 1": ZeroSettings(stage=1),
    "stage 2": ZeroSettings(stage=2),
    "stage 3": ZeroSettings(),
    "stage 2, offloaded": ZeroSettings(stage=2, offload_optimizer="cpu"),
    "stage 3, offloaded": ZeroSettings(offload_optimizer="cpu", offload_parameters="cpu"),
}
TIME = 12


@pytest.fixture
def under_deepspeed(monkeypatch: pytest.MonkeyPatch, new_accelerator: None) -> None:
    """As a rank is told before it imports anything."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def model_of(model_type: str, method: Tuning, folder: Path, **config: Any) -> Any:
    """A model with dropout wherever its type has it, in training mode."""
    torch.manual_seed(0)
    config = {"vocab_size": 300, "dropout": 0.1, "attention_dropout": 0.1} | config
    model: Any = AutoModelForCausalLM.from_config(tiny_config(model_type, **config))
    return tuning.prepared(model, method, folder, scores=False, seed=0).train()


def batch(rows: int, width: int = 16) -> Tensor:
    return torch.randint(5, 300, (rows, width), generator=torch.Generator().manual_seed(1))


def loss_of(engine: Any, ids: Tensor) -> Tensor:
    return -engine(ids, torch.ones_like(ids), TIME, 1.0, False)[0].sum() / 100


LORA = LoraTuning(method="lora", rank=2, dropout=0.1)


@pytest.mark.parametrize(
    ("model_type", "stage", "method"),
    [(name, stage, method) for name, stage in (("llama", 3), ("llama", 2), ("opt", 3)) for method in (FULL, LORA)]
    # PEFT has no dropout for experts.
    + [("mixtral", 3, FULL)],
)
def test_gradients_are_those_of_activations_that_are_kept(
    tiny: Path, model_type: str, stage: Any, method: Tuning
) -> None:
    """Plain torch's without dropout, which computing again must not switch on; and no result depends on it."""
    model = model_of(model_type, method, tiny)
    plain = TokenLogprobs(copy.deepcopy(model)).eval()
    expected = loss_of(plain, batch(2))
    expected.backward()
    engine = Engine(
        TokenLogprobs(model), "fp32", learning_rate=0.1, zero=ZeroSettings(stage=stage), activation_checkpointing=True
    )
    loss = loss_of(engine, batch(2))
    assert loss == expected
    engine.backward(loss, last=True)
    for (name, weight), expected_weight in zip(model.named_parameters(), plain.parameters(), strict=True):
        if weight.requires_grad:
            gradient = torch.zeros_like(weight) if expected_weight.grad is None else expected_weight.grad
            torch.testing.assert_close(safe_get_full_grad(weight), gradient, atol=1e-6, rtol=1e-5, msg=name)


@contextmanager
def kept() -> Generator[dict[int, int]]:
    """Inside, the storages that are kept for a backward pass, by their address, and their bytes."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


@pytest.mark.parametrize("method", [FULL, LoraTuning(method="lora", rank=2)], ids=["full", "lora"])
def test_a_layer_keeps_its_input_alone(tiny: Path, method: Tuning) -> None:
    """Of eight layers, each keeps rows · width · 4 bytes; beside them there are the weights and the logits."""
    shape = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128}
    storages: dict[bool, dict[int, int]] = {}
    for again in (False, True):
        engine = Engine(
            TokenLogprobs(model_of("llama", method, tiny, **shape)),
            "fp32",
            learning_rate=0.1,
            activation_checkpointing=again,
        )
        with kept() as storages[again]:
            loss = loss_of(engine, batch(8, 64))
        engine.backward(loss, last=True)
    layer_input = 8 * 64 * 64 * 4
    assert list(storages[True].values()).count(layer_input) <= 8 + 4
    assert sum(storages[True].values()) < sum(storages[False].values()) / 4


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
def test_micro_batches_of_one_and_of_all_give_one_update(tiny: Path, zero: ZeroSettings) -> None:
    """Gradients are summed and then clipped, once; two updates, so that moments count as well."""
    weights: list[dict[str, Tensor]] = []
    norms: list[list[float]] = []
    for size in (1, 8):
        with sharded_loading("fp32", zero):
            model = AutoModelForCausalLM.from_pretrained(tiny)
        engine = Engine(TokenLogprobs(model), "fp32", learning_rate=1e-3, max_grad_norm=0.5, zero=zero)
        norms.append([])
        for _ in range(2):
            parts = batch(8, 60).split(size)
            for part in parts:
                engine.backward(loss_of(engine, part), last=part is parts[-1])
            norms[-1].append(engine.step(1e-3))
        weights.append(whole_weights(model, trained_only=True))
    assert min(norms[0]) > 0.5  # so that clipping matters
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=0, msg=name)


WORDS = ("joy", "dull", "the", "two", "film")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of very different lengths, some of them cut."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    for part, count in (("train", 8), ("heldout", 2)):
        rows: dict[str, list[Any]] = {"demonstrations": [], "comparisons": []}
        for number in range(count):
            rows["demonstrations"].append({"prompt": text(2), "completion": text(1 + 7 * (number % 4))})
            responses = [text(1 + 5 * (number % 3)), text(3), text(9)][: 2 + number % 2]
            strengths = [1.0, 0.2, -0.5][: len(responses)]
            rows["comparisons"].append({"prompt": text(2), "responses": responses, "strengths": strengths, "pool": 0})
        for role, lines in rows.items():
            (folder / role).mkdir(exist_ok=True)
            (folder / role / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


@pytest.mark.parametrize(("stage", "tokens"), [("sft", 110), ("sft, packed", 150), ("rm", 110), ("dpo", 130)])
def test_trainers_make_one_update_of_micro_batches_of_any_size(
    tiny: Path, data: Path, tmp_path: Path, stage: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row, of all, and of so many tokens, with unequal numbers of rows; texts of any lengths, cut ones among
    them; the gradients are clipped as those of the whole batch.
    """
    values: dict[str, Any] = {"batch_size": 4, "max_length": 48, "epochs": 1}
    values |= {"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 0.1}}
    values |= {"packing": stage == "sft, packed"} if "sft" in stage else {}
    results: list[tuple[dict[str, Tensor], list[Any]]] = []
    sizes: list[list[int]] = []
    monkeypatch.setattr(MicroBatch, "cut", counting(MicroBatch.cut, sizes))
    for micro in ({"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": tokens}):
        folder = tmp_path / "-".join(map(str, *micro.items()))
        (folder / "out").mkdir(parents=True)
        kind, run = {"rm": (RmSettings, rm.run), "dpo": (DpoSettings, dpo.run)}.get(stage, (SftSettings, sft.run))
        settings: Any = kind.model_validate(values | micro)
        inputs = {role: data / role for role in ("demonstrations", "comparisons")} | {"base": tiny, "policy": tiny}
        tracking = {"mode": "disabled"}
        accelerator.forget()
        run(Context("s", "0" * 64, settings, inputs, folder / "out", folder, folder, (folder,), tracking))
        results.append((load_file(folder / "out" / "model.safetensors"), read_metrics(folder / "metrics.jsonl")))
    assert [1, 1, 1, 1] in sizes
    assert [4] in sizes
    assert any(len(set(cut)) > 1 for cut in sizes)
    by_single_rows, rows_of_single = results[0]
    assert rows_of_single[0]["grad_norm"] > 0.1
    for others, other_rows in results[1:]:
        for metric in ("loss", "grad_norm"):
            expected = [row[metric] for row in rows_of_single]
            assert [row[metric] for row in other_rows] == pytest.approx(expected, rel=1e-4)
        for name, weight in by_single_rows.items():
            torch.testing.assert_close(weight, others[name], atol=1e-6, rtol=0, msg=name)


def counting(cut: Callable[..., list[Tensor]], sizes: list[list[int]]) -> Callable[..., list[Tensor]]:
    """Keep the number of rows of each turn."""

    def counted(micro: MicroBatch, order: Tensor, lengths: Tensor) -> list[Tensor]:
        turns = cut(micro, order, lengths)
        sizes.append([len(turn) for turn in turns])
        return turns

    return counted
