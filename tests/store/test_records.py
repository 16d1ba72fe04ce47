import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import DamageError, RequestError
from rlhf.store import ActionRecord, Manifest, PayloadFile, digest_of
from tests.store.helpers import record_of

NAMES = st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3}){0,2}\.json", fullmatch=True)
DIGESTS = st.integers().map(digest_of)
FILES = st.lists(
    st.builds(PayloadFile, NAMES, st.integers(min_value=0), DIGESTS), min_size=1, unique_by=lambda file: file.path
)
MANIFEST = Manifest.of(
    "policy",
    [
        PayloadFile("policy/a/model.safetensors", 3, digest_of("a")),
        PayloadFile("policy/config.json", 2, digest_of("b")),
        PayloadFile("policy-old/config.json", 2, digest_of("b")),
        PayloadFile("rows.jsonl", 4, digest_of("c")),
    ],
)
RECORD = record_of(MANIFEST)


@given(FILES)
def test_a_manifest_reads_back_equal_whatever_order_its_files_came_in(files: list[PayloadFile]):
    """An artifact is its set of files: listing a folder in another order is the same artifact."""
    manifest = Manifest.of("policy", files)
    assert Manifest.of("policy", reversed(files)) == manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(FILES, st.integers(min_value=0), DIGESTS, NAMES)
def test_path_size_contents_and_kind_each_change_the_digest(
    files: list[PayloadFile], size: int, sha256: str, path: str
):
    """The digest names exactly this payload."""
    manifest = Manifest.of("policy", files)
    for other in (PayloadFile(path, size, sha256), dataclasses.replace(files[0], size=files[0].size + 1)):
        changed = [other, *files[1:]]
        same = sorted(changed, key=repr) == sorted(files, key=repr)
        assert (Manifest.of("policy", changed).digest == manifest.digest) == same
    assert Manifest.of("reward model", files).digest != manifest.digest


def test_a_part_has_the_digest_of_an_artifact_made_of_that_folder_alone():
    """A stage that reads one folder is keyed by it: what else lies in the artifact changes nothing."""
    alone = Manifest.of(
        "policy",
        [PayloadFile("a/model.safetensors", 3, digest_of("a")), PayloadFile("config.json", 2, digest_of("b"))],
    )
    assert MANIFEST.part_digest("policy") == alone.digest
    assert MANIFEST.part_digest("") == MANIFEST.digest


@pytest.mark.parametrize("part", ["value", "rows.jsonl", "policy/a", "polic", "policy/", "/", "..", "."])
def test_a_part_that_is_no_top_level_folder_is_refused(part: str):
    """A misspelt folder must not be an empty input; the error names the folders that are there."""
    with pytest.raises(RequestError, match="policy, policy-old"):
        MANIFEST.part_digest(part)


@pytest.mark.parametrize(
    "path", ["/etc/x.json", "../x.json", "a/../../x.json", "a//x.json", "./x.json", "a\\x.json", ""]
)
def test_a_manifest_whose_paths_leave_the_artifact_is_damaged(path: str):
    """A manifest made elsewhere cannot make a checkout write outside its folder, however right its digest is."""
    with pytest.raises(DamageError):
        Manifest.from_json(Manifest.of("policy", [PayloadFile(path, 1, digest_of(1))]).to_json())


def test_every_flipped_bit_and_every_truncation_is_seen():
    """Manifests and action records carry their own digest: no damage to any byte reads as something else."""
    for read, data in ((Manifest.from_json, MANIFEST.to_json()), (ActionRecord.from_json, RECORD.to_json())):
        for position in range(len(data)):
            with pytest.raises(DamageError):
                read(data[:position])
            for bit in range(8):
                flipped = bytearray(data)
                flipped[position] ^= 1 << bit
                with pytest.raises(DamageError):
                    read(bytes(flipped))


METRICS = st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=4)


@given(METRICS, st.floats(min_value=0, allow_infinity=False))
def test_an_action_record_reads_back_equal(metrics: dict[str, float], seconds: float):
    """Metrics keep every digit."""
    record = dataclasses.replace(RECORD, metrics=metrics, seconds=seconds)
    assert ActionRecord.from_json(record.to_json()) == record


def test_a_record_with_a_metric_that_is_not_a_number_cannot_be_written():
    """A diverged run is never cached as done."""
    with pytest.raises(RequestError, match="nan"):
        dataclasses.replace(RECORD, metrics={"eval/loss": float("nan")}).to_json()


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"digest":"x"}', b"\xff", b"[" * 100000, b"NaN"])
def test_a_file_that_is_no_record_is_damaged(content: bytes):
    """Anything may lie in a damaged file; reading it says so and nothing else."""
    readers: list[Any] = [Manifest.from_json, ActionRecord.from_json]
    for read in readers:
        with pytest.raises(DamageError):
            read(content)
