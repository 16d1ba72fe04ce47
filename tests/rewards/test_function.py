from pathlib import Path

import pytest

from rlhf.errors import PreflightError, RewardError
from rlhf.rewards import FunctionReward, load_function

FILE = Path(__file__).parent / "functions.py"
PROMPTS, RESPONSES = ["a", "b", "c"], ["x", "yy", ""]


def test_a_function_scores_in_the_order_of_the_responses() -> None:
    """Whole numbers and numpy's are numbers too; what comes out are Python's floats."""
    assert FunctionReward(f"{FILE}:lengths")(PROMPTS, RESPONSES) == [1.0, 2.0, 0.0]
    scores = FunctionReward(f"{FILE}:numbers")(PROMPTS, RESPONSES)
    assert scores == [0.0, 1.0, 2.0]
    assert {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "OddError: odd: 1, 2"),
        ("exits", "SystemExit: 3"),
        ("interrupts", "KeyboardInterrupt: "),
        ("raises_what_cannot_be_shown", "raised Unshowable"),
        ("yields_and_raises", "OddError: odd: 1, 2"),
        ("one_short", "2 scores for 3 responses"),
        ("nothing", "answered NoneType, and no list"),
        ("text", "answered str, and no list"),
        ("nan_second", "response 1 is nan"),
        ("text_second", "response 1 is '1'"),
        ("bool_second", "response 1 is True"),
        ("none_second", "response 1 is None"),
        ("huge_second", "response 1 is 1000"),
    ],
)
def test_a_function_that_does_not_score_is_told_of_by_name_and_row(name: str, said: str) -> None:
    """No score is made up in place of a bad one."""
    with pytest.raises(RewardError) as caught:
        FunctionReward(f"{FILE}:{name}")(PROMPTS, RESPONSES)
    assert said in caught.value.what
    assert len(caught.value.what) < 400
    assert caught.value.where == f"{FILE}:{name}, {'row 1' if name.endswith('second') else 'rows 0 to 2'}"


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent", "no function absent"), ("no_function", "no function"), ("takes_one", "cannot be called")],
)
def test_what_is_no_reward_function_is_refused_when_it_is_loaded(name: str, said: str) -> None:
    """Before anything was generated."""
    with pytest.raises(PreflightError, match=said):
        load_function(f"{FILE}:{name}")


@pytest.mark.parametrize(
    ("content", "said"),
    [("def f(:", "SyntaxError"), ("import nothing_at_all", "nothing_at_all"), ("exit(1)", "SystemExit")],
)
def test_a_file_that_cannot_be_imported_is_refused_with_the_reason(tmp_path: Path, content: str, said: str) -> None:
    """A file that is not there is refused likewise."""
    (file := tmp_path / "mine.py").write_text(content)
    with pytest.raises(PreflightError, match=said):
        load_function(f"{file}:f")
    with pytest.raises(PreflightError, match="there is no file"):
        load_function(f"{tmp_path / 'gone.py'}:f")


def test_two_files_of_one_name_are_two_rewards(tmp_path: Path) -> None:
    """Neither is taken for the other, nor for an installed module."""
    for number in (1, 2):
        (folder := tmp_path / str(number)).mkdir()
        (folder / "json.py").write_text(f"def f(prompts, responses):\n    return [{number}] * len(responses)\n")
    one, two = (FunctionReward(f"{tmp_path / number / 'json.py'}:f") for number in ("1", "2"))
    assert (one(PROMPTS, RESPONSES), two(PROMPTS, RESPONSES)) == ([1.0] * 3, [2.0] * 3)
