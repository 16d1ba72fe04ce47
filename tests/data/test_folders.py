from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from rlhf.data.readers import read_source
from rlhf.data.record_files import record_files
from rlhf.errors import RequestError

ROW = '{"prompt": "p"}\n'


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    return folder


def names_of(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in record_files(folder)]


def refused(folder: Path) -> RequestError:
    with pytest.raises(RequestError) as caught:
        record_files(folder)
    return caught.value


def test_files_of_every_kind_and_case_are_read(tmp_path: Path) -> None:
    """A suffix in capitals, or a compression, must not take a file out of the data."""
    names = ["a.jsonl", "b.JSONL", "c.ndjson", "d.jsonl.gz", "e.JSON.ZST", "f.parquet", "g.arrow", "sub/h.Feather"]
    assert names_of(fill(tmp_path, *names)) == names


def test_what_lies_beside_data_is_neither_read_nor_a_mistake(tmp_path: Path) -> None:
    """Clones, Spark and checksum programs leave files that hold no records."""
    beside = [
        "README.md",
        ".gitattributes",
        ".git/config.json",
        "dataset_infos.json",
        "dataset_info.json",
        "state.json",
    ]
    beside += ["LICENSE", "license.txt", "_SUCCESS", "_metadata", "a.jsonl.crc", ".a.jsonl.crc", "._a.jsonl", "load.py"]
    assert names_of(fill(tmp_path, "a.jsonl", *beside)) == ["a.jsonl"]
    assert names_of(fill(tmp_path / "mine", "state.json")) == ["state.json"], "the metadata's sibling tells it"


@pytest.mark.parametrize(
    "name",
    ["b.csv", "b.tsv", "b.txt", "b", "b.jsonl.lz4", "b.zip", "b.parquet.gz", "b.jsonl.bak", "sub/b.xlsx", "b.gz"],
)
def test_a_file_that_is_not_read_is_refused_by_name_and_never_skipped(tmp_path: Path, name: str) -> None:
    """Half of the data must not pass for all of it; nor is the file read when it is named itself."""
    error = refused(fill(tmp_path, "a.jsonl", name))
    assert error.where == str(tmp_path / name)
    assert refused(tmp_path / name).where == str(tmp_path / name)


def test_a_link_that_leads_nowhere_or_to_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    """Listing a folder passes over both in silence, and the digest in the key would not see what a link leads to."""
    fill(tmp_path / "data", "a.jsonl")
    fill(tmp_path / "elsewhere", "b.jsonl")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    assert refused(tmp_path / "data").where == str(tmp_path / "data" / "b")
    (tmp_path / "data" / "b").unlink()
    (tmp_path / "data" / "c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert refused(tmp_path / "data").where == str(tmp_path / "data" / "c.jsonl")


def test_the_line_that_converts_a_table_of_text_does_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message says to run is run here."""
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\np\tc\n")
    line = refused(tmp_path / "a.tsv").next_step
    exec(line.removeprefix('python -c "').removesuffix('"'))
    assert [row.value for row in read_source(str(tmp_path / "a.jsonl"))] == [{"prompt": "p", "completion": "c"}]


@pytest.mark.parametrize(
    ("files", "train"),
    [
        (("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"), "data/train-00000-of-00001.jsonl"),
        (("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"), "train"),
        (("train.parquet", "validation.parquet"), "train.parquet"),
        (("a.jsonl", "my_eval.jsonl.gz"), "a.jsonl"),
        (("trainSet.jsonl", "testSet.jsonl"), "trainSet.jsonl"),
        (("a.jsonl", "held-out.jsonl"), "a.jsonl"),
        (("default/train/0000.parquet", "default/dev/0000.parquet"), "default/train/0000.parquet"),
    ],
)
def test_splits_in_one_folder_are_refused_with_the_path_to_name(
    tmp_path: Path, files: tuple[str, ...], train: str
) -> None:
    """A test split that is read with the rest is trained on."""
    error = refused(fill(tmp_path, *files))
    assert error.next_step.startswith(f"name {tmp_path / train}, ")
    assert "data.heldout" in error.next_step


@pytest.mark.parametrize(
    "files",
    [
        ("train-1.jsonl", "train-2.jsonl"),
        ("test/a.jsonl", "test/b.jsonl"),
        ("contest.jsonl", "latest.jsonl"),
        ("train.jsonl", "x.jsonl"),
    ],
)
def test_files_of_one_split_are_read_together(tmp_path: Path, files: tuple[str, ...]) -> None:
    """Shards are no splits, a part of a word is none, and a folder of test data alone is what was asked for."""
    assert len(names_of(fill(tmp_path, *files))) == 2


def test_a_file_beside_its_compressed_copy_is_refused(tmp_path: Path) -> None:
    """Every row would count twice."""
    error = refused(fill(tmp_path, "a.jsonl", "a.jsonl.gz"))
    assert error.where == f"{tmp_path / 'a.jsonl'}, {tmp_path / 'a.jsonl.gz'}"


@pytest.mark.parametrize("names", [("a.jsonl", "a.json"), ("a.jsonl", "a.parquet"), ("a.jsonl.gz", "a.jsonl.xz")])
def test_a_file_in_two_forms_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """Its rows would count twice."""
    error = refused(fill(tmp_path, *names))
    assert "two forms" in error.what
    assert all(name in error.where for name in names)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_file_under_two_names_is_refused(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """Its rows would count twice."""
    fill(tmp_path, "a.jsonl")
    link(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    assert "read twice" in refused(tmp_path).what


def test_a_dataset_that_was_saved_to_disk_is_read_whole(tmp_path: Path) -> None:
    """The folder of ``save_to_disk`` has Arrow files beside metadata in JSON; that of several splits is refused."""
    rows = [{"prompt": f"p{n}"} for n in range(5)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert [row.value for row in read_source(str(tmp_path / "one"))] == rows
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    assert refused(tmp_path / "two").next_step.startswith(f"name {tmp_path / 'two' / 'train'}")


def test_a_table_whose_name_begins_as_a_marker_s_is_not_passed_over(tmp_path: Path) -> None:
    """Markers have no suffix; ``_part.csv`` may hold records."""
    assert str(tmp_path / "_part.csv") in refused(fill(tmp_path, "a.jsonl", "_part.csv")).where


def test_what_the_datasets_library_computed_beside_a_saved_data_set_is_not_read_again(tmp_path: Path) -> None:
    """Its caches hold the same rows; without a saved data set beside it such a file is one of somebody's own."""
    datasets.Dataset.from_list([{"prompt": "p"}, {"prompt": "q"}]).save_to_disk(tmp_path / "saved")
    loaded = datasets.Dataset.load_from_disk(tmp_path / "saved")
    loaded.map(lambda row: {"prompt": row["prompt"] + "!"}, load_from_cache_file=False)
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 2
    assert [row.value["prompt"] for row in read_source(str(tmp_path / "saved"))] == ["p", "q"]
    assert names_of(fill(tmp_path / "own", "cache-1.arrow")) == ["cache-1.arrow"]
