"""A first pipeline file: written for what the user has, never over another, and accepted by `rlhf plan`."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import COMMANDS, main
from rlhf.config.pipeline import PipelineConfig, load_pipeline
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from tests.pipeline.helpers import write_model

PINNED = "owner/name@" + "31b70e2e" * 5
WANTED = [
    ("cpu", PINNED, True),
    ("cpu", PINNED, False),
    ("gpu", "scratch", True),
    ("gpu", "smollm2-135m", False),
    ("cluster", "smollm2-135m", True),
    ("cluster", "scratch", False),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (folder := tmp_path / "here").mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of data whose name needs quotes in YAML."""
    (folder := tmp_path / "my: data").mkdir()
    (folder / "demonstrations.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "comparisons").mkdir()
    (folder / "comparisons" / "1.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"], "rankings": [[0, 1]]}\n')
    return folder


def init(*words: object) -> int:
    return main(["init", *map(str, words)])


def loaded(path: str = "rlhf.yaml") -> PipelineConfig:
    return load_pipeline(Path(path), [], {name: stage.settings for name, stage in stages().items()})


def planned(path: str = "rlhf.yaml") -> PipelineConfig:
    config = loaded(path)
    assert plan(config, stages(), Store.open(config.store.uri, create=False), [])
    return config


@pytest.mark.parametrize(
    ("machine", "model", "own"),
    WANTED,
)
def test_what_it_writes_is_planned(data: Path, machine: str, model: str, own: bool) -> None:
    """For every machine, model and data; the ranks share a minibatch."""
    assert init("--for", machine, "--model", model, "--data", data if own else "movie-snippets") == 0
    config = planned()
    settings = {name: one.settings.model_dump() for name, one in config.instances.items()}
    assert settings["model"]["base"] == model.partition("@")[0]
    assert settings["data"]["comparisons"] == (str(data / "comparisons") if own else "movie-snippets")
    assert settings["evaluate"]["judge"] is not own
    workers = settings["ppo"]["workers"]["count"]
    assert workers == (8 if machine == "cluster" else 1)
    assert settings["ppo"]["rollouts"] // settings["ppo"]["minibatches"] % workers == 0
    assert Path(config.store.uri).is_absolute() is (machine == "cluster")


@pytest.mark.parametrize("name", ["null", "true", "1e3", ".5", "~tt", "a: b", "x #y", "😀", "line\nbreak", "'\"\\"])
@pytest.mark.parametrize("machine", ["cpu", "cluster"])
def test_a_folder_may_have_any_name(here: Path, name: str, machine: str) -> None:
    """What YAML, the program or pathlib takes for something else comes back as it was."""
    write_model(here / name)
    for kind in ("demonstrations", "comparisons"):
        (here / name / f"{kind}.jsonl").write_text("")
    assert init("--for", machine, "--model", f"./{name}", "--data", f"./{name}") == 0
    settings = {stage: one.settings.model_dump() for stage, one in loaded().instances.items()}
    assert Path(settings["model"]["base"]).expanduser().samefile(here / name)
    assert Path(settings["data"]["comparisons"]).expanduser().samefile(here / name / "comparisons.jsonl")


def test_a_name_that_yaml_cannot_hold_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be written, and never be found."""
    folder = write_model(here / os.fsdecode(b"\xff"))
    for kind in ("demonstrations", "comparisons"):
        (folder / f"{kind}.jsonl").write_text("")
    assert init("--yes", "--model", f"./{folder.name}") == 2
    assert init("--yes", "--data", folder.name) == 2
    assert "not in UTF-8" in capsys.readouterr().err
    assert not (here / "rlhf.yaml").exists()


def test_the_editor_s_schema_lies_where_the_file_says(here: Path) -> None:
    """In the folder of the file, wherever that is, and it knows all stages."""
    (here / "sub").mkdir()
    assert init("--yes", "sub") == 0
    named = (here / "sub" / "rlhf.yaml").read_text().splitlines()[0].partition("$schema=")[2]
    assert stages().keys() <= json.loads((here / "sub" / named).read_text())["properties"].keys()


def test_nothing_is_replaced_unless_that_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names both ways out."""
    (here / "rlhf.yaml").write_text("mine")
    assert init("--yes") == 2
    assert "--force replaces it, or name another" in capsys.readouterr().err
    assert (here / "rlhf.yaml").read_text() == "mine"
    assert init("--yes", "--config", "other.yaml") == 0
    assert init("--yes", "--force") == 0
    assert planned().name == planned("other.yaml").name == "quickstart"
    (here / "link.yaml").symlink_to("not yet there")
    assert init("--yes", "link.yaml") == 2


def test_what_lies_beside_the_file_is_not_replaced_either(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schema that init wrote may be; another file needs --force, and one of a temporary name stays in any case."""
    assert init("--yes") == 0
    (here / "other.yaml.part").write_text("mine")
    assert init("--yes", "other.yaml") == 0
    for text in ("mine", '{"title": "mine"}', "[]"):
        (here / "rlhf.schema.json").write_text(text)
        assert init("--yes", "third.yaml") == 2
        assert "--force replaces it; or name a file in another folder" in capsys.readouterr().err
        assert (here / "rlhf.schema.json").read_text() == text
    assert not (here / "third.yaml").exists()
    assert init("--yes", "--force", "third.yaml") == 0
    assert "properties" in json.loads((schema := here / "rlhf.schema.json").read_text())
    assert init("--yes", "--force", "rlhf.schema.json") == 2
    assert "properties" in json.loads(schema.read_text())
    names = ["other.yaml", "other.yaml.part", "rlhf.schema.json", "rlhf.yaml", "third.yaml"]
    assert sorted(path.name for path in here.iterdir()) == names


def test_a_pipeline_file_is_written_last(here: Path) -> None:
    """Where its schema cannot be written, the next try is not told that it is there already."""
    (here / "rlhf.schema.json").mkdir()
    assert init("--yes") == 2
    assert [path.name for path in here.iterdir()] == ["rlhf.schema.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--for", "tpu"], "--for cpu or gpu or cluster"),
        (["--data", "nosuch"], "there is no folder nosuch"),
        (["--data", "."], "no demonstrations and no comparisons"),
        (["--model", "."], "it has no config.json"),
        (["--model", "./nosuch"], "there is no folder ./nosuch"),
        (["--model", ""], "should have at least 1 character"),
        (["--model", "@"], "should have at least 1 character"),
        (["--model", "owner/name"], "needs revision"),
        (["--model", "scratch@" + "0" * 40], "revision is for hub models"),
        (["nosuch/rlhf.yaml"], "cannot be written: No such file"),
        (["/proc/rlhf.yaml"], "cannot be written"),
        (["/dev/null/rlhf.yaml"], "cannot be written: Not a directory"),
        (["a.yaml", "b.yaml"], "init takes one file"),
        (["a.yaml", "--config", "b.yaml"], "init takes one file"),
        (["seed=1"], "init takes one file and no settings"),
    ],
)
def test_what_cannot_be_written_for_is_refused(
    words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written, with what to do."""
    assert init("--yes", *words) == 2
    assert said in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_two_files_of_one_kind_are_not_chosen_from(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is meant, nobody could say."""
    (data / "comparisons.json").write_text("[]")
    assert init("--yes", "--data", data) == 2
    assert "comparisons more than once: comparisons, comparisons.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dangling", "loop", "fifo"])
def test_a_file_of_data_that_is_none_is_named(data: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """A link to nowhere, one to itself, and a pipe, which nobody may write to."""
    (path := data / "demonstrations.jsonl").unlink()
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("nowhere" if kind == "dangling" else path)
    assert init("--yes", "--data", data) == 2
    assert "demonstrations.jsonl is neither a file nor a folder" in capsys.readouterr().err


def test_without_a_terminal_it_asks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names what is missing; all of it given, or --yes, and there is no need to ask."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("cpu\n"))
    assert init("--model", "scratch") == 2
    assert "init asks for data, for, and there is no terminal to ask at" in capsys.readouterr().err


def test_at_a_terminal_it_asks_until_the_answers_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    """For what is not given; Enter is the default."""
    answers = iter(["nosuch", str(data), ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert init("--for", "gpu") == 0
    assert "there is no folder nosuch" in capsys.readouterr().out
    assert planned().instances["model"].settings.model_dump()["base"] == "smollm2-135m"
    assert next(answers, None) is None


def test_without_any_pipeline_file_init_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder that is no checkout; a file that init wrote is then the default."""
    assert main(["plan"]) == 2
    assert "rlhf init writes one" in capsys.readouterr().err
    assert init("--yes", "--model", "scratch") == 0
    assert "next: rlhf plan\n" in capsys.readouterr().out.replace(sys.argv[0], "rlhf")
    assert main(["plan"]) == 0


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_refused_at_the_start(platform: str) -> None:
    """Before an import that would fail there."""
    program = (
        f"import sys, rlhf.__main__; sys.platform = {platform!r}; sys.modules['rlhf.cli'] = None\nrlhf.__main__.main()"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[0]) == (2, f"error: rlhf runs on Linux, and this is {platform}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_and_stages(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of this program as it is installed."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, *stages(), "grace", "config"):
        assert word in script, word
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_fields_fit_a_terminal_and_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 80 columns, with what belongs to a setting indented below it; in Markdown each setting is a row."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["config", "--fields", "sft", "rm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.startswith(("sft.", "rm.", "    ")) for line in lines)
    settings = sum(line.startswith(("sft.", "rm.")) for line in lines)
    assert main(["config", "--fields", "--markdown", "sft", "rm"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == settings
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}
