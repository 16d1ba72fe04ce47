"""The network interfaces that ranks talk through, and those that users name."""

import pytest

from rlhf.cluster import network
from rlhf.cluster.network import GLOO, NCCL, interface_of, missing_interfaces, use_interface_of
from rlhf.errors import PreflightError

THERE = ("lo", "eth0", "ib0", "ib1")


@pytest.mark.parametrize(
    ("variable", "value", "missing"),
    [
        (GLOO, "eth0,ib0", []),
        (GLOO, "eth", ["eth"]),
        (NCCL, "eth", []),
        (NCCL, "=eth,ib1", ["eth"]),
        (NCCL, "ib:7,wlan", ["wlan"]),
        (NCCL, "^docker,lo", []),
        (NCCL, "", []),
    ],
)
def test_names_are_read_as_gloo_and_nccl_read_them(variable: str, value: str, missing: list[str]):
    assert missing_interfaces({variable: value}, THERE) == [(variable, name) for name in missing]


def test_gloo_takes_the_interface_of_the_node_unless_the_user_chose_one(monkeypatch: pytest.MonkeyPatch):
    """The address that the host's name stands for may be one that no other host reaches."""
    monkeypatch.setenv(GLOO, "to be removed")  # so that what is set is undone
    monkeypatch.delenv(GLOO)
    assert interface_of("127.0.0.1") == "lo"
    use_interface_of("192.0.2.1")
    assert GLOO not in network.variables()
    use_interface_of("127.0.0.1")
    assert network.variables()[GLOO] == "lo"
    monkeypatch.setenv(GLOO, "eth7")
    with pytest.raises(PreflightError) as caught:
        use_interface_of("127.0.0.1")
    assert f"{GLOO} names the network interface eth7" in caught.value.what
    assert "lo" in caught.value.what
    assert f"unset {GLOO}" in caught.value.next_step


def test_what_directs_collectives_is_handed_on_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    for name in ("NCCL_DEBUG", "TORCH_NCCL_TRACE_BUFFER_SIZE", "GLOO_SOCKET_IFNAME", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "lo")
    assert {"NCCL_DEBUG", "TORCH_NCCL_TRACE_BUFFER_SIZE", "GLOO_SOCKET_IFNAME"} <= network.variables().keys()
    assert "WANDB_API_KEY" not in network.variables()
