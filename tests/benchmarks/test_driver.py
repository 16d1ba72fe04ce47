"""The driver's work for each stage does not grow with their number."""

from benchmarks.driver import simulate


def test_requests_of_a_stage_do_not_grow_with_the_number_of_stages() -> None:
    """Stages that have not changed are not looked at whenever another ends."""
    few, many = simulate(15, 0.0, 0.01, nodes=2), simulate(45, 0.0, 0.01, nodes=2)
    assert many["requests_a_stage"] < 1.1 * few["requests_a_stage"]
    assert many["requests_a_cached_stage"] < 1.1 * few["requests_a_cached_stage"]
