"""Ask all nodes of a cluster what a worker group needs of them."""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.cluster.probe import MEET_SECONDS, Facts, Probe, facts
from rlhf.errors import shortened

START_SECONDS = 120.0
"""How long a node may take to start a process."""
ANSWER_SECONDS = 60.0
LONGEST = 200
"""Characters of an error of others."""


@dataclass(frozen=True)
class Link:
    """What two nodes measured together, or why they could not."""

    first: str
    second: str
    backend: str
    bytes_per_second: float = 0.0
    """Of an all-reduce of a large tensor."""
    seconds: float = 0.0
    """Of an all-reduce of one number."""
    problem: str = ""


@dataclass
class Survey:
    """What the nodes answered, by their names."""

    driver: Facts
    nodes: dict[str, Facts] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    """Nodes on which no process of ours starts, with the error."""
    store: str = ""
    """The folder that all should see."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Nodes that do not see or cannot write the store's folder, and how that shows."""
    clocks: dict[str, float] = field(default_factory=dict)
    """Seconds by which a node's clock is ahead of the driver's."""
    unreachable: list[tuple[str, str, str]] = field(default_factory=list)
    """From, to, and the error."""
    links: list[Link] = field(default_factory=list)

    def documents(self) -> list[dict[str, Any]]:
        """Return each node as JSON values, those that do not answer with their ``problem`` alone."""
        answered = [
            {"node": name, "clock_seconds": self.clocks.get(name), "problem": self.unseen.get(name, "")} | asdict(here)
            for name, here in self.nodes.items()
        ]
        return answered + [{"node": name, "problem": problem} for name, problem in self.silent.items()]


def survey(store: Path, say: Callable[[str], None]) -> Survey:
    """Ask all nodes of the cluster that this process is attached to.

    store  the store's folder, absolute
    say    called with what is done next
    """
    result = Survey(facts(), store=str(store))
    say("starting a process on every node")
    probes, ports = _start(result)
    say(f"asking {len(probes)} nodes for their clocks and the store")
    _compare_clocks(result, probes)
    _look_at_store(result, probes)
    say("connecting every node to all others")
    _connect(result, probes, ports)
    rounds = pairings(list(probes))
    for number, pairs in enumerate(rounds, 1):
        say(f"measuring all-reduce between pairs of nodes, {number} of {len(rounds)}")
        result.links += _measure(result, probes, pairs)
    result.links.sort(key=lambda link: (link.first, link.second))
    return result


def _start(result: Survey) -> tuple[dict[str, Any], dict[str, int]]:
    """Start a probe on every node; return the probes that answer, and their ports."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    often = Counter(node["NodeManagerHostname"] for node in alive)
    actor, started = ray.remote(num_cpus=0)(Probe), dict[str, Any]()
    for node in sorted(alive, key=lambda node: (node["NodeManagerHostname"], node["NodeID"])):
        host = node["NodeManagerHostname"]
        name = host if often[host] == 1 else f"{host} {node['NodeID'][:6]}"
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        started[name] = actor.options(scheduling_strategy=there).remote()
    calls = {name: probe.facts.remote() for name, probe in started.items()}
    answers, result.silent = _answers(calls, START_SECONDS)
    result.nodes = {name: answer[0] for name, answer in answers.items()}
    return {name: started[name] for name in answers}, {name: answer[1] for name, answer in answers.items()}


def _answers(calls: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> tuple[dict[str, Any], dict[str, str]]:
    """Wait for calls; return the answers, and the errors of those that failed or did not answer in time."""
    import ray

    answers: dict[str, Any] = {}
    errors: dict[str, str] = {}
    end = time.monotonic() + seconds
    for name, call in calls.items():
        try:
            answers[name] = ray.get(call, timeout=max(0.0, end - time.monotonic()))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this node's finding
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            errors[name] = shortened(lines[-1], LONGEST) if lines else f"no answer within {seconds:g} s"
    return answers, errors


def _compare_clocks(result: Survey, probes: Mapping[str, Any]) -> None:
    """Of several questions to a node, that with the shortest way tells its clock best."""
    for name, probe in probes.items():
        trips: list[tuple[float, float]] = []
        for _ in range(3):
            before = time.time()
            answers, _ = _answers({name: probe.clock.remote()})
            after = time.time()
            trips += [(after - before, there - (before + after) / 2) for there in answers.values()]
        if trips:
            result.clocks[name] = min(trips)[1]


def _look_at_store(result: Survey, probes: Mapping[str, Any]) -> None:
    """Let every node write a file and read those of all others."""
    token = secrets.token_hex(8)
    files = {name: f".rlhf-doctor-{token}-{number}" for number, name in enumerate(probes)}
    try:
        written, errors = _answers({name: probes[name].write.remote(result.store, files[name]) for name in probes})
        result.unseen = errors | {name: error for name, error in written.items() if error}
        by_file = {files[name]: name for name in probes if name not in result.unseen}
        calls = {name: probes[name].unseen.remote(result.store, list(by_file)) for name in by_file.values()}
        answers, errors = _answers(calls)
        result.unseen |= errors
        most = Counter(tuple(missing) for missing in answers.values()).most_common(1)
        for name, missing in answers.items():
            if missing and (tuple(missing) != most[0][0] or len(answers) == 2):
                others = ", ".join(by_file[file] for file in missing)
                result.unseen[name] = f"another folder than that of {others}"
    finally:
        _answers({name: probes[name].remove.remote(result.store, files[name]) for name in probes})


def _connect(result: Survey, probes: Mapping[str, Any], ports: Mapping[str, int]) -> None:
    places = {name: (result.nodes[name].address, ports[name]) for name in probes}
    calls = {name: probe.unreachable.remote(list(places.values())) for name, probe in probes.items()}
    answers, _ = _answers(calls, ANSWER_SECONDS + len(probes))
    for name, errors in answers.items():
        result.unreachable += [(name, other, error) for other, error in zip(places, errors, strict=True) if error]


def pairings(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return rounds in which each node is in one pair, so that all pairs come once: a round-robin tournament."""
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    rounds: list[list[tuple[str, str]]] = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(first, second) for first, second in pairs if first is not None and second is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _measure(result: Survey, probes: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[Link]:
    """Measure pairs of nodes at once, none of which is in two."""
    apart = {(first, second) for first, second, _ in result.unreachable}
    without = {name for name, here in result.nodes.items() if here.missing_interfaces}
    pairs = [pair for pair in pairs if not {pair, pair[::-1]} & apart and not without & {*pair}]
    gpu = {(one, two): bool(result.nodes[one].gpus and result.nodes[two].gpus) for one, two in pairs}
    meetings, errors = _answers({one: probes[one].host_meeting.remote() for one, _ in pairs})
    calls: dict[str, Any] = {}
    for one, two in pairs:
        if one in meetings:
            meeting = (result.nodes[one].address, meetings[one], gpu[one, two])
            calls |= {one: probes[one].all_reduce.remote(0, *meeting), two: probes[two].all_reduce.remote(1, *meeting)}
    answers, more = _answers(calls, 2 * MEET_SECONDS + ANSWER_SECONDS)
    errors |= more
    return [
        Link(one, two, "NCCL" if gpu[one, two] else "Gloo", *answers.get(one, ()))
        if one in answers and two in answers
        else Link(one, two, "NCCL" if gpu[one, two] else "Gloo", problem=errors.get(one) or errors[two])
        for one, two in pairs
    ]
