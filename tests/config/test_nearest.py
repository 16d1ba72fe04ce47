import pytest

from rlhf.config.base import FEW, nearest, suggestion

NAMES = ["learning_rate", "batch_size", "max_length", "kl"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("learning-rate", "learning_rate"), ("Batch_Size", "batch_size"), ("max_len", "max_length"), ("zebra", None)],
)
def test_the_nearest_name_is_the_one_meant(written: str, meant: str | None) -> None:
    """Case and hyphens do not matter; what is like nothing gets no guess."""
    assert nearest(written, NAMES) == meant


def test_all_names_are_listed_where_they_are_few() -> None:
    """A long list says less than the guess alone."""
    assert suggestion("kll", ["kl", "coef"]) == "did you mean kl? known: coef, kl"
    assert suggestion("name1x", [f"name{i}" for i in range(FEW + 1)]) == "did you mean name1?"
    assert suggestion("zebra", [f"name{i}" for i in range(FEW + 1)]) == ""
