"""Ranks that are set apart: a worker group's last ranks as a process group of their own, and messages between the two.

DeepSpeed, transformers and :mod:`rlhf.zero.group` all mean torch's default process group when they speak of the ranks.
So those that train and those that are set apart are two worlds to torch, each with a rank 0, and not two subgroups of
one world: ZeRO shards a model over the ranks that have it, and nothing of it needs to know of the others. What the two
tell each other is small beside a model, and goes through the store at which the ranks that train have met.
"""

import io
import os
import time
from typing import Any

import torch
import torch.distributed as dist

PIECE = 4 * 2**20
"""Bytes of a value in torch's store, which takes up to 8 MiB."""
LOOK_SECONDS = 0.01
"""How often a rank that waits looks for its message."""


def is_set_apart() -> bool:
    """Return whether this rank is one of those that are set apart."""
    meetings = [(os.environ.get(f"{who}_ADDR"), os.environ.get(f"{who}_PORT")) for who in ("TRAINERS", "MASTER")]
    return "TRAINERS_ADDR" in os.environ and meetings[0] != meetings[1]


class Messages:
    """Named messages between the two groups: tensors, numbers, texts, and lists and dictionaries of these.

    A rank that waits has no deadline, since the other group may train or score for any time: the driver ends a group
    in which nobody makes progress. Code that waits for the other group belongs into this file, by which the driver
    tells a rank that waits from one that stands still.
    """

    def __init__(self) -> None:
        address, port = os.environ["TRAINERS_ADDR"], int(os.environ["TRAINERS_PORT"])
        store: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage] - it is documented there
        self._store = store(address, port, is_master=False, wait_for_workers=False)

    def send(self, name: str, content: Any) -> None:
        """Leave a message for the other group. Each name is used once."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        whole = buffer.getvalue()
        pieces = [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{name}/{number}", piece)
        self._store.set(name, str(len(pieces)))  # last: it says that the others are there

    def receive(self, name: str) -> Any:
        """Wait for a message and return it. It stays until it is removed, so that several ranks can read it."""
        # torch's own wait would print two warnings whenever its time is over, and let no signal in before.
        while not self._store.check([name]):
            time.sleep(LOOK_SECONDS)
        pieces = [self._store.get(f"{name}/{number}") for number in range(int(self._store.get(name)))]
        return torch.load(io.BytesIO(b"".join(pieces)), weights_only=True)

    def remove(self, name: str) -> None:
        """Remove a message that all have read."""
        for number in range(int(self._store.get(name))):
            self._store.delete_key(f"{name}/{number}")
        self._store.delete_key(name)
