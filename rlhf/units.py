"""Quantities as people read them."""


def size(count: float) -> str:
    """Return a number of bytes in the largest of GB, MB and kB (powers of 1000) of which there is at least 1."""
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_of:
            return f"{count / bytes_of:.1f} {unit}"
    return f"{count:.0f} bytes"
