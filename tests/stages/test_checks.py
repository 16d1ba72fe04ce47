import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.config.rewards import EndpointSettings, RewardSettings
from rlhf.config.stages import EvaluateSettings, RmSettings, SftSettings
from rlhf.errors import PreflightError
from rlhf.models.weights import count_parameters
from rlhf.pipeline import disk
from stages import checks
from tests.models.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


def context(settings: Any, base: Path, folder: Path, role: str, train: list[Any], heldout: list[Any]) -> Context[Any]:
    data = folder / role
    data.mkdir()
    for name, rows in {"train": train, "heldout": heldout}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Context("stage", "key", settings, {"base": base, role: data}, folder, folder, folder)


DEMONSTRATION = {"prompt": "a film", "completion": "of two halves"}
SET = {"prompt": "a film", "responses": ["a joy", "dull"], "strengths": [1.0, -1.0]}


def test_data_without_a_held_out_part_is_refused(base: Path, tmp_path: Path) -> None:
    """What sft and rm report is measured there: without it nobody would know how good the result is."""
    for check, settings, role, row in (
        (checks.sft, SftSettings(max_length=32), "demonstrations", DEMONSTRATION),
        (checks.rm, RmSettings(max_length=32), "comparisons", SET),
    ):
        with pytest.raises(PreflightError, match=f"no {role} are held out"):
            check(context(settings, base, tmp_path, role, [row], []))


def test_what_is_too_long_is_counted_and_told(base: Path, tmp_path: Path) -> None:
    """Rows that are cut are never cut silently; a prompt that leaves no room for its completion is refused."""
    long = {"prompt": "a film", "completion": "dull , " * 24}
    told = context(SftSettings(max_length=32), base, tmp_path, "demonstrations", [DEMONSTRATION, long], [DEMONSTRATION])
    assert checks.sft(told)["demonstrations/too_long"] == 1.0
    assert "1 of 2 demonstrations are longer than 32 tokens" in (tmp_path / "notes.jsonl").read_text()

    (folder := tmp_path / "other").mkdir()
    endless = {"prompt": "dull , " * 24, "completion": "dull"}
    refused = context(SftSettings(max_length=32), base, folder, "demonstrations", [endless], [DEMONSTRATION])
    with pytest.raises(PreflightError, match="1 demonstrations have prompts of 32 tokens or more"):
        checks.sft(refused)


def test_a_batch_that_ranks_cannot_share_is_refused_before_they_start(base: Path, tmp_path: Path) -> None:
    """With the next number that they can."""
    for check, kind, role, row in (
        (checks.sft, SftSettings, "demonstrations", DEMONSTRATION),
        (checks.rm, RmSettings, "comparisons", SET),
    ):
        settings = kind.model_validate({"max_length": 32, "batch_size": 5, "workers": {"count": 2}})
        with pytest.raises(PreflightError, match="batch_size 5 is not a multiple of the 2 ranks") as error:
            check(context(settings, base, tmp_path, role, [row], [row]))
        assert error.value.next_step == "stage.batch_size=6"


def test_what_evaluate_could_not_answer_is_refused_before_ppo_is_trained(base: Path, tmp_path: Path) -> None:
    """Held-out prompts that are too long, and responses that leave no room for any prompt."""
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "a film of two halves"}) + "\n")
    function = tmp_path / "reward.py"
    function.write_text("def reward(prompts, responses):\n    return [0.0] * len(responses)\n")

    def evaluate(**values: Any) -> None:
        settings = EvaluateSettings.model_validate({"rewards": [{"function": f"{function}:reward"}], **values})
        inputs = {"before": base, "prompts": tmp_path}
        checks.evaluate(Context("evaluate", "key", settings, inputs, tmp_path, tmp_path, tmp_path))

    evaluate(max_prompt_length=32, sampling={"max_new_tokens": 32})
    with pytest.raises(PreflightError, match="1 of 1 prompts are longer than 3 tokens"):
        evaluate(max_prompt_length=3, sampling={"max_new_tokens": 32})
    with pytest.raises(PreflightError, match="do not fit the policy's context of 64") as error:
        evaluate(max_prompt_length=32, sampling={"max_new_tokens": 1000})
    assert error.value.next_step == "evaluate.sampling.max_new_tokens=32"


def test_a_length_beyond_the_models_context_is_refused(base: Path, tmp_path: Path) -> None:
    """The message names the longest that fits."""
    with pytest.raises(PreflightError, match="context is 64 tokens") as error:
        checks.sft(context(SftSettings(max_length=65), base, tmp_path, "demonstrations", [DEMONSTRATION], []))
    assert error.value.next_step == "stage.max_length=64"


def test_a_reward_that_is_not_there_is_refused_before_any_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both stages that score: a function without its file, and a service without its token."""
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    endpoint = EndpointSettings(url="http://localhost:1/", token_variable="NO_SUCH_TOKEN")
    for said, reward in {
        "there is no file": RewardSettings(function=f"{tmp_path / 'gone.py'}:reward"),
        "NO_SUCH_TOKEN": RewardSettings(endpoint=endpoint),
    }.items():
        ppo: Context[Any] = Context(
            "ppo", "key", PpoSettings(rewards=[reward], value_init="policy"), {}, tmp_path, tmp_path, tmp_path
        )
        with pytest.raises(PreflightError, match=said):
            checks.ppo(ppo)
        evaluate: Context[Any] = Context(
            "evaluate", "key", EvaluateSettings(rewards=[reward]), {}, tmp_path, tmp_path, tmp_path
        )
        with pytest.raises(PreflightError, match=said):
            checks.evaluate(evaluate)


def test_the_checks_say_what_will_be_written(base: Path, tmp_path: Path) -> None:
    """No checkpoint where none falls due in so few rows, packed ones too; the newest two and the next at most."""
    parameters = count_parameters(base)
    rows: dict[str, Any] = {"demonstrations": DEMONSTRATION, "comparisons": SET}
    for check, kind, role in ((checks.sft, SftSettings, "demonstrations"), (checks.rm, RmSettings, "comparisons")):
        for every, batch, checkpoints in ((50, 1, 0), (1, 1, 3), (1, 40, 0), (1, 20, 1)):
            values = {"max_length": 32, "batch_size": batch, "checkpoint_every": every}
            settings = kind.model_validate(values | ({"packing": False} if kind is SftSettings else {}))
            (folder := tmp_path / f"{role}-{every}-{batch}").mkdir()
            found = check(context(settings, base, folder, role, [rows[role]] * 40, [rows[role]]))
            assert found[disk.RESULT] == 4 * parameters
            assert found[disk.MEANWHILE] == checkpoints * 16 * parameters
    (folder := tmp_path / "packed").mkdir()
    settings = SftSettings(max_length=64, batch_size=20, checkpoint_every=1)
    packed = context(settings, base, folder, "demonstrations", [DEMONSTRATION] * 40, [DEMONSTRATION])
    assert checks.sft(packed)[disk.MEANWHILE] == 0
