"""The artifact store: keys, blobs, manifests, commits, leases and verification."""

from rlhf.store.backend import Backend
from rlhf.store.blobs import in_parallel
from rlhf.store.garbage import SCRATCH, GarbageReport
from rlhf.store.keys import ActionRecord, Manifest, PayloadFile, Ref, canonical_json, digest_file, digest_of, key_of
from rlhf.store.lease import LEASE_SECONDS, Holder
from rlhf.store.store import GRACE_SECONDS, Store

__all__ = [
    "GRACE_SECONDS",
    "LEASE_SECONDS",
    "SCRATCH",
    "ActionRecord",
    "Backend",
    "GarbageReport",
    "Holder",
    "Manifest",
    "PayloadFile",
    "Ref",
    "Store",
    "canonical_json",
    "digest_file",
    "digest_of",
    "in_parallel",
    "key_of",
]
