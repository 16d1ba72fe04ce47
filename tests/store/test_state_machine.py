import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlhf.errors import DamageError
from rlhf.store import ActionRecord, Store
from tests.store.helpers import KEY, files_under, flip_bit, made, results, write_files

MEMORY = Path("/dev/shm")
PIPELINES, STAGES = ("one", "two"), ("data", "sft", "ppo")
FILES = st.dictionaries(
    st.sampled_from(["model.safetensors", "tokenizer.json", "deep/rows.jsonl"]),
    st.sampled_from([b"a", b"b", b"c" * 50]),
    min_size=1,
)


class StoreMachine(RuleBasedStateMachine):
    """Two users of one store, in any order, with damage and garbage collection without grace in between.

    What is known besides the store: the record that each key was committed with, the files of each artifact, what the
    refs were set to, and whether damage may have touched something since the last repair.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
        self.users = [Store.open(self.root), Store.open(self.root)]
        self.committed: dict[str, ActionRecord] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.damaged = False

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    user = st.integers(0, 1)

    @rule(user=user, stage=st.sampled_from(STAGES), files=FILES, setting=st.integers(0, 2), data=st.data())
    def commit(self, user: int, stage: str, files: dict[str, bytes], setting: int, data: st.DataObject) -> None:
        """Whoever was first under a key stays its result, also where a second came to another one."""
        store = self.users[user]
        there = [record for key in sorted(self.committed) if (record := store.lookup(key)) is not None]
        inputs = data.draw(st.lists(st.sampled_from(there), max_size=2, unique_by=lambda one: one.key)) if there else []
        attempt = store.new_attempt(KEY)
        manifest = store.put_artifact(write_files(attempt / "output", files), "data")
        record = store.commit(made(stage, {"setting": setting}, manifest, *inputs))
        shutil.rmtree(attempt)
        self.files[manifest.digest] = files
        before = self.committed.setdefault(record.key, record)
        assert record.artifact == before.artifact or self.damaged
        self.committed[record.key] = record

    @precondition(lambda self: bool(self.committed))
    @rule(user=user, pipeline=st.sampled_from(PIPELINES), stage=st.sampled_from(STAGES), data=st.data())
    def set_ref(self, user: int, pipeline: str, stage: str, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.committed)))
        if self.users[user].set_ref(pipeline, stage, key):
            self.refs[pipeline, stage] = key
        else:
            assert self.damaged
            self.users[user].delete_ref(pipeline, stage)
            self.refs.pop((pipeline, stage), None)

    @rule(user=user, pipeline=st.sampled_from(PIPELINES), stage=st.sampled_from(STAGES))
    def delete_ref(self, user: int, pipeline: str, stage: str) -> None:
        self.users[user].delete_ref(pipeline, stage)
        self.refs.pop((pipeline, stage), None)

    @rule(user=user)
    def collect(self, user: int) -> None:
        """What a ref reaches stays as it was; the rest is gone, and its keys are free."""
        needed, todo = set[str](), list(self.refs.values())
        while todo:
            key = todo.pop()
            if key not in needed and key in self.committed:
                needed.add(key)
                todo += [str(one["key"]) for one in self.committed[key].inputs.values()]
        before = self.manifests()
        try:
            self.users[user].collect_garbage(0)
        except DamageError:
            assert self.damaged
            return
        left = set(self.users[user].keys())
        assert left <= needed
        assert left == needed or self.damaged
        for key in self.committed.keys() - needed:
            del self.committed[key]
        if not self.damaged:
            # What damage has taken from a result that others were made from is not there to be kept.
            wanted = {digest for key in needed for digest in self.reached(key)} & before
            assert self.manifests() == wanted
            blobs = [path for path in (self.root / "blobs").rglob("*") if path.is_file()]
            assert len(blobs) == len({data for digest in wanted for data in self.files[digest].values()})

    def manifests(self) -> set[str]:
        return {path.stem for path in (self.root / "manifests").glob("*.json")}

    def reached(self, key: str) -> set[str]:
        record = self.committed[key]
        return {record.artifact, *(str(one["artifact"]) for one in record.inputs.values())}

    @rule(folder=st.sampled_from(["blobs", "manifests", "actions"]), delete=st.booleans(), data=st.data())
    def damage(self, folder: str, delete: bool, data: st.DataObject) -> None:
        files = sorted(path for path in (self.root / folder).rglob("*") if path.is_file())
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        path.unlink() if delete else flip_bit(path)
        self.damaged = True

    @precondition(lambda self: self.damaged)
    @rule(user=user)
    def repair(self, user: int) -> None:
        """Afterwards everything that is still there is right, and what is gone can be made again."""
        store = self.users[user]
        store.verify(repair=True)
        assert store.verify().damaged == []
        self.damaged = False
        found = results(store)
        self.committed = {key: record for key, record in self.committed.items() if key in found}
        # A ref to what was moved to quarantine stays, and names the result that is made anew.
        self.refs = {(name, stage): ref.key for name in PIPELINES for stage, ref in store.refs(name).items()}

    @rule(user=user)
    def look(self, user: int) -> None:
        """A hit is the one commit of its key, and what is checked out is what was put in, byte for byte."""
        for key, record in results(self.users[user]).items():
            assert record is not None or self.damaged
            if record is not None:
                assert record == self.committed[key]
                out = self.users[user].checkout(record.artifact, self.root / "work" / "out")
                assert files_under(out) == self.files[record.artifact]
                shutil.rmtree(out)

    @invariant()
    def nothing_that_is_referred_to_is_missing(self) -> None:
        if not self.damaged:
            assert self.users[0].verify().damaged == []
            assert set(self.users[0].keys()) == self.committed.keys()


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestStore = StoreMachine.TestCase
