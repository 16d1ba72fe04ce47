"""The artifact store: keys, blobs, manifests, commits, leases and verification."""

from rlhf.store.backend import Backend
from rlhf.store.keys import canonical_json, digest_file, digest_of, key_of
from rlhf.store.lease import LEASE_SECONDS, Holder
from rlhf.store.records import ActionRecord, Manifest, PayloadFile
from rlhf.store.store import Ref, Store
from rlhf.store.verify import Damage, VerifyReport

__all__ = [
    "LEASE_SECONDS",
    "ActionRecord",
    "Backend",
    "Damage",
    "Holder",
    "Manifest",
    "PayloadFile",
    "Ref",
    "Store",
    "VerifyReport",
    "canonical_json",
    "digest_file",
    "digest_of",
    "key_of",
]
