from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.config.base import semantic_values
from rlhf.config.pipeline import load_pipeline
from rlhf.config.ppo import PpoSettings
from rlhf.config.rewards import EndpointSettings, RewardSettings, reward_inputs
from rlhf.config.stages import EvaluateSettings
from rlhf.errors import SettingsError
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store

LOCAL: dict[str, Any] = {"url": "http://localhost:8000/score"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"url": "http://scores.example/", "allowed_hosts": ["scores.example"]}, "must be https"),
        ({"url": "https://scores.example/"}, "would go to 'scores.example'; add it to allowed_hosts"),
        ({"url": "https://scores.example/", "allowed_hosts": ["example"]}, "would go to 'scores.example'"),
        ({"url": "https://localhost.example/"}, "would go to 'localhost.example'"),
        ({"url": "https://localhost@scores.example/"}, "holds a name or password"),
        ({"url": "http://user:word@localhost/"}, "holds a name or password"),
        ({"url": "ftp://localhost/"}, "no http or https address"),
        ({"url": "localhost:8000"}, "no http or https address"),
        ({"url": "https:///score"}, "no http or https address"),
        ({"url": "http://localhost:99999/"}, "is no address: Port out of range"),
        ({"url": "http://localhost:port/"}, "is no address: Port could not be cast"),
        ({"url": "http://localhost:0/"}, "no http or https address"),
        ({"url": "http://localhost/a b"}, "no http or https address"),
        ({"url": "http://localhost/\x00"}, "no http or https address"),
    ],
)
def test_rows_are_sent_to_no_place_that_was_not_allowed(values: dict[str, Any], said: str) -> None:
    """Neither unencrypted over a network, nor to a host that nobody named, nor with a password in the file."""
    with pytest.raises(ValidationError, match=said):
        EndpointSettings(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"url": "http://localhost:8000/score"},
        {"url": "http://127.0.0.1/"},
        {"url": "http://[::1]:8000/"},
        {"url": "https://scores.example/v1", "allowed_hosts": ["scores.example"]},
    ],
)
def test_this_machine_and_allowed_hosts_are_taken(values: dict[str, Any]) -> None:
    """Whether by name or by number."""
    assert EndpointSettings(**values).url == values["url"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "rm", "function": "f.py:f"}, "this one has model and function"),
        ({"model": "rm", "endpoint": LOCAL}, "this one has model and endpoint"),
        ({"function": "f.py:f", "endpoint": LOCAL}, "this one has function and endpoint"),
        ({"function": "f.py"}, "not of the form file.py:name"),
        ({"function": "f:f"}, "not of the form file.py:name"),
        ({"function": "package.module:f"}, "not of the form file.py:name"),
        ({"function": "f.py:"}, "not of the form file.py:name"),
        ({"function": "f.py:two words"}, "not of the form file.py:name"),
        ({"model": "rm", "mean": 1.0}, "its own normaliser"),
        ({"function": "f.py:f", "std": 0.0}, "greater than 0"),
        ({"function": "f.py:f", "weight": float("nan")}, "finite"),
        ({"function": "f.py:f", "mean": float("inf")}, "finite"),
    ],
)
def test_a_reward_is_exactly_one_thing(values: dict[str, Any], said: str) -> None:
    """What an entry means is never guessed."""
    with pytest.raises(ValidationError, match=said):
        RewardSettings(**values)


def test_an_entry_that_names_nothing_is_the_model_of_rm() -> None:
    """Also with a weight alone."""
    assert RewardSettings() == RewardSettings(model="rm")
    assert RewardSettings(weight=0.5).model == "rm"


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([{"weight": 0.0}], "all rewards have weight 0"),
        ([{"weight": 0.0}, {"function": "f.py:f", "weight": 0.0}], "all rewards have weight 0"),
        ([{}, {"model": "rm", "weight": 0.5}], "'rm' is named twice"),
        ([], "at least 1 item"),
    ],
)
@pytest.mark.parametrize("settings", [PpoSettings, EvaluateSettings])
def test_rewards_that_could_teach_nothing_are_refused(
    settings: type[PpoSettings | EvaluateSettings], rewards: list[Any], said: str
) -> None:
    """By both stages that score."""
    with pytest.raises(ValidationError, match=said):
        settings.model_validate({"rewards": rewards})


def test_a_value_model_from_the_reward_needs_a_reward_model() -> None:
    """Among rewards that are no models it has nothing to start from, and the message says what to write."""
    rewards = [RewardSettings(function="f.py:f"), RewardSettings(endpoint=EndpointSettings(**LOCAL))]
    with pytest.raises(ValidationError, match="write value_init: policy"):
        PpoSettings(rewards=rewards)
    assert reward_inputs(PpoSettings(rewards=rewards, value_init="policy").rewards) == {}
    assert PpoSettings(rewards=[*rewards, RewardSettings()]).value_init == "reward"


def test_every_reward_model_is_an_input_and_the_first_is_the_reward() -> None:
    """Functions and endpoints between them take no number."""
    rewards = [RewardSettings(function="f.py:f"), RewardSettings(model="help"), RewardSettings(model="harm")]
    assert reward_inputs(rewards) == {"reward": "help", "reward_2": "harm"}


PIPELINE = """
pipeline: rewards
store: {{uri: {store}}}
data: {{}}
model: {{base: scratch}}
sft: {{}}
ppo:
  value_init: policy
  rewards:
    - function: {function}
    - {{endpoint: {endpoint}, weight: 0.5}}
"""


def key_material(folder: Path, function: str, endpoint: str = "{url: 'http://localhost/'}") -> Any:
    """What of PPO's settings enters its key."""
    path = folder / "p.yaml"
    path.write_text(PIPELINE.format(store=folder / "store", function=function, endpoint=endpoint))
    known = stages()
    config = load_pipeline(path, [], {name: stage.settings for name, stage in known.items()})
    planned: dict[str, Planned] = plan(config, known, Store.open(folder / "store"))
    return planned["ppo"].settings


@pytest.fixture
def written(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text("def f(prompts, responses):\n    return [0] * len(responses)\n\n\ng = f\n")
    return file


def test_a_function_enters_the_key_by_its_content_and_name_and_not_by_its_place(tmp_path: Path, written: Path) -> None:
    """A file that was moved scores as before; one that was changed, or another function of it, does not."""
    before = key_material(tmp_path, f"{written}:f")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    moved = written.rename(elsewhere / "other.py")
    assert key_material(tmp_path, f"{moved}:f") == before
    assert key_material(tmp_path, f"{moved}:g") != before
    moved.write_text(moved.read_text() + "# changed\n")
    assert key_material(tmp_path, f"{moved}:f") != before


def test_a_function_s_file_that_is_not_there_is_refused_by_the_plan(tmp_path: Path, written: Path) -> None:
    """Without its content there is no key."""
    with pytest.raises(SettingsError, match="no file or folder"):
        key_material(tmp_path, f"{tmp_path / 'gone.py'}:f")


def test_an_endpoint_enters_the_key_by_its_address_and_version_alone(tmp_path: Path, written: Path) -> None:
    """How it is asked changes no score."""
    before = key_material(tmp_path, f"{written}:f")
    for runtime in (
        "timeout_s: 3",
        "batch_size: 7",
        "retries: 9",
        "max_bytes: 100",
        "token_variable: TOKEN",
        "allowed_hosts: [a.example]",
    ):
        assert key_material(tmp_path, f"{written}:f", f"{{url: 'http://localhost/', {runtime}}}") == before, runtime
    for semantic in ("url: 'http://localhost/v2'", "url: 'http://localhost/', version: b"):
        assert key_material(tmp_path, f"{written}:f", f"{{{semantic}}}") != before, semantic


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"mean": 1.0}, {"std": 2.0}])
def test_what_a_score_is_multiplied_by_and_shifted_by_enters_the_key(change: dict[str, float]) -> None:
    """They change every reward."""
    values: dict[str, Any] = {"function": "f.py:f"}
    other: dict[str, Any] = values | change
    assert semantic_values(RewardSettings(**values)) != semantic_values(RewardSettings(**other))
