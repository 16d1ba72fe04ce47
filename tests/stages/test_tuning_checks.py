"""Methods of fine-tuning that do not fit are refused before any worker starts, with the setting and what would fit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster.devices import Device
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import RmSettings, SftSettings
from rlhf.errors import PreflightError, RequestError
from rlhf.models.text import load_tokenizer
from rlhf.rollout.speaker import Speaker
from rlhf.stages import checks
from tests.models.tiny import make_tiny_llama, tiny_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


def refused(
    base: Path, folder: Path, tuning: dict[str, Any], kind: Any = SftSettings, reward: Path | None = None, **more: Any
) -> PreflightError | None:
    """The error of a stage's check of a method, or None."""
    role = {"SftSettings": "demonstrations", "RmSettings": "comparisons", "PpoSettings": "prompts"}[kind.__name__]
    row: dict[str, Any] = {"prompt": "a film", "completion": "a joy", "responses": ["a joy", "dull"]}
    function = folder / "reward.py"
    function.write_text("def reward(prompts, responses):\n    return [0.0] * len(responses)\n")
    for part in ("train", "heldout"):
        (folder / f"{part}.jsonl").write_text(json.dumps(row | {"strengths": [1.0, -1.0]}) + "\n")
    values: dict[str, Any] = {"tuning": tuning, "micro_batch_size": 1, **more}
    if kind is PpoSettings:
        own = {"rewards": [{"function": f"{function}:reward"}], "value_init": "reward" if reward else "policy"}
        values = own | {"max_prompt_length": 16, "sampling": {"max_new_tokens": 8}} | values
        if reward:
            values["rewards"] = [{}]
    else:
        values = {"max_length": 32} | values
    inputs = {"policy" if kind is PpoSettings else "base": base, role: folder}
    inputs |= {"reward": reward} if reward else {}
    context: Context[Any] = Context("it", "key", kind.model_validate(values), inputs, folder, folder, folder)
    try:
        {"SftSettings": checks.sft, "RmSettings": checks.rm, "PpoSettings": checks.ppo}[kind.__name__](context)
    except PreflightError as error:
        return error
    return None


def changed(base: Path, target: Path, **config: Any) -> Path:
    """The model with other entries of its configuration."""
    shutil.copytree(base, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def with_tokens(base: Path, target: Path, kind: str, tokens: int, **config: Any) -> Path:
    """An adapter's folder of so many virtual tokens, as far as a check reads it."""
    changed(base, target / "base", **config)
    for path in base.glob("*token*"):
        shutil.copy(path, target)
    (target / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "num_virtual_tokens": tokens}))
    return target


KINDS = [SftSettings, RmSettings, PpoSettings]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tuning", "what", "field", "next_step"),
    [
        ({"method": "top", "blocks": 3}, "blocks is 3, and the model has 2 blocks", "blocks", "it.tuning.blocks=2"),
        ({"method": "bottom-frozen", "blocks": 9}, "is 9, and the model has 2", "blocks", "it.tuning.blocks=2"),
        (
            {"method": "lora", "targets": ["q_proj", "query", "proj"]},
            "named query, proj; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
            "targets",
            "name some of those",
        ),
        (
            {"method": "p-tuning", "template": [2, " joyful"]},
            "splits the anchor ' joyful' into",
            "template",
            "one token",
        ),
        ({"method": "qlora"}, "needs bitsandbytes", "method", "qlora]"),
        ({"method": "prompt", "tokens": 900}, "900 are for virtual tokens", "tuning", "fewer virtual tokens"),
        ({"method": "prompt", "tokens": 50}, "50 are for virtual tokens", "max_", "="),
        ({"method": "prefix", "tokens": 50}, "50 are for virtual tokens", "max_", "="),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    tuning: dict[str, Any],
    what: str,
    field: str,
    next_step: str,
) -> None:
    """By sft, rm and ppo alike, with the names and numbers that are there."""
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    monkeypatch.setattr(checks, "device_of_ranks", lambda _: None)
    error = refused(base, tmp_path, tuning, kind)
    assert error is not None
    assert what in error.what
    assert field in error.where
    assert next_step in str(error.next_step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tuning",
    [
        {"method": "top", "blocks": 2},
        {"method": "bottom-frozen", "blocks": 2},
        {"method": "lora", "targets": ["q_proj", "mlp.down_proj"]},
        {"method": "p-tuning", "template": [2, " film"]},
        {"method": "prompt", "tokens": 32},
        {"method": "prefix", "tokens": 32},
        {"method": "ia3"},
    ],
)
def test_what_just_fits_is_taken(base: Path, tmp_path: Path, kind: Any, tuning: dict[str, Any]) -> None:
    """All blocks, ends of names, an anchor of one token, and a context that is full."""
    assert refused(base, tmp_path, tuning, kind) is None


OF_EXPERTS = pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys:RuntimeWarning", "ignore:`is_gradient_checkpointing` is deprecated"
)
"""PEFT looks for the experts among modules alone, and for a property of transformers by its old name."""


def test_packing_for_a_model_that_reads_on_into_the_next_sample_is_refused(base: Path, tmp_path: Path) -> None:
    """Whether it is the policy or what the value model starts from."""
    assert refused(base, tmp_path, {"method": "full"}, PpoSettings, packing=True) is None
    opt = changed(base, tmp_path / "opt", model_type="opt")
    assert refused(opt, tmp_path, {"method": "full"}, PpoSettings) is None
    for policy, reward in ((opt, None), (base, opt)):
        error = refused(policy, tmp_path, {"method": "full"}, PpoSettings, reward, packing=True)
        assert error is not None
        assert error.what == "packing is true, and opt models do not keep the samples of a row apart"
        assert error.where == "it.packing"


def mixture(base: Path, target: Path, kind: str) -> Path:
    """A mixture of experts with the model's tokenizer."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = tiny_config(kind, num_hidden_layers=1, vocab_size=len(load_tokenizer(base)))
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("tuning", "what"),
    [
        ({"dropout": 0.1}, "lora_dropout"),
        ({"init": "pissa"}, "cannot apply lora"),
        ({"targets": ["w1"]}, "targeting w3"),
    ],
)
def test_lora_that_experts_cannot_have_is_refused(
    base: Path, tmp_path: Path, tuning: dict[str, Any], what: str
) -> None:
    """Where PEFT adapts a mixture's experts, by what it says itself."""
    error = refused(mixture(base, tmp_path / "mixture", "mixtral"), tmp_path, {"method": "lora"} | tuning)
    assert error is not None
    assert what in error.what


@pytest.mark.parametrize(("kind", "left_out"), [("mixtral", False), ("gpt_oss", True)])
@OF_EXPERTS
def test_experts_that_lora_leaves_as_they_are_are_named(base: Path, tmp_path: Path, kind: str, left_out: bool) -> None:
    """Once, where PEFT does not know the architecture, and not where targets were chosen."""
    folder = mixture(base, tmp_path / "mixture", kind)
    assert refused(folder, tmp_path, {"method": "lora"}) is None
    notes = [note for note in AttemptFolder(tmp_path).notes() if "experts" in note]
    assert len(notes) == left_out
    assert all("lora leaves the experts' down_proj and gate_up_proj as they are" in note for note in notes)
    assert refused(folder, tmp_path, {"method": "lora", "targets": ["q_proj"]}) is None
    assert len([note for note in AttemptFolder(tmp_path).notes() if "experts" in note]) == left_out


@pytest.mark.parametrize(("gpu", "words"), [(False, "it.workers.gpu is false"), (None, "there is none here")])
def test_qlora_without_a_gpu_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool | None, words: str
) -> None:
    """Where the workers are to have none, or can have none, before its library is asked for."""
    monkeypatch.setattr(checks, "device_of_ranks", lambda _: Device(False, 1 << 30))
    error = refused(base, tmp_path, {"method": "qlora"}, workers={"gpu": gpu})
    assert error is not None
    assert words in error.what


SOFT, DEEP = ("prompt", "p-tuning"), ("prefix", "p-tuning-v2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "lora", *SOFT, *DEEP])
@pytest.mark.parametrize("peft", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_go_on_by_methods_of_their_kind_alone(
    base: Path, tmp_path: Path, kind: Any, method: str, peft: str
) -> None:
    """As many as there are; nothing folds them into weights, and another method would begin without them."""
    given = with_tokens(base, tmp_path / "given", peft, 4)
    size = {"template": [4]} if method == "p-tuning" else {"tokens": 4} if method in SOFT + DEEP else {}
    goes_on = method in (SOFT if peft == "PROMPT_TUNING" else DEEP)
    error = refused(given, tmp_path, {"method": method, **size}, kind)
    assert (error is None) == goes_on
    if error is not None:
        first = "prompt" if peft == "PROMPT_TUNING" else "p-tuning-v2"
        assert "has 4 virtual tokens" in error.what
        assert str(error.next_step).startswith(f"it.tuning={{method: {first}, tokens: 4}}, or give it the model")
    elif method != "p-tuning":
        error = refused(given, tmp_path, {"method": method, "tokens": 5}, kind)
        assert error is not None
        assert re.search(f"tuning is {method} with 5", error.what)


def test_a_value_model_cannot_begin_at_virtual_tokens_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    """Those of the reward model, where it begins there; a reward model from scratch takes nothing of its base's."""
    reward = with_tokens(base, tmp_path / "reward", "PREFIX_TUNING", 4, score_mean=0.0, score_max_length=32)
    error = refused(base, tmp_path, {"method": "lora"}, PpoSettings, reward)
    assert error is not None
    assert "takes as reward has 4 virtual tokens of p-tuning-v2 or prefix" in error.what
    assert refused(base, tmp_path, {"method": "prefix", "tokens": 4}, PpoSettings, reward) is None
    policy = with_tokens(base, tmp_path / "policy", "PROMPT_TUNING", 4)
    assert refused(policy, tmp_path, {"method": "full"}, RmSettings, init="scratch") is None
    assert refused(policy, tmp_path, {"method": "full"}, RmSettings) is not None


def test_who_answers_leaves_room_for_a_model_s_virtual_tokens(base: Path, tmp_path: Path) -> None:
    """In evaluate and collect by their longest prompts, in `rlhf generate` by each prompt."""
    policy = with_tokens(base, tmp_path / "policy", "PROMPT_TUNING", 4)
    checks.check_room("evaluate", policy, 30, 30, "sampling.max_new_tokens")
    with pytest.raises(PreflightError, match="context of 64, of which 4 are for virtual tokens") as error:
        checks.check_room("evaluate", policy, 30, 31, "sampling.max_new_tokens")
    assert error.value.next_step == "evaluate.max_prompt_length=29"
    with pytest.raises(RequestError, match="do not fit the context of 60"):
        Speaker(policy).answers(["a"], 0.0, 60, 0)
