"""Judge what the nodes of a cluster answered: what must agree between them, and what they reach of each other.

A finding is what ``rlhf doctor`` prints as a line: ``name``, ``ok``, the value ``found``, and what to do ``next``.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.cluster.survey import Link, Survey

DRIVER = "the driver"
CLOCK_SECONDS = 1.0
"""A larger difference puts the failures of ranks, and so their causes, in the wrong order."""
SLOW = 0.5
"""A pair of nodes with less than this share of the median bandwidth is slow."""
FEW = 10
"""So many names or pairs are shown each; of more, only those with a problem."""
Finding = dict[str, Any]
_INSTALL = "install the same on all: `make setup` in a folder that all mount, and Ray started from its .venv"


def findings(survey: Survey) -> list[Finding]:
    """Return every check of a cluster."""
    if not survey.nodes:
        return [_silent(survey)]
    everywhere = survey.nodes | {DRIVER: survey.driver}
    code = {name: facts.code for name, facts in everywhere.items()}
    return [
        _silent(survey),
        _agreeing("python", {name: facts.python for name, facts in everywhere.items()}, _INSTALL),
        *_packages(survey),
        _agreeing("code", code, "check out the same commit of this project on all nodes"),
        _store(survey),
        _clock(survey),
        _network(survey),
        _ports(survey),
        *_links(survey.links),
        _gpus(survey),
    ]


def _finding(name: str, found: str, then: str = "") -> Finding:
    """Return a finding that is bad if there is something to do."""
    return {"name": name, "ok": not then, "found": found, "next": then}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= FEW else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _by_value(values: Mapping[str, str]) -> str:
    """Return ``value on nodes; value on nodes``, the most frequent value first."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "; ".join(f"{value} on {_listed(names)}" for value, names in largest_first)


def _agreeing(name: str, values: Mapping[str, str], then: str) -> Finding:
    """Judge a value that must be the same on all nodes and for the driver."""
    if len(set(values.values())) == 1:
        return _finding(name, f"{next(iter(values.values()))} everywhere")
    return _finding(name, _by_value(values), then)


def _silent(survey: Survey) -> Finding:
    names = _listed(list(survey.nodes))
    if not survey.silent:
        return _finding("nodes", f"{len(survey.nodes)}: {names}")
    problems = "; ".join(f"{name}: {error}" for name, error in survey.silent.items())
    then = "make this project importable by the Python that started Ray there, or stop Ray there (`ray stop`)"
    return _finding("nodes", f"{len(survey.nodes)} answer ({names}); no process of ours starts on {problems}", then)


def _packages(survey: Survey) -> list[Finding]:
    """Judge the versions of all packages that two nodes have in different versions, or one of them not at all."""
    packages = {name: facts.packages for name, facts in (survey.nodes | {DRIVER: survey.driver}).items()}
    different = [
        package
        for package in sorted(set[str]().union(*packages.values()))
        if len({versions.get(package) for versions in packages.values()}) > 1
    ]
    if not different:
        return [_finding("packages", f"{len(survey.driver.packages)}, the same everywhere")]
    return [
        _finding(package, _by_value({name: here.get(package, "none") for name, here in packages.items()}), _INSTALL)
        for package in different
    ]


def _store(survey: Survey) -> Finding:
    if not survey.unseen:
        return _finding("store", f"{survey.store}: every node reads what the others write there")
    problems = "; ".join(f"{name}: {problem}" for name, problem in survey.unseen.items())
    then = "put store.uri (for a bucket store.scratch) on a file system that every node mounts at the same place"
    return _finding("store", f"{survey.store} is not the same folder on all nodes: {problems}", then)


def _clock(survey: Survey) -> Finding:
    ahead = survey.clocks | {DRIVER: 0.0}
    first, last = max(ahead, key=ahead.__getitem__), min(ahead, key=ahead.__getitem__)
    apart = ahead[first] - ahead[last]
    if apart <= CLOCK_SECONDS:
        return _finding("clock", f"at most {1000 * apart:.0f} ms apart")
    what = f"that of {first} is {apart:.1f} s ahead of that of {last}"
    return _finding("clock", what, "synchronise the clocks of all nodes (chrony, ntpd)")


def _network(survey: Survey) -> Finding:
    """Judge the interfaces that collectives use, and those that variables name."""
    for name, facts in survey.nodes.items():
        for variable, interface in facts.missing_interfaces:
            what = f"{variable} names {interface}, and {name} has no such network interface"
            return _finding("network", what, f"unset {variable}, or name an interface that every node has")
    here = {name: f"{facts.interface} ({facts.address})" for name, facts in survey.nodes.items()}
    start = "start Ray there with --node-ip-address, an address of the node that all others reach"
    if unknown := [name for name, facts in survey.nodes.items() if facts.interface is None]:
        name = unknown[0]
        what = f"Ray knows {name} by {survey.nodes[name].address}, which none of its interfaces has"
        return _finding("network", what, start)
    loopback = [name for name, facts in survey.nodes.items() if facts.address.startswith("127.")]
    if loopback and len(survey.nodes) > 1:
        return _finding("network", f"Ray knows {loopback[0]} by an address that only {loopback[0]} reaches", start)
    return _finding("network", _by_value({name: here[name] for name in list(here)[:FEW]}))


def _ports(survey: Survey) -> Finding:
    count = len(survey.nodes)
    if not survey.unreachable:
        return _finding("ports", "every node reaches all others" if count > 1 else "one node alone")
    problems = [f"{first} does not reach {second} ({error})" for first, second, error in survey.unreachable]
    more = f"; {len(problems) - FEW} more" if len(problems) > FEW else ""
    then = "allow TCP on all ports between the nodes: ranks meet at ports that the system chooses"
    return _finding("ports", "; ".join(problems[:FEW]) + more, then)


def _links(links: Sequence[Link]) -> list[Finding]:
    """Judge the bandwidth between pairs; of many pairs show the extremes and those with a problem."""
    speeds = [link.bytes_per_second for link in links if not link.problem]
    middle = statistics.median(speeds) if speeds else 0.0
    found: list[Finding] = []
    for link in links:
        name, then = f"all-reduce {link.first} – {link.second}", ""
        what = f"{_rate(link.bytes_per_second)}, {1000 * link.seconds:.2f} ms for one number ({link.backend})"
        if link.problem:
            what = f"failed through {link.backend}: {link.problem}"
            then = "name the network interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, in the driver's environment"
        elif link.bytes_per_second < SLOW * middle:
            what += f", and {_rate(middle)} in the middle of all pairs"
            then = "look at the network interface, cable and switch of the two: a group is as slow as its slowest pair"
        if then or len(links) <= FEW:
            found.append(_finding(name, what, then))
    if speeds and len(links) > FEW:
        what = f"{_rate(min(speeds))} to {_rate(max(speeds))}, {_rate(middle)} in the middle of {len(links)} pairs"
        found.append(_finding("all-reduce", what))
    return found


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def _gpus(survey: Survey) -> Finding:
    kinds = sorted({gpu for facts in survey.nodes.values() for gpu in facts.gpus})
    if not kinds:
        return _finding("gpus", "none on any node: everything runs on CPUs")
    counts = {name: f"{len(facts.gpus)}" for name, facts in survey.nodes.items()}
    if len(kinds) == 1:
        return _finding("gpus", f"{kinds[0]}: {_by_value(counts)}")
    types = {name: " and ".join(sorted(set(facts.gpus))) or "none" for name, facts in survey.nodes.items()}
    then = "take nodes of one type into a cluster: ranks wait for the slowest, and memory is that of the smallest"
    return _finding("gpus", _by_value(types), then)
