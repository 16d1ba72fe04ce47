from pathlib import Path

import pytest

from tests.buckets import Bucket
from tests.store.places import BucketPlace, FolderPlace, Place


@pytest.fixture
def bucket_place(bucket: Bucket, tmp_path: Path) -> BucketPlace:
    """A place for a store in a bucket."""
    return BucketPlace(bucket, tmp_path / "scratch")


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place for a store, of either kind."""
    return FolderPlace(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("bucket_place")
