"""What root may do and others may not, given up for a while."""

import ctypes
from collections.abc import Generator
from contextlib import contextmanager

_VERSION = 0x20080522


@contextmanager
def permissions_obeyed() -> Generator[None]:
    """Make root obey the permission bits of files, as everybody else does: capabilities(7), capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    # Effective, permitted and inheritable, twice 32 bits of each; what stays permitted can be made effective again.
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    meanwhile = (ctypes.c_uint32 * 6)(*before)
    meanwhile[0] = meanwhile[3] = 0
    assert libc.capset(header, meanwhile) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
