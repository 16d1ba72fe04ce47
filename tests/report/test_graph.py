"""The graph of a pipeline, whatever its shape."""

from hypothesis import given
from hypothesis import strategies as st

from rlhf.report.graph import connections, layers
from rlhf.report.sections import alarm_stretches


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, list[str]]:
    """Return each stage's sources, among the stages before it."""
    count = draw(st.integers(1, 9))
    return {
        f"s{n}": draw(st.lists(st.sampled_from([f"s{m}" for m in range(n)]), unique=True)) if n else []
        for n in range(count)
    }


@given(pipelines())
def test_every_connection_goes_right_by_one_column_at_a_time(sources: dict[str, list[str]]) -> None:
    """From its source to the stage that it feeds; only lanes lie between, and each item has one place."""
    columns = layers(sources)
    items = [item for column in columns for item in column]
    assert len(items) == len(set(items))
    assert {item for item in items if "/" not in item} == {*sources}
    column_of = {item: number for number, column in enumerate(columns) for item in column}
    paths = connections(sources, columns)
    assert sorted((path[0], path[-1]) for path in paths) == sorted(
        (one, name) for name in sources for one in sources[name]
    )
    for path in paths:
        places = [column_of[item] for item in path]
        assert places == list(range(places[0], places[0] + len(path)))
        assert all(lane.startswith(f"{path[0]}/") for lane in path[1:-1])
    assert all(any(item in path for path in paths) for item in items if "/" in item)


def test_alarms_are_told_by_unbroken_stretches() -> None:
    """A pause ends one; other alarms are others; a step without the metric has no alarm."""
    raised = {"alarm/kl": (1, 2, 5), "alarm/eos": (2,), "alarm/none": ()}
    rows = [{"step": step} | {name: float(step in steps) for name, steps in raised.items()} for step in range(1, 6)]
    del rows[1]["alarm/eos"]
    found = alarm_stretches([*rows, {"step": 6}], {"kl": "far away"})
    assert [(one["alarm"], one["from"], one["to"], one["text"]) for one in found] == [
        ("kl", 1, 2, "far away"),
        ("kl", 5, 5, "far away"),
    ]
