"""The program over real HTTP, and killed."""

import resource
import signal
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.collect.collection import read_sets
from tests.collect.program import Program, Visitor, read_lines, running, visiting, write_rows

ROWS = [
    {"prompt": f"p{number}", "responses": ["a", "b", "c"], "models": ["secret-x", "secret-y", "secret-z"]}
    for number in range(3)
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[Program]:
    """A program for tests that leave no answer behind."""
    folder = tmp_path_factory.mktemp("served")
    with running(write_rows(folder / "sets.jsonl", ROWS), folder / "out.jsonl") as program:
        yield program


def test_annotators_rank_everything_independently_and_ctrl_c_writes_the_result(tmp_path: Path):
    """To the end, with a change of mind; the page hears of no model, and the program ends with status 0."""
    sets, out = write_rows(tmp_path / "sets.jsonl", ROWS), tmp_path / "out.jsonl"
    with running(sets, out, "--port", "0", "--annotator", "ann b") as program:
        assert program.address.endswith("/?annotator=ann+b")
        with visiting(program, "ann b", "bob") as (ann, bob):
            assert "secret" not in ann.client.get(program.address).text + str(ann.task())
            first = ann.task()["row"]
            ann.rank(["a", "b", "c"])
            bob.rank([["c", "b"], "a"])
            assert ann.post(ann.task()["row"], None).status_code == 200
            ann.rank(["c", "a", "b"])
            end = ann.task()
            assert end["row"] is None
            assert end["progress"] == {"done": 2, "skipped": 1, "left": 0}
            assert bob.task()["progress"] == {"done": 1, "skipped": 0, "left": 2}
            again = ann.task(first)
            assert again["sequence"] == 1
            best_first = [again["responses"].index(text) for text in ("b", "a", "c")]
            assert ann.post(first, best_first, replaces=1).status_code == 200
        status, told, err = program.end()
    assert (status, err) == (0, "")
    assert f"wrote {out}; rows: 2 ranked, rankings: 3, annotators: 2" in told
    assert f"data.comparisons={out}" in told
    assert read_lines(out) == [
        ROWS[0] | {"rankings": [[1, 0, 2], [[1, 2], 0]], "annotators": ["ann b", "bob"]},
        ROWS[2] | {"rankings": [[2, 0, 1]], "annotators": ["ann b"]},
    ]


def test_what_does_not_come_from_the_page_is_refused(served: Program):
    """Another site's request, another name for this machine, another form, another size."""
    with visiting(served, "mallory") as (visitor,):
        row = visitor.task()["row"]
        foreign = {"Origin": "http://evil.example"}
        for headers, status in (
            (foreign, 403),
            ({"Origin": "null"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Host": f"evil.example:{served.port}", "Origin": f"http://evil.example:{served.port}"}, 403),
            ({"X-Project": "another"}, 412),
            ({"Content-Type": "text/plain"}, 415),
        ):
            answer = visitor.post(row, [0, 1, 2], headers=headers)
            assert (answer.status_code, bool(answer.json()["error"])) == (status, True), headers
        del visitor.client.headers["Origin"]
        assert visitor.post(row, [0, 1, 2]).status_code == 403
        for path in ("/", "/api/task?annotator=x"):
            assert visitor.client.get(path, headers={"Host": "evil.example"}).status_code == 403
            # A tunnel's near end may have another port.
            assert visitor.client.get(path, headers={"Host": "localhost:1234"}).status_code == 200
        assert visitor.client.get("/etc/passwd").status_code == 404
    assert served.journal.read_text() == ""


def test_what_is_no_answer_is_refused_with_a_sentence(served: Program):
    """A ranking of something else, a row that is not there, no name, and a body beyond all bounds."""
    with visiting(served, "mallory", " ") as (visitor, nobody):
        row = visitor.task()["row"]
        cases: list[tuple[Any, int]] = [([0, 1], 400), ([0, 1, 5], 400), ([0, True, 2], 400), ("abc", 400)]
        for ranking, status in cases:
            assert visitor.post(row, ranking).status_code == status, ranking
        assert visitor.post("nowhere", [0, 1, 2]).status_code == 404
        assert visitor.post(row, [0] * 100_000).status_code == 413
        assert "a name is needed" in nobody.post(row, [0, 1, 2]).json()["error"]
        assert nobody.client.get("/api/task", params={"annotator": " "}).status_code == 400
        assert visitor.client.get("/api/task", params={"annotator": "x", "row": "nowhere"}).status_code == 404
        assert visitor.post(row, [2, 1, 0], replaces=7).status_code == 409
    assert served.journal.read_text() == ""


def test_the_page_may_load_and_run_nothing_but_itself(served: Program):
    """A policy that names the page's own script and style by their digests, and no address outside in the page."""
    answer = httpx.get(served.address, trust_env=False)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert answer.headers["Cache-Control"] == "no-store"


def test_an_address_for_others_needs_its_token(tmp_path: Path):
    """For the page, for rows and for answers; whatever the machine is called."""
    sets = write_rows(tmp_path / "sets.jsonl", ROWS)
    with running(sets, tmp_path / "out.jsonl", "--host", "0.0.0.0", "--port", "0") as program:
        token = httpx.URL(program.address).params["token"]
        assert len(token) >= 32
        assert "not encrypted" in program.told
        program.address = f"http://127.0.0.1:{program.port}/?token={token}"
        with visiting(program, "ann") as (ann,):
            assert ann.client.get("/").status_code == 403
            assert ann.client.get("/?token=wrong").status_code == 403
            assert ann.client.get("/api/task?annotator=ann").status_code == 403
            ann.client.headers["Authorization"] = f"Bearer {token}"
            row = ann.task()["row"]
            assert ann.post(row, [0, 1, 2], headers={"Authorization": "Bearer wrong"}).status_code == 403
            assert ann.post(row, [0, 1, 2]).status_code == 200


def test_a_second_program_on_the_same_result_and_a_taken_port_are_refused(served: Program, tmp_path: Path):
    """With what to do instead; --export-only of a result in use too."""
    sets = served.out.with_name("sets.jsonl")
    for options in ((), ("--export-only",)):
        with pytest.raises(AssertionError, match="another rlhf annotate keeps its answers"):
            Program(sets, served.out, "--port", "0", *options)
    with pytest.raises(AssertionError, match=rf"port {served.port} is taken") as caught:
        Program(sets, tmp_path / "out.jsonl", "--port", str(served.port))
    assert "next:  --port " in str(caught.value)
    with pytest.raises(AssertionError, match="the page cannot be served at 192"):
        Program(sets, tmp_path / "out.jsonl", "--host", "192.0.2.1", "--port", "0")


def test_an_answer_for_which_there_is_no_room_is_not_acknowledged_and_may_be_sent_again(tmp_path: Path):
    """The journal may not grow for a while; then everything goes on."""
    sets = write_rows(tmp_path / "sets.jsonl", ROWS)
    with running(sets, tmp_path / "out.jsonl") as program, visiting(program, "ann") as (ann,):
        ann.rank(["a", "b", "c"])
        row, size = ann.task()["row"], program.journal.stat().st_size
        limits = resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
        refused = ann.post(row, [0, 1, 2])
        assert (refused.status_code, "could not be written" in refused.json()["error"]) == (503, True)
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, limits)
        assert ann.post(row, [0, 1, 2]).json() == {"sequence": 2}
        assert [one["sequence"] for one in read_lines(program.journal)] == [1, 2]


def test_nothing_acknowledged_is_lost_when_the_program_is_killed_in_mid_work(tmp_path: Path):
    """Three annotators at once; kill -9 after a while, twice; each goes on where it was, and the result has it all."""
    rows = [{"prompt": f"p{number}", "responses": ["a", "b"]} for number in range(400)]
    sets, out = write_rows(tmp_path / "sets.jsonl", rows), tmp_path / "out.jsonl"
    names = list(read_sets(str(sets)))
    acknowledged: dict[tuple[str, str], bool] = {}

    def work(visitor: Visitor) -> None:
        # Until the program is gone: then a request fails.
        try:
            while (task := visitor.task())["row"]:
                ranking = None if names.index(task["row"]) % 5 == 0 else [0, 1]
                if visitor.post(task["row"], ranking).status_code == 200:
                    acknowledged[visitor.annotator, task["row"]] = ranking is None
        except httpx.TransportError:
            pass

    for round_ in (1, 2):
        with running(sets, out) as program, visiting(program, "ann", "bob", "cy") as visitors:
            for visitor in visitors:
                already = [row for name, row in acknowledged if name == visitor.annotator]
                # One more may have been written than was acknowledged.
                assert visitor.task()["progress"]["left"] in (len(rows) - len(already), len(rows) - len(already) - 1)
            threads = [threading.Thread(target=work, args=(visitor,)) for visitor in visitors]
            for thread in threads:
                thread.start()
            before = len(acknowledged)
            while len(acknowledged) < before + 60:
                threads[0].join(0.002)
            assert program.end(signal.SIGKILL)[0] == -signal.SIGKILL
            for thread in threads:
                thread.join()
        assert len(acknowledged) >= 60 * round_
    # As a machine that died in the middle of a line would leave it.
    journal = out.with_suffix(".answers.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"sequence": 9')
    with running(sets, out) as program:
        status, _, err = program.end(signal.SIGTERM)
    assert status == 0
    assert "the last line was cut off" in err
    found = {(one["annotator"], one["row"]): one["skipped"] for one in read_lines(journal)}
    assert found.items() >= acknowledged.items()
    assert len(found) - len(acknowledged) <= 6
    ranked = {(name, one["prompt"]) for one in read_lines(out) for name in one["annotators"]}
    assert ranked == {(name, f"p{names.index(row)}") for (name, row), skipped in found.items() if not skipped}
