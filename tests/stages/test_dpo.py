"""The dpo stage in a group of one: against a plain script of TRL's, its labels and offset, and what it refuses."""

import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pydantic import ValidationError
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.stages import DpoSettings
from rlhf.data.records import read_rows
from rlhf.errors import PreflightError
from rlhf.models.layout import is_adapter
from rlhf.models.text import load_tokenizer, prompt_ids, response_ids
from rlhf.ranking.lists import draw_pairs
from rlhf.stages import checks, dpo
from rlhf.tracking import read_metrics
from rlhf.training.loop import learning_order
from tests import accelerator
from tests.models.tiny import make_tiny_llama

pytestmark = [
    # DeepSpeed's, torch's, TRL's and transformers' own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("group", "new_accelerator"),
]
VALUES: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 4,
    "micro_batch_size": 4,
    "max_length": 24,
    "optimizer": {"learning_rate": 3e-4, "warmup_fraction": 0.0, "weight_decay": 0.01},
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven sets of two responses, some longer than are read, rated by four people; and three held out."""
    draw = random.Random(0)

    def row(pool: int) -> dict[str, Any]:
        words = ("joy", "dull", "the", "two")
        responses = [" ".join(draw.choices(words, k=draw.randint(2, 9))) + " ." * number for number in range(2)]
        ratings = [[3, 1], [3, 1], [2, 1], [1, 2]]
        return {
            "prompt": "a film",
            "responses": responses,
            "ratings": [list(column) for column in zip(*ratings, strict=True)],
            "strengths": [0.7, -0.7],
            "elo": [100.0, -100.0],
            "pool": pool,
        }

    folder = tmp_path_factory.mktemp("comparisons")
    for part, count in (("train", 11), ("heldout", 3)):
        write(folder / f"{part}.jsonl", [row(number) for number in range(count)])
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def context_of(policy: Path, comparisons: Path, folder: Path, **settings: Any) -> Context[DpoSettings]:
    (folder / "out").mkdir(parents=True)
    given: Any = DpoSettings.model_validate(VALUES | settings)
    inputs = {"policy": policy, "comparisons": comparisons}
    return Context("dpo", "0" * 64, given, inputs, folder / "out", folder, folder, (folder,), {"mode": "disabled"})


def trained(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **settings: Any) -> tuple[list[float], dict[str, float]]:
    """The loss of each step, and the final metrics."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    context = context_of(*arguments, **settings)
    metrics = dpo.run(context)
    accelerator.forget()
    return [row["loss"] for row in read_metrics(context.folder.metrics) if "loss" in row], metrics


def test_the_only_step_is_not_spent_on_the_warm_up(
    monkeypatch: pytest.MonkeyPatch, policy: Path, comparisons: Path, tmp_path: Path
) -> None:
    """It would have a learning rate of 0, and the stage would end as if it had learned."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    optimizer = {"learning_rate": 3e-4, "warmup_fraction": 0.1}
    context = context_of(policy, comparisons, tmp_path, epochs=1, batch_size=16, optimizer=optimizer)
    dpo.run(context)
    accelerator.forget()
    assert [row["lr"] for row in read_metrics(context.folder.metrics) if "loss" in row] == [3e-4]


@cache  # two cases have one script
def of_plain_trl(
    policy: Path, comparisons: Path, folder: Path, *, swapped: tuple[int, int] = (1, 0), **more: Any
) -> list[float]:
    """The losses of a script as TRL's page has it: a second model as the reference, no DeepSpeed.

    folder   that it may write to
    swapped  how often a pair is in its batch as it is, and the other way round
    """
    settings: Any = DpoSettings.model_validate(VALUES)
    tokenizer, sets = load_tokenizer(policy), read_rows(comparisons / "train.jsonl")
    pairs, _ = draw_pairs(sets, 1.0, 0)
    prompt = prompt_ids(tokenizer, "a film")
    texts = [[response_ids(tokenizer, sets[one.set]["responses"][one.response]) for one in pair] for pair in pairs]
    lengths = [len(prompt) + max(map(len, pair)) for pair in texts]
    order = learning_order(lengths, settings.batch_size, settings.epochs, settings.seed)
    directed = [texts[row][:: 1 if copy < swapped[0] else -1] for row in order for copy in range(sum(swapped))]
    rows = [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in directed]

    class Plain(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return dataset

    arguments = DPOConfig(
        str(folder / "plain"),
        per_device_train_batch_size=settings.batch_size * sum(swapped),
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=settings.optimizer.learning_rate,
        weight_decay=settings.optimizer.weight_decay,
        lr_scheduler_type="linear",
        max_length=settings.max_length,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    model = AutoModelForCausalLM.from_pretrained(policy)
    trainer = Plain(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": "sigmoid"}, {}),
        ({"loss_type": "ipo", "beta": 0.5}, {"loss": "ipo", "beta": 0.5}),
        ({"loss_type": "robust", "label_smoothing": 0.2}, {"loss": "robust", "label_smoothing": 0.2}),
        # Three of four people prefer the chosen response.
        ({"swapped": (3, 1)}, {"labels": "share"}),
        ({"swapped": (3, 1)}, {"label_smoothing": 0.25}),
    ],
    ids=["sigmoid", "ipo", "robust", "share of annotators", "label smoothing"],
)
def test_the_loss_curve_is_that_of_a_plain_script_of_trl_s(
    policy: Path,
    comparisons: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    theirs: dict[str, Any],
    ours: dict[str, Any],
) -> None:
    """On the same order, to 1e-6: under DeepSpeed, and with no second model. A soft label is a pair's two orders, each
    as often as it says.
    """
    with accelerator.of_a_plain_script():
        expected = of_plain_trl(policy, comparisons, comparisons, **theirs)
    losses, _ = trained(monkeypatch, policy, comparisons, tmp_path / "ours", **ours)
    assert len(losses) == len(expected) == 6
    assert losses == pytest.approx(expected, abs=1e-6, rel=0)
    assert max(losses) - min(losses) > 0.01


@pytest.mark.parametrize("tuning", [{"method": "lora", "rank": 4}, {"method": "prompt", "tokens": 3, "text": "a film"}])
def test_the_reference_of_an_adapter_is_the_policy_before_its_first_step(
    policy: Path, comparisons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuning: dict[str, Any]
) -> None:
    """Also where the adapter begins with an effect; the offset is in the rewards' difference from the first step on."""
    settings = {"tuning": tuning, "margin": 0.5, "optimizer": {"learning_rate": 1e-2}, "epochs": 6}
    losses, metrics = trained(monkeypatch, policy, comparisons, tmp_path / "ours", **settings)
    assert losses[0] == pytest.approx(math.log1p(math.exp(0.5 * 1.4)), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    assert metrics["pairs"] == 11
    assert 0 <= metrics["eval/accuracy"] <= 1
    assert is_adapter(tmp_path / "ours" / "out")


def checked(policy: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[dict[str, float], str]:
    """What preflight counts and notes."""
    context = context_of(policy, folder / "comparisons", folder, **settings)
    (folder / "comparisons").mkdir()
    for part in ("train", "heldout"):
        write(folder / "comparisons" / f"{part}.jsonl", rows)
    return checks.dpo(context), "\n".join(AttemptFolder(folder).notes())


SET: dict[str, Any] = {"prompt": "a film", "responses": ["a joy", "dull"], "strengths": [1.0, -1.0], "pool": 0}
TIED = SET | {"strengths": [0.0, 0.0], "pool": 1}
EQUAL = SET | {"responses": ["dull", "dull"], "pool": 2}
LONG = SET | {"responses": ["a joy", "dull " * 30], "pool": 3}


def test_what_teaches_nothing_is_counted_and_what_is_cut_too(policy: Path, tmp_path: Path) -> None:
    """Sets without an order, pairs of equal texts, and responses beyond ``max_length``."""
    counts, notes = checked(policy, tmp_path, [SET, TIED, EQUAL, LONG])
    assert (counts["sets/tied"], counts["pairs/equal"], counts["responses/too_long"]) == (1, 1, 2)
    assert "of the 4 sets of train 1 are left out" in notes
    assert "2 responses are, with their prompts, longer than 24 tokens" in notes


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([TIED, EQUAL], {}, r"none of the 2 sets orders two different responses \(1 have"),
        ([SET | {"prompt": "a film " * 20}], {}, "2 sets have prompts of 24 tokens or more"),
        ([SET], {"max_length": 10_000}, "the model's context"),
        ([SET], {"batch_size": 3, "workers": {"count": 2}}, "batch_size 3 is not a multiple of the 2 ranks"),
    ],
    ids=["no order", "long prompts", "context", "ranks"],
)
def test_what_could_not_be_learned_is_refused(
    policy: Path, tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], said: str
) -> None:
    """Before any worker starts."""
    with pytest.raises(PreflightError, match=said):
        checked(policy, tmp_path, rows, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "ipo", "label_smoothing": 0.1},
        {"loss": "ipo", "margin": 0.1},
        {"loss": "robust", "labels": "share"},
        {"micro_batch_tokens": 40, "micro_batch_size": None},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    """What a loss would not use, and less than a pair's tokens."""
    with pytest.raises(ValidationError):
        DpoSettings.model_validate(VALUES | settings)
