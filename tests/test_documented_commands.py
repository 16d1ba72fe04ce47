"""Every command in the documents is run here, or run by a test that is named, or listed with what it needs."""

import io
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf.cli.main import COMMANDS, main, parser_of
from rlhf.cluster import worker_group
from rlhf.cluster.session import Resources, Session
from rlhf.cluster.worker import Call, perform
from rlhf.config.pipeline import load_pipeline, resolved
from rlhf.config.yaml_tree import to_yaml
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.stage import stages
from rlhf.pipeline.transfer import export_artifact
from tests import accelerator
from tests.small import TINY, Pipeline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, *sorted((ROOT / "examples").iterdir())]

PROGRAMS = (
    "rlhf|make|python3?|pip|uv|ray|curl|wget|ssh|git|cd|cp|mkdir|sh|bash|sudo|apt-get|export|tensorboard|mlflow|trackio|"
    "sbatch|srun|kubectl|docker|buildah|sky|hf|vllm|llama-server|pytest"
)
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:{PROGRAMS})(?: .*)?")

ELSEWHERE = {
    "make demo|rlhf demo$": "cli/test_demo.py::test_the_demo_learns_and_shows_it",
    "make wheel|pip install rlhf_pipeline-": "test_wheel.py::test_an_empty_folder_is_enough",
    "rlhf init$": "cli/test_init.py::test_at_a_terminal_it_asks_until_the_answers_fit",
    "rlhf dashboard$": "cli/test_dashboard.py::test_with_a_key_the_view_begins_with_reward_against_kl",
    "rlhf leaderboard$": "cli/test_leaderboard.py::test_models_come_in_the_order_of_what_people_prefer",
    "rlhf annotate ": "collect/test_server.py::"
    "test_annotators_rank_everything_independently_and_ctrl_c_writes_the_result",
    "rlhf compare .*--blind": "cli/test_talking.py::test_policies_are_compared_by_keys_and_saved",
    "rlhf run rm$": "stages/test_flywheel.py::"
    "test_what_models_wrote_is_ranked_by_people_and_the_models_by_what_they_said",
    "rlhf export ppo .*--gguf": "pipeline/test_transfer.py::test_gguf_is_what_llama_cpps_converter_writes",
    "rlhf export ppo .*--merge$": "pipeline/test_transfer.py::"
    "test_an_exported_adapter_is_the_trained_model_wherever_it_is_moved",
    "rlhf run store.uri=s3:": "pipeline/test_buckets.py::test_what_one_machine_made_is_cached_on_another",
    "rlhf doctor --cluster": "faults/test_hosts.py::test_the_doctor_finds_the_machine_without_the_store",
    "(export RAY_|ray start |RAY_ADDRESS=)": "faults/test_hosts.py::"
    "test_a_run_across_two_machines_outlives_one_of_them",
    "sbatch ": "faults/test_slurm.py::test_a_preempted_job_saves_is_requeued_and_goes_on",
}
"""What another test runs: how a command begins, and the test below ``tests/``."""

NOT_HERE = {
    "mkdir -p ~": "a folder in the reader's home",
    "(ssh|curl|export (PATH|AWS_)|hf upload) ?": "another machine or service, or the reader's own shell",
    "make setup|pip install 'rlhf-pipeline": "downloads gigabytes; CI begins with it",
    "make (check|test|chaos|matrix)": "these tests, or hours",
    r"make bench|python -m benchmarks\.": "minutes on a quiet machine, or a GPU",
    "(tensorboard|mlflow|TRACKIO_DIR=.*|vllm) ": "serves until it is stopped",
    "rlhf (plan|run) --config configs/cluster.yaml": "GPUs of several nodes",
    "rlhf doctor --config billion.yaml": "a GPU",
    "rlhf run ppo ppo.rollout.engine=vllm": "vLLM, which CI does not install",
    r"(RAY_API_SERVER_ADDRESS=\S+ )?sh examples/|kubectl |docker |sky ": "a cluster, a builder, a cloud",
}
"""What cannot be run where tests run: how a command begins, and what it needs. What it names is still checked."""


class Command(NamedTuple):
    """A line for a shell."""

    document: str
    line: str
    shown: tuple[str, ...] = ()
    """The lines below it, where the document shows what it prints."""


def blocks(path: Path) -> Iterator[list[str]]:
    """Yield the lines of each block of code of a page: indented, after an empty line. In an example it is a comment."""
    text = path.read_text()
    if path.suffix != ".md":
        text = re.sub("^# ?$", "", re.sub("^#   ", "    ", text, flags=re.MULTILINE), flags=re.MULTILINE)
    for block in re.findall(r"(?:(?<=\n\n)|^)(?: {4}.*\n|\n(?= {4}))+", text, re.MULTILINE):
        yield [line.removeprefix("    ") for line in block.splitlines()]


def command_in(line: str) -> str | None:
    """Return the command of a line without what is said beside it; None where it is none."""
    line = re.sub(r"(\s+# |\s{2,}).*", "", line.strip().removeprefix("$ "))
    return line.removeprefix(".venv/bin/") if COMMAND.fullmatch(line) else None


def commands() -> list[Command]:
    """Return the commands in tables and in blocks of code; in a block with a prompt the other lines are output."""
    found: list[Command] = []
    for document in DOCUMENTS:
        for block in blocks(document):
            block = [line.strip() for line in block]
            prompts = [number for number, line in enumerate(block) if line.startswith("$ ")]
            for number in prompts or range(len(block)):
                if line := command_in(block[number]):
                    end = next((later for later in prompts if later > number), len(block))
                    found.append(Command(document.name, line, tuple(block[number + 1 : end]) if prompts else ()))
        for row in re.findall(r"^\| .*", document.read_text(), re.MULTILINE):
            spans = [span for cell in row.split(" | ") for span in re.findall("^[| ]*`(.*?)`", cell)]
            found += [Command(document.name, line) for span in spans if " " in span and (line := command_in(span))]
    return list(dict.fromkeys(found))


def mentions() -> Iterator[Command]:
    """Yield the commands of this program in running text."""
    for page in PAGES:
        for line in re.findall(r"`((?:\.venv/bin/)?rlhf [a-z][^`]*)`", page.read_text()):
            yield Command(page.name, " ".join(line.removeprefix(".venv/bin/").split()))


def listed_in(table: dict[str, str], line: str) -> list[str]:
    return [beginning for beginning in table if re.match(beginning, line)]


def test_every_command_is_run_by_a_test_or_listed() -> None:
    """A command of another program than ours is in exactly one list, ours in one at most, and the tests are there."""
    lines = [command.line for command in commands()]
    assert len(lines) > 100
    for document, line, _ in commands():
        places = listed_in(ELSEWHERE, line) + listed_in(NOT_HERE, line)
        least = 0 if line.startswith("rlhf ") or goals(line) else 1
        assert least <= len(places) <= 1, f"{document}: {line}: {places or 'which test runs it?'}"
    for beginning, test in ELSEWHERE.items():
        assert listed_in({beginning: test}, "\n".join(lines)) or any(re.match(beginning, line) for line in lines), (
            beginning
        )
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
    for beginning in NOT_HERE:
        assert any(re.match(beginning, line) for line in lines), beginning


def test_commands_of_ours_are_read_by_their_parsers() -> None:
    """In running text too: commands and options exist, and settings, in the pipeline file that is named."""
    known = {name: stage.settings for name, stage in stages().items()}
    for document, line, _ in sorted({*commands(), *mentions()}):
        if not line.startswith("rlhf ") or line.startswith("rlhf --"):
            continue
        name, *words = words_of(line)
        place = f"{document}: {line}"
        assert name in COMMANDS, place
        arguments = parser_of(name).parse_intermixed_args(words)
        overrides = [word for word in arguments.words if "=" in word and not word.startswith("store.uri=/")]
        file = ROOT / arguments.config if "--config" in words else TINY
        # An example's is the reader's own.
        exists = file.exists() or file.name in ("billion.yaml", "FILE", "rlhf.yaml")
        assert exists, place
        load_pipeline(file if file.exists() else TINY, overrides, known)


def test_what_other_programs_are_given_is_there() -> None:
    """Goals of make, modules and options of the benchmarks, extras of the package, files of examples/."""
    benchmarks = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for _, line, _ in commands():
        if line.startswith("make "):
            subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=20)
        elif module := re.match(r"python -m (benchmarks\.\w+)", line):
            assert find_spec(module[1]) is not None, line
            for option in re.findall(r"--([\w-]+)", line):
                assert re.search(f'"(--)?{option}"|given\\.{option}\\b', benchmarks), line
        elif extra := re.search(r"rlhf-pipeline\[(\w+)\]", line):
            assert extra[1] in extras, line
        for file in re.findall(r"examples/[\w.-]+", line):
            assert (ROOT / file).exists(), line


@cache
def goals(line: str) -> list[str]:
    """Return what `make` with stages as its goals runs, as words of this program; else nothing."""
    if not re.match(r"make (sft|rm|ppo|grpo|rloo|dpo)\b", line):
        return []
    dry = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True, text=True)
    (ours,) = re.findall(r"^\S+/rlhf (run .*)", dry.stdout, re.MULTILINE)
    return shlex.split(ours)


def words_of(line: str) -> list[str]:
    """Return the words of a command for this program, without a redirection and variables."""
    return goals(line) or shlex.split(line.split(" > ")[0].partition("rlhf ")[2])


GROUP = "{iterations: 1, rollouts: 8, sampling: {max_new_tokens: 8}, max_prompt_length: 128, micro_batch_size: 8}"
SIZES = (
    *("ppo.iterations=1", "ppo.rollouts=8", "ppo.minibatches=1", "ppo.epochs=1"),
    *("evaluate.prompts=2", "evaluate.micro_batch_size=64"),
    "dpo={epochs: 0.5, batch_size: 4, micro_batch_size: 4, max_length: 128, pairs_per_response: 0.5}",
    *(f"grpo={GROUP}", f"rloo={GROUP}"),
)
"""Stages are run here again and again, so they are smaller still; of the tiny pipeline some are not made small yet."""


def argilla(number: int) -> dict[str, object]:
    """Return a record of an export: 8 of 120 have no ranking, and 6 others a draft beside one."""

    def answer(status: str, person: int) -> dict[str, object]:
        ranking = [{"value": f"response-{place}", "rank": place} for place in (1, 2)]
        return {"status": status, "user_id": f"person {person % 5}", "values": {"preference": {"value": ranking}}}

    answers = [answer("submitted", number), *([answer("draft", number + 1)] if number % 20 == 0 else [])]
    fields = {"prompt": f"Question {number}", "response-1": "Yes.", "response-2": "No."}
    return {"fields": fields, "responses": answers if number < 112 else []}


@pytest.fixture(scope="module")
def place(pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the documents have it: the pipeline files are the small one, whose results are in the store."""
    assert unbroken
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(pipeline.store.root, folder / "store")
    text = to_yaml(resolved(pipeline.config(*SIZES, f"store.uri={folder / 'store'}")))
    for file in ("rlhf.yaml", "configs/tiny.yaml"):
        (folder / file).write_text(text)
    (folder / "configs" / "quickstart.yaml").write_text(text.replace("pipeline: tiny", "pipeline: quickstart"))
    for name in ("empty", "my"):
        (folder / name).mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "Write a one-sentence movie review."}\n')
    (folder / "my" / "demonstrations.jsonl").write_text('{"prompt": "Hi", "completion": "Hello."}\n')
    (folder / "my" / "comparisons.jsonl").write_text('{"prompt": "Hi", "responses": ["Hello"], "ratings": [[1]]}\n')
    rated = [{"prompt": prompt, "response": response, "helpfulness": 3} for prompt, response in ("ab", "ac", "xy")]
    for name in ("sft", "rm"):
        export_artifact(unbroken[name], folder / "my" / f"{name}-model", pipeline.store, lambda _: "a card")
    for file, rows in (("helpsteer2.jsonl", rated), ("export.json", map(argilla, range(120)))):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def filled(words: list[str]) -> list[str]:
    """Return the words of a command with the reader's own names in the place of those that stand for them."""
    model = f"my/{words[-1]}-model" if words[0] == "import" else "my/exported"
    names = {"DIR": model, "FILE": "my/demonstrations.jsonl", "other/ppo": "tiny/ppo", "KEY": "tiny/ppo"}
    return [names.get(word, word) for word in words]


def run_here(call: Call) -> dict[str, float]:
    """Run a stage in this process, a group of one rank: a process for each would import for longer than it trains."""
    accelerator.forget()
    perform(call)
    return call.context.folder.result.read()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("group", "new_accelerator")
@pytest.mark.parametrize("document", [path.name for path in DOCUMENTS])
def test_the_other_commands_run(
    document: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, in this process; what a document shows of their output is what they print."""
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as in a rank
    monkeypatch.setattr(Session, "resources", lambda _: Resources(cpus=[2], gpus=[0]))
    monkeypatch.setattr(worker_group, "run_task", lambda call, *_: run_here(call))
    monkeypatch.setattr(worker_group, "run_group", lambda begin, *_: run_here(begin(None)[0]))
    for _, line, shown in [command for command in commands() if command.document == document]:
        if listed_in(ELSEWHERE, line) or listed_in(NOT_HERE, line):
            continue
        words = filled(words_of(line))
        monkeypatch.chdir(place / "empty" if words[0] == "init" else place)
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
        status = main(words)
        out, err = capsys.readouterr()
        assert status == (2 if any(each.startswith("error: ") for each in shown) else 0), f"{line}\n{err}"
        assert out or err, line
        printed = [each.split() for each in (out + err).splitlines()]
        for each in shown:
            assert any(in_order(each.split(), words) for words in printed), f"{line}\n{each}\n{out}{err}"
        if words[0] == "import":  # a stage that was imported is no longer trained
            assert main(["import", "--forget", *words[-2:]]) == 0
        if target := line.partition(" > ")[2]:
            Path(target).expanduser().parent.mkdir(parents=True, exist_ok=True)
            Path(target).expanduser().write_text(out)


def in_order(some: list[str], words: list[str]) -> bool:
    """Return whether words are among others in this order."""
    rest = iter(words)
    return all(word in rest for word in some)
