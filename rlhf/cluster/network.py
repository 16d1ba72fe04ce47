"""Which network interface the ranks of a node talk through.

Gloo by itself takes the address that the host's name stands for, which on many systems is a loopback address: ranks of
two hosts then never meet. So it is given the interface that Ray knows the node by. NCCL looks for one itself, and
prefers InfiniBand. A user's choice for either, in the driver's environment, reaches every rank.
"""

import os
import socket
from collections.abc import Mapping, Sequence

import psutil

from rlhf.errors import PreflightError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_PREFIXES = ("GLOO_", "NCCL_", "TORCH_NCCL_")


def variables() -> dict[str, str]:
    """Return this process's variables by which users direct Gloo and NCCL."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}


def interface_of(address: str) -> str | None:
    """Return the name of this host's interface with an address; None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def use_interface_of(address: str) -> None:
    """Direct Gloo to the interface of the node's address, unless the user chose one.

    Raises:
        PreflightError: the user chose an interface that this host has not.
    """
    for variable, name in missing_interfaces(os.environ, list(psutil.net_if_addrs())):
        there = ", ".join(sorted(psutil.net_if_addrs()))
        raise PreflightError(
            f"{variable} names the network interface {name}, and {socket.gethostname()} has only {there}",
            f"{variable}={os.environ[variable]}, in the environment of the driver or of Ray on that node",
            f"unset {variable}, or name an interface that every node has",
        )
    if GLOO not in os.environ and (name := interface_of(address)) is not None:
        os.environ[GLOO] = name


def missing_interfaces(environment: Mapping[str, str], there: Sequence[str]) -> list[tuple[str, str]]:
    """Return (variable, name) for each interface that a variable names and a host with those ``there`` has not.

    Gloo's variable lists whole names. NCCL's lists beginnings of names, or whole names after ``=``; after ``^`` it
    lists those that are not used.
    """
    missing: list[tuple[str, str]] = []
    for variable in (GLOO, NCCL):
        names = environment.get(variable, "")
        if variable == NCCL and names.startswith("^"):
            continue
        exact = variable == GLOO or names.startswith("=")
        for name in filter(None, names.removeprefix("=").split(",")):
            # NCCL lets a port follow a name.
            wanted = name if variable == GLOO else name.partition(":")[0]
            if not any(one == wanted if exact else one.startswith(wanted) for one in there):
                missing.append((variable, name))
    return missing
