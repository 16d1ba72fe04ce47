import pytest

from rlhf.errors import size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (49_900_000, "49.9 MB"),
        (999_999_999, "1000.0 MB"),
        (10**9, "1.0 GB"),
        (2.5e12, "2500.0 GB"),
    ],
)
def test_a_size_is_never_shown_as_nothing_of_a_unit(count: float, text: str):
    """What is less than a GB is in MB, and so on down: 0.0 GB would tell nothing."""
    assert size(count) == text
