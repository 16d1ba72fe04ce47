"""The sft stage in a group of one, against transformers alone."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.stages import SftSettings
from rlhf.data.records import read_rows
from rlhf.models import folders, varlen
from rlhf.models.packing import tokenised, training_demonstrations
from rlhf.models.text import load_tokenizer
from rlhf.stages import sft
from tests.models.tiny import make_tiny_llama, tiny_config

ROOT = Path(__file__).parents[2]
pytestmark = [
    # DeepSpeed's, torch's, TRL's and transformers' own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("group", "under_deepspeed"),
]


@pytest.fixture
def under_deepspeed(monkeypatch: pytest.MonkeyPatch, new_accelerator: None) -> None:
    """As a rank is told before it imports anything."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that keeps packed texts apart, and one that does not, with the same tokenizer."""
    llama = make_tiny_llama(tmp_path_factory.mktemp("llama"))
    opt = tmp_path_factory.mktemp("opt")
    torch.manual_seed(0)
    config = tiny_config("opt", vocab_size=300, max_position_embeddings=64, dropout=0.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(opt)
    folders.copy_tokenizer(llama, opt)
    return {"llama": llama, "opt": opt}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out completions of very different lengths."""
    folder, draw = tmp_path_factory.mktemp("demonstrations"), random.Random(0)
    for part, lengths in (("train", (3, 4)), ("heldout", (1, 9, 2, 1, 5))):
        rows = [
            {"prompt": "a film", "completion": " ".join(draw.choices(("joy", "dull", "the", "two"), k=length))}
            for length in lengths
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(base: Path, demonstrations: Path, folder: Path, **settings: Any) -> dict[str, float]:
    (folder / "out").mkdir()
    values = {"batch_size": 1, "max_length": 64, "optimizer": {"learning_rate": 1e-12}, **settings}
    inputs = {"base": base, "demonstrations": demonstrations}
    given: Any = SftSettings.model_validate(values)
    tracking = {"mode": "disabled"}
    return sft.run(Context("sft", "0" * 64, given, inputs, folder / "out", folder, folder, (folder,), tracking))


def loss_alone(base: Path, demonstrations: Path) -> float:
    """Nats per held-out completion token, each demonstration by itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer, losses = load_tokenizer(base), []
    for prompt, completion in tokenised(demonstrations / "heldout.jsonl", tokenizer):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        losses += (-logprobs[range(len(prompt) - 1, len(prompt + completion) - 1), completion]).tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_held_out_loss_is_a_mean_over_tokens_each_text_read_alone(
    bases: dict[str, Path], demonstrations: Path, tmp_path: Path, kind: str, micro_batch_size: int, packing: bool
) -> None:
    """Whatever shares a batch or a row with it, also of a model that would read on into the next text."""
    expected = loss_alone(bases[kind], demonstrations)  # first: later, transformers would shard what it loads
    settings = {"packing": packing, "micro_batch_size": micro_batch_size}
    found = trained(bases[kind], demonstrations, tmp_path, **settings)["eval/loss"]
    assert found == pytest.approx(expected, abs=1e-5)
    padded_instead = "do not keep packed texts apart" in "\n".join(AttemptFolder(tmp_path).notes())
    assert padded_instead == (packing and kind == "opt")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_held_out_loss_of_a_task_is_that_of_its_records_alone(
    bases: dict[str, Path], demonstrations: Path, tmp_path: Path, packing: bool
) -> None:
    """Beside the mean over all tokens; records are trained on as often as the weight of their task says."""
    whole, read = loss_alone(bases["llama"], demonstrations), read_rows(demonstrations / "heldout.jsonl")
    expected = {"eval/loss": whole}
    (tmp_path / "mixed").mkdir()
    heldout = [row | {"task": "xy"[number % 2]} for number, row in enumerate(read)]
    write_rows(tmp_path / "mixed" / "heldout.jsonl", heldout)
    train = [row | {"weight": {"x": 2.0, "y": 0.5}[row["task"]]} for row in heldout]
    write_rows(tmp_path / "mixed" / "train.jsonl", train)
    for task in "xy":
        (tmp_path / task).mkdir()
        write_rows(tmp_path / task / "heldout.jsonl", [row for row in heldout if row["task"] == task])
        expected[f"eval/loss/{task}"] = loss_alone(bases["llama"], tmp_path / task)
    found = trained(bases["llama"], tmp_path / "mixed", tmp_path, packing=packing)
    assert found == pytest.approx(expected, abs=1e-5)
    assert expected["eval/loss/x"] != pytest.approx(expected["eval/loss/y"], abs=1e-3)

    file, tokenizer = tmp_path / "mixed" / "train.jsonl", load_tokenizer(bases["llama"])
    epoch: Any = training_demonstrations(file, tokenizer, 0)
    counts = Counter(tuple(row["input_ids"]) for row in epoch)
    texts = Counter(tuple(prompt + completion) for prompt, completion in tokenised(file, tokenizer)[::2])
    assert {ids: counts[ids] for ids in texts} == {ids: 2 * count for ids, count in texts.items()}
    assert len(epoch) == 2 * 3 + 1


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_packed_demonstrations_are_learned_text_by_text(
    bases: dict[str, Path], demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through TRL, accelerate and DeepSpeed every layer gets the boundaries of a micro batch's texts."""
    texts: list[int] = []
    by_text = varlen.by_text_on_cpu

    def counted(*states: Any) -> torch.Tensor:
        texts.append(len(states[3].offsets) - 1)
        return by_text(*states)

    expected = loss_alone(bases["llama"], demonstrations)
    monkeypatch.setattr(varlen, "by_text_on_cpu", counted)
    found = trained(bases["llama"], demonstrations, tmp_path, micro_batch_size=3, activation_checkpointing=True)
    assert found["eval/loss"] == pytest.approx(expected, abs=1e-5)
    # Two layers compute the two texts of the only step behind what both begin with, and again for its gradients; then
    # those held out.
    assert texts == [3, 3, 3, 3, 6, 6]
    assert varlen.NAME not in (tmp_path / "out" / "config.json").read_text()


ON_A_GPU = """
import json, sys
from pathlib import Path
from benchmarks.ranks import alone, context_of
from rlhf.config.stages import SftSettings
from rlhf.models import varlen
from rlhf.tracking import read_metrics
from rlhf.training import trl_trainers
from rlhf.stages import sft

base, demonstrations, masked = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "masked"
if masked:
    trl_trainers.read_beginnings_once = lambda model: None
calls = []
kernel = varlen.varlen_attn
varlen.varlen_attn = lambda *states, **named: calls.append(1) or kernel(*states, **named)
values = {"precision": "bf16", "batch_size": 1, "max_length": 64, "optimizer": {"learning_rate": 1e-12}}
with alone() as folder:
    inputs = {"base": base, "demonstrations": demonstrations}
    context = context_of("sft", SftSettings.model_validate(values), inputs, folder)
    loss = sft.run(context)["eval/loss"]
    row = next(row for row in read_metrics(context.folder.metrics) if "grad_norm" in row)
    notes = context.folder.notes()
found = {"eval": loss, "calls": len(calls), "notes": notes}
print(json.dumps(found | {name: row[name] for name in ("loss", "grad_norm")}))
"""


@pytest.mark.gpu
def test_packed_demonstrations_are_learned_on_a_gpu_as_under_a_mask(
    bases: dict[str, Path], demonstrations: Path
) -> None:
    """In bf16: loss, gradient and held-out loss; the kernel computes every layer, and the size chosen is noted."""
    found: dict[str, Any] = {}
    for how in ("masked", "by text"):
        command = [sys.executable, "-c", ON_A_GPU, str(bases["llama"]), str(demonstrations), how]
        environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[how] = json.loads(done.stdout.splitlines()[-1])
    masked, by_text = found["masked"], found["by text"]
    assert not masked["calls"]
    assert by_text["calls"] >= 4
    assert "micro_batch_size 1, as many as fit" in by_text["notes"]
    for name in ("eval", "loss", "grad_norm"):
        assert by_text[name] == pytest.approx(masked[name], rel=0.02), name
