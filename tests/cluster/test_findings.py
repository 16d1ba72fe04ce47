"""What `rlhf doctor --cluster` makes of the nodes' answers."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from rlhf.cluster.findings import findings
from rlhf.cluster.probe import Facts
from rlhf.cluster.survey import Link, Survey, pairings

NODE = Facts("a", "3.11.7", "/venv/bin/python", {"torch": "2.13.0", "ray": "2.60.0"}, "c0de", 8, ())


def well(count: int = 3) -> Survey:
    """A cluster without a fault."""
    names = [chr(ord("a") + number) for number in range(count)]
    nodes = {name: replace(NODE, host=name, address=f"10.0.0.{ord(name)}", interface="eth0") for name in names}
    links = [Link(one, two, "Gloo", 1e9, 1e-4) for one, two in combinations(names, 2)]
    return Survey(NODE, nodes, store="/store", clocks=dict.fromkeys(names, 0.01), links=links)


def bad(survey: Survey) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in findings(survey) if not finding["ok"]}


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_a_cluster_without_a_fault_needs_no_advice(count: int):
    entries = findings(well(count))
    assert all(entry["ok"] and not entry["next"] for entry in entries)
    assert [set(entry) for entry in entries] == [{"name", "ok", "found", "next"}] * len(entries)
    assert len(entries) < 20, "pairs are listed while they are few"


def change(survey: Survey, name: str, **facts: Any) -> Survey:
    survey.nodes[name] = replace(survey.nodes[name], **facts)
    return survey


def driver(survey: Survey) -> Survey:
    survey.driver = replace(NODE, code="0ther")
    return survey


def of(survey: Survey, **values: Any) -> Survey:
    return replace(survey, **values)


@pytest.mark.parametrize(
    ("survey", "name", "found"),
    [
        (change(well(), "c", python="3.12.1"), "python", "3.11.7 on a, b, the driver; 3.12.1 on c"),
        (change(well(), "b", packages={**NODE.packages, "torch": "2.12.0"}), "torch", "2.12.0 on b"),
        (change(well(), "b", packages={"torch": "2.13.0"}), "ray", "none on b"),
        (driver(well()), "code", "0ther on the driver"),
        (of(well(), unseen={"b": "No such file or directory"}), "store", "b: No such file or directory"),
        (of(well(), clocks={"a": 0.0, "b": -90.0}), "clock", "ahead of that of b"),
        (
            change(well(), "c", missing_interfaces=(("NCCL_SOCKET_IFNAME", "ib9"),)),
            "network",
            "names ib9, and c has no",
        ),
        (change(well(), "c", interface=None), "network", "Ray knows c by 10.0.0.99, which none"),
        (change(well(), "c", address="127.0.0.1"), "network", "an address that only c reaches"),
        (of(well(), unreachable=[("a", "c", "timed out")]), "ports", "a does not reach c (timed out)"),
        (of(well(), links=[Link("a", "b", "NCCL", problem="no route")]), "all-reduce a – b", "failed through NCCL"),
        (of(well(), silent={"z": "No module named 'rlhf'"}), "nodes", "z: No module named 'rlhf'"),
        (of(well(), nodes={}, silent={"z": "No module named 'rlhf'"}), "nodes", "z: No module named 'rlhf'"),
        (change(change(well(), "a", gpus=("A100",)), "b", gpus=("H200",)), "gpus", "A100 on a; H200 on b; none on c"),
    ],
)
def test_every_fault_is_named_with_its_node_and_a_way_out(survey: Survey, name: str, found: str):
    """And nothing else is blamed for it."""
    (entry,) = bad(survey).values()
    assert entry["name"] == name
    assert found in entry["found"]
    assert entry["next"]


def test_a_pair_much_slower_than_the_others_is_found_among_many():
    survey = well(8)
    slow = [
        replace(link, bytes_per_second=3e8) if link.second == "h" and link.first == "a" else link
        for link in survey.links
    ]
    assert list(bad(of(survey, links=slow))) == ["all-reduce a – h"]
    assert "1.00 GB/s in the middle" in bad(of(survey, links=slow))["all-reduce a – h"]["found"]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_pairs_meet_once_and_no_node_is_in_two_at_a_time(count: int):
    names = [str(number) for number in range(count)]
    rounds = pairings(names)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
    assert all(len({name for pair in pairs for name in pair}) == 2 * len(pairs) for pairs in rounds)
