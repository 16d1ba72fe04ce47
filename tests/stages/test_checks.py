import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.attempt.context import Context
from rlhf.config.collect import CollectSettings, CompareSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.rewards import EndpointSettings, RewardSettings
from rlhf.config.stages import EvaluateSettings, RmSettings, ScratchSettings, SftSettings
from rlhf.config.tuning import LoraTuning
from rlhf.errors import PreflightError, RecordError
from rlhf.models.base_models import make_from_scratch
from rlhf.models.layout import count_parameters
from rlhf.models.packing import tokenised
from rlhf.models.text import load_tokenizer, prompt_ids, response_ids, text_start
from rlhf.pipeline import disk
from rlhf.stages import checks
from tests.models.tiny import TEXTS, make_tiny_adapter, make_tiny_llama, tiny_config


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
SET: dict[str, Any] = {"prompt": "a film", "responses": ["a joy", "dull"], "strengths": [1.0, -1.0]}


def test_an_architecture_that_a_stage_cannot_train_is_refused(base: Path, tmp_path: Path) -> None:
    """Before anything is read; the second has no classifier in transformers."""
    for check, settings, role, name, said in (
        (checks.sft, SftSettings(max_length=32), "demonstrations", "bert", "bert models cannot be trained"),
        (checks.ppo, None, "prompts", "mamba", "mamba models cannot be trained"),
        (checks.rm, RmSettings(max_length=32), "comparisons", "olmoe", "no sequence classifier for olmoe models"),
    ):
        folder = tmp_path / name
        shutil.copytree(base, folder / "model")
        tiny_config(name).save_pretrained(folder / "model")
        given = (
            ppo(folder / "model", folder)
            if settings is None
            else context(settings, folder / "model", folder, role, [], [])
        )
        with pytest.raises(PreflightError, match=said):
            check(given)


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


def test_policies_of_different_tokenizers_are_not_compared(base: Path, tmp_path: Path) -> None:
    """One's log-probabilities of the other's tokens mean nothing."""
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "a film of two halves"}) + "\n")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    read = json.loads((other / "tokenizer.json").read_text())
    vocabulary = read["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(read))
    settings = EvaluateSettings.model_validate(
        {"policies": ["near", "far"], "max_prompt_length": 32, "sampling": {"max_new_tokens": 32}}
    )
    inputs = {"before": base, "near": base, "far": other, "prompts": tmp_path}
    with pytest.raises(PreflightError, match="the policies before and far have different tokenizers"):
        checks.evaluate(Context("evaluate", "key", settings, inputs, tmp_path, tmp_path, tmp_path))


def test_a_policy_that_ranks_cannot_split_is_refused(base: Path, tmp_path: Path) -> None:
    """With the numbers of ranks that could: the tiny model has two heads."""
    rewards = [{"function": "a.py:f"}]
    for together in (1, 2, 4):
        given = {"rewards": rewards, "value_init": "policy", "workers": {"count": 4}, "zero": {"stage": 3}}
        settings = PpoSettings.model_validate(given | {"rollout": {"tensor_parallel": together}})
        context = Context("tuned", "key", settings, {"policy": base}, tmp_path, tmp_path, tmp_path)
        if together < 4:
            checks.check_split(context)
            continue
        with pytest.raises(PreflightError, match="4 ranks do not divide the model's 2 attention heads") as error:
            checks.check_split(context)
        assert error.value.where == "tuned.rollout.tensor_parallel"


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
            assert found[disk.MEANWHILE] == checkpoints * 12 * parameters
    (folder := tmp_path / "packed").mkdir()
    settings = SftSettings(max_length=64, batch_size=20, checkpoint_every=1)
    packed = context(settings, base, folder, "demonstrations", [DEMONSTRATION] * 40, [DEMONSTRATION])
    assert checks.sft(packed)[disk.MEANWHILE] == 0


def test_a_length_that_is_just_enough_cuts_nothing(base: Path, tmp_path: Path) -> None:
    """A demonstration as long as the limit is whole, and a prompt as long as it leaves nothing to learn."""
    long = {"prompt": "the film is a joy of two halves", "completion": "dull , dull , dull"}
    made = context(SftSettings(), base, tmp_path, "demonstrations", [long], [DEMONSTRATION])
    (row,) = tokenised(made.inputs["demonstrations"] / "train.jsonl", load_tokenizer(base))

    def at(length: int) -> dict[str, float]:
        settings = SftSettings(max_length=length)
        return checks.sft(Context("sft", "key", settings, made.inputs, tmp_path, tmp_path, tmp_path))

    assert 8 < len(row.prompt) + 1 < row.length
    assert at(row.length)["demonstrations/too_long"] == 0
    assert not (tmp_path / "notes.jsonl").exists()
    assert at(row.length - 1)["demonstrations/too_long"] == 1
    assert at(len(row.prompt) + 1)["demonstrations/too_long"] == 1
    with pytest.raises(PreflightError, match="1 demonstrations have prompts") as error:
        at(len(row.prompt))
    assert f"above {row.length}," in str(error.value.next_step)


@pytest.mark.parametrize("sees", ["conversation", "response"])
def test_responses_that_are_cut_are_counted_in_both_parts(base: Path, tmp_path: Path, sees: str) -> None:
    """With the prompt or without, as they will be scored; one as long as the limit is whole."""
    tokenizer = load_tokenizer(base)
    before = text_start(tokenizer) if sees == "response" else prompt_ids(tokenizer, SET["prompt"])
    long: dict[str, Any] = {
        "prompt": SET["prompt"],
        "responses": ["dull , " * 3, "dull , " * 6, "a joy"],
        "strengths": [0.0, 1.0, 2.0],
    }
    lengths = [len(before) + len(response_ids(tokenizer, text)) for text in long["responses"] + SET["responses"]]
    settings = RmSettings.model_validate({"max_length": lengths[0], "sees": sees})
    made = context(settings, base, tmp_path, "comparisons", [SET], [SET, long])
    assert lengths[1] > lengths[0] == sorted(lengths)[-2]
    assert checks.rm(made)["responses/too_long"] == 1
    assert "1 of 7 responses are, with their prompts, longer" in (tmp_path / "notes.jsonl").read_text()


def test_a_budget_that_a_list_of_the_data_exceeds_is_refused(base: Path, tmp_path: Path) -> None:
    """With the number that holds it; settings know no more than that a list has two responses."""
    three = SET | {"responses": ["a joy", "dull", "a film"], "strengths": [1.0, -1.0, 0.0]}
    settings = RmSettings.model_validate({"max_length": 32, "micro_batch_tokens": 95})
    given = context(settings, base, tmp_path, "comparisons", [three], [SET])
    with pytest.raises(PreflightError, match="less than 3 responses of 32 tokens, a whole list") as error:
        checks.rm(given)
    assert error.value.next_step == "stage.micro_batch_tokens=96"
    checks.rm(replace(given, settings=settings.model_copy(update={"micro_batch_tokens": 96})))


def test_nothing_is_said_of_responses_that_are_whole_or_are_yet_to_be_written(base: Path, tmp_path: Path) -> None:
    """Without comparisons there is nothing to count."""
    settings = RmSettings(max_length=32)
    assert checks.rm(context(settings, base, tmp_path, "comparisons", [SET], [SET]))["responses/too_long"] == 0
    assert not (tmp_path / "notes.jsonl").exists()
    assert checks.rm(Context("rm", "key", settings, {"base": base}, tmp_path, tmp_path, tmp_path)) == {}


def test_demonstrations_that_are_yet_to_be_written_are_not_looked_for(base: Path, tmp_path: Path) -> None:
    """As those that `select` picks for a second sft, or mixes into ppo."""
    assert (
        checks.sft(Context("sft", "key", SftSettings(max_length=32), {"base": base}, tmp_path, tmp_path, tmp_path))
        == {}
    )
    whole = ppo(base, tmp_path, ptx={"coef": 0.5, "batch_size": 2, "max_length": 32})
    mixed = replace(whole, inputs={role: path for role, path in whole.inputs.items() if role != "demonstrations"})
    assert checks.ppo(mixed) == checks.ppo(whole)


@pytest.mark.parametrize(("epochs", "checkpoints"), [(1.0, 0), (1.4, 1), (2.5, 2)])
def test_steps_are_counted_over_all_epochs_and_lists(
    base: Path, tmp_path: Path, epochs: float, checkpoints: int
) -> None:
    """Of three rows two make a step, and half a step is one: 2, 3 and 5 steps, saved every second but the last."""
    parameters = count_parameters(base)
    values = {"max_length": 64, "batch_size": 2, "checkpoint_every": 2, "epochs": epochs}
    for check, kind, role, row, more in (
        (checks.sft, SftSettings, "demonstrations", DEMONSTRATION, {"packing": False}),
        (checks.rm, RmSettings, "comparisons", SET, {}),
    ):
        settings = kind.model_validate(values | more)
        found = check(context(settings, base, tmp_path, role, [row] * 3, [row]))
        assert found[disk.MEANWHILE] == checkpoints * 12 * parameters
    # A pool of six responses makes fifteen lists of two.
    settings = RmSettings.model_validate(values | {"epochs": 1.0, "responses_per_list": 2, "lists_per_response": 99.0})
    (folder := tmp_path / "lists").mkdir()
    sets = [SET | {"strengths": [1.0 * n, -1.0 - n], "pool": 0} for n in range(3)]
    found = checks.rm(context(settings, base, folder, "comparisons", sets, [SET]))
    assert found[disk.MEANWHILE] == 3 * 12 * parameters


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with the base's tokenizer, of another shape."""
    folder = tmp_path_factory.mktemp("reward")
    shape = ScratchSettings(vocabulary=300, hidden_size=16, layers=1, heads=2, context=64)
    make_from_scratch(shape, TEXTS, seed=0, target=folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"score_mean": 0.0, "score_std": 1.0, "sees": "conversation", "score_max_length": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ppo(base: Path, folder: Path, reward: Path | None = None, **values: Any) -> Context[Any]:
    """Prompts, demonstrations, and a reward model or a function."""
    function = folder / "reward.py"
    function.write_text("def reward(prompts, responses):\n    return [0.0] * len(responses)\n")
    for name in ("prompts", "demonstrations"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "train.jsonl").write_text((json.dumps(DEMONSTRATION) + "\n") * 3)
    inputs = {"policy": base, "prompts": folder / "prompts", "demonstrations": folder / "demonstrations"}
    if reward is None:
        values = {"rewards": [{"function": f"{function}:reward"}], "value_init": "policy"} | values
    else:
        inputs["reward"] = reward
    given = {"max_prompt_length": 32, "sampling": {"max_new_tokens": 32}, "rollouts": 8} | values
    return Context("ppo", "key", PpoSettings.model_validate(given), inputs, folder, folder, folder)


def test_what_ppo_will_write_is_of_both_models_that_are_trained(base: Path, reward: Path, tmp_path: Path) -> None:
    """The value model has the weights of the reward model or of the policy; a moving average is kept beside."""
    policy, scorer = count_parameters(base), count_parameters(reward)
    assert policy != scorer
    every = {"iterations": 5, "checkpoint_every": 2}
    for given, values, expected in (
        (reward, {}, 12 * (policy + scorer)),
        (reward, {"value_init": "policy"}, 12 * (policy + policy)),
        (None, {}, 12 * (policy + policy)),
        (None, {"average_decay": 0.9}, 12 * (policy + policy) + 4 * policy),
    ):
        found = checks.ppo(ppo(base, tmp_path, given, **every, **values))
        assert found == {disk.RESULT: 4 * policy, disk.MEANWHILE: 2 * expected}


def test_adapters_on_one_base_are_checked_and_write_themselves_alone(base: Path, reward: Path, tmp_path: Path) -> None:
    """No base is folded, and the policy's adapter has its own rank; a whole reward model is refused before ppo."""
    adapters = {
        role: make_tiny_adapter(base, tmp_path / role, LoraTuning(rank=rank), scores=role == "reward")
        for role, rank in (("policy", 2), ("reward", 3))
    }
    shared = {"share_base": True, "tuning": {"method": "lora"}, "iterations": 5, "checkpoint_every": 2}
    found = checks.ppo(ppo(adapters["policy"], tmp_path, adapters["reward"], **shared))
    assert found[disk.MEANWHILE] == 2 * 12 * sum(count_parameters(folder) for folder in adapters.values())
    with pytest.raises(PreflightError, match="reward is a whole model, and share_base takes adapters"):
        checks.ppo(ppo(adapters["policy"], tmp_path, reward, **shared))


def test_rollouts_that_ranks_cannot_share_are_refused_with_the_next_number_that_they_can(
    base: Path, tmp_path: Path
) -> None:
    """Minibatches of five for two ranks: of two, rollouts are a multiple of four."""
    with pytest.raises(PreflightError, match="a minibatch of 5 rollouts cannot be shared among 2 ranks") as error:
        checks.ppo(ppo(base, tmp_path, rollouts=10, minibatches=2, workers={"count": 2}))
    assert error.value.next_step == "ppo.rollouts=12"
    checks.ppo(ppo(base, tmp_path, rollouts=12, minibatches=2, workers={"count": 2}))


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is asked for by name; auto then samples natively."""
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    with pytest.raises(PreflightError, match="vLLM is not installed") as error:
        checks.ppo(ppo(base, tmp_path, rollout={"engine": "vllm"}))
    assert error.value.next_step == "pip install 'rlhf-pipeline[vllm]', or write rollout: {engine: native}"
    checks.ppo(ppo(base, tmp_path, rollout={"engine": "auto"}))


def test_rollouts_are_shared_among_the_ranks_that_train(base: Path, tmp_path: Path) -> None:
    """Of three ranks with one apart two; of four three, which cannot share minibatches of 64."""
    apart: dict[str, Any] = {"placement": "apart", "rollouts": 64, "minibatches": 1}
    checks.ppo(ppo(base, tmp_path, **apart, workers={"count": 3}))
    with pytest.raises(PreflightError, match="rollouts cannot be shared among 3 ranks that train") as error:
        checks.ppo(ppo(base, tmp_path, **apart, workers={"count": 4}))
    assert error.value.next_step == "ppo.rollouts=66"


def test_ppos_demonstrations_are_shared_among_ranks_and_cut_aloud(base: Path, tmp_path: Path) -> None:
    """Only where they are mixed in at all."""
    ptx = {"coef": 0.5, "batch_size": 3, "max_length": 64}
    checks.ppo(ppo(base, tmp_path, ptx=ptx | {"coef": 0.0}, workers={"count": 2}))
    with pytest.raises(PreflightError, match=r"ptx\.batch_size 3 cannot be shared among 2 ranks") as error:
        checks.ppo(ppo(base, tmp_path, ptx=ptx, workers={"count": 2}))
    assert error.value.next_step == "ppo.ptx.batch_size=4"
    run = ppo(base, tmp_path, ptx=ptx | {"batch_size": 4}, workers={"count": 2})
    checks.ppo(run)
    assert not (tmp_path / "notes.jsonl").exists()
    (row, *_) = tokenised(tmp_path / "demonstrations" / "train.jsonl", load_tokenizer(base))
    run = ppo(base, tmp_path, ptx=ptx | {"max_length": row.length - 1})
    checks.ppo(run)
    assert (
        f"3 demonstrations are longer than {row.length - 1} tokens and are cut"
        in (tmp_path / "notes.jsonl").read_text()
    )


def test_prompts_and_responses_that_just_fit_the_context_are_taken(base: Path, tmp_path: Path) -> None:
    """64 tokens; beyond, the room that a response leaves is named, or half for it where it leaves none."""
    checks.ppo(ppo(base, tmp_path, max_prompt_length=44, sampling={"max_new_tokens": 20}))
    for prompt, response, says in ((45, 20, "max_prompt_length=44"), (32, 64, "sampling.max_new_tokens=32")):
        with pytest.raises(PreflightError, match=f"prompts of {prompt} and responses of {response} tokens") as error:
            checks.ppo(ppo(base, tmp_path, max_prompt_length=prompt, sampling={"max_new_tokens": response}))
        assert error.value.next_step == f"ppo.{says}"
    with pytest.raises(PreflightError, match="3 of 3 prompts are longer than 1 tokens"):
        checks.ppo(ppo(base, tmp_path, max_prompt_length=1))


def test_collect_tries_every_writers_context_and_both_parts_of_the_prompts(base: Path, tmp_path: Path) -> None:
    """Of the models that there are by then; without prompts there is nothing to try."""
    data = tmp_path / "prompts"
    data.mkdir()
    parts = {"train": {"prompt": "a film"}, "heldout": {"prompt": "a film of two halves and a joy"}}
    for name, row in parts.items():
        (data / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = load_tokenizer(base)
    short, long = (len(prompt_ids(tokenizer, row["prompt"])) for row in parts.values())

    def collect(inputs: dict[str, Path], **values: Any) -> dict[str, float]:
        models = [{"model": "sft"}, {"model": "ppo"}]
        settings = CollectSettings.model_validate({"models": models, "max_new_tokens": 64 - long} | values)
        return checks.collect(Context("collect", "key", settings, inputs, tmp_path, tmp_path, tmp_path))

    both = {"model": base, "model_2": base, "prompts": data}
    assert collect(both, max_prompt_length=long) == {disk.RESULT: 0, disk.MEANWHILE: 0}
    for inputs in ({"model": base, "prompts": data}, {"model_2": base, "prompts": data}):
        with pytest.raises(PreflightError, match=f"1 of 1 prompts are longer than {short} tokens"):
            collect(inputs, max_prompt_length=short)
        with pytest.raises(PreflightError, match="do not fit the policy's context of 64") as error:
            collect(inputs, max_prompt_length=long, max_new_tokens=64 - long + 1)
        assert error.value.next_step == f"collect.max_prompt_length={long - 1}"
    collect({"prompts": data}, max_prompt_length=1)
    collect({"model": base, "model_2": base}, max_prompt_length=1)


def test_a_judge_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Before anything is collected for it."""
    settings = CompareSettings(function=f"{tmp_path / 'gone.py'}:judge")
    with pytest.raises(PreflightError, match="there is no file"):
        checks.compare(Context("compare", "key", settings, {}, tmp_path, tmp_path, tmp_path))


PICKY = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
)
SYSTEM = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a film"}]


def picky(model: Path, folder: Path) -> Path:
    """The model with a chat template that refuses a system's message."""
    shutil.copytree(model, folder)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = PICKY
    tokenizer.save_pretrained(folder)
    return folder


def test_demonstrations_that_the_reward_model_cannot_read_are_refused_before_it_trains(
    base: Path, tmp_path: Path
) -> None:
    """Its normaliser is measured on them."""
    given = context(RmSettings(max_length=32), picky(base, tmp_path / "picky"), tmp_path, "comparisons", [SET], [SET])
    assert "responses/too_long" in checks.rm(given)
    demonstrations = tmp_path / "demonstrations"
    demonstrations.mkdir()
    (demonstrations / "train.jsonl").write_text(json.dumps({"prompt": SYSTEM, "completion": "a joy"}) + "\n")
    given = dataclasses.replace(given, inputs={**given.inputs, "demonstrations": demonstrations})
    with pytest.raises(RecordError) as error:
        checks.rm(given)
    assert "demonstrations/train.jsonl, row 1" in str(error.value)


def test_prompts_that_the_reward_model_cannot_read_are_refused_before_ppo_and_evaluate(
    base: Path, reward: Path, tmp_path: Path
) -> None:
    """Its template may be another than the policy's."""
    scorer = picky(reward, tmp_path / "picky")
    tuned = ppo(base, tmp_path, scorer)
    (tmp_path / "prompts" / "train.jsonl").write_text(json.dumps({"prompt": SYSTEM}) + "\n")
    with pytest.raises(RecordError) as error:
        checks.ppo(tuned)
    assert "prompts/train.jsonl, row 1" in str(error.value)
    (tmp_path / "prompts" / "heldout.jsonl").write_text(json.dumps({"prompt": SYSTEM}) + "\n")
    settings = EvaluateSettings.model_validate({"max_prompt_length": 32, "sampling": {"max_new_tokens": 32}})
    inputs = {"before": base, "prompts": tmp_path / "prompts"}
    compared = Context("evaluate", "key", settings, inputs, tmp_path, tmp_path, tmp_path)
    checks.evaluate(compared)
    with pytest.raises(RecordError) as error:
        checks.evaluate(dataclasses.replace(compared, inputs=inputs | {"reward": scorer}))
    assert "prompts/heldout.jsonl, row 1" in str(error.value)


def test_a_value_model_of_another_vocabulary_is_refused_before_ppo(base: Path, reward: Path, tmp_path: Path) -> None:
    """It would start from the reward model, and read the policy's tokens."""
    other = tmp_path / "other"
    make_from_scratch(
        ScratchSettings(vocabulary=310, hidden_size=16, layers=1, heads=2, context=64),
        [*TEXTS, "quite other words than those"] * 3,
        seed=0,
        target=other,
    )
    config = json.loads((other / "config.json").read_text())
    scored = {"score_mean": 0.0, "score_std": 1.0, "sees": "response", "score_max_length": 64}
    (other / "config.json").write_text(json.dumps(config | scored))
    checks.ppo(ppo(base, tmp_path, reward))
    checks.ppo(ppo(base, tmp_path, other, value_init="policy"))
    with pytest.raises(PreflightError, match="tokenizer"):
        checks.ppo(ppo(base, tmp_path, other))


def test_a_reward_model_that_says_it_reads_more_than_it_takes_is_refused(
    base: Path, reward: Path, tmp_path: Path
) -> None:
    """Its context is 64 tokens."""
    shutil.copytree(reward, tmp_path / "long")
    config = json.loads((reward / "config.json").read_text())
    (tmp_path / "long" / "config.json").write_text(json.dumps(config | {"score_max_length": 65}))
    with pytest.raises(PreflightError, match="score_max_length is 65, and its context is 64"):
        checks.ppo(ppo(base, tmp_path, tmp_path / "long"))


def test_a_task_without_held_out_records_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    """Its metrics would be missing among those of the others."""
    rows = [DEMONSTRATION | {"task": task, "weight": 1.0} for task in ("a", "b")]
    with pytest.raises(PreflightError, match="no demonstrations of the task b are held out"):
        checks.sft(context(SftSettings(max_length=32), base, tmp_path, "demonstrations", rows, [rows[0]]))
