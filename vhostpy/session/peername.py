"""The program at the other end of a socket, and how it is told to share its memory."""

import re
import socket
from struct import Struct

from vhostpy.errors import SHARE_ON

CREDENTIALS = Struct("=iII")  # unix(7), SO_PEERCRED: struct ucred
NAME_MAX = 16  # bytes, proc(5): comm

# DPDK has a file for each page of 2 MiB, and its virtio-user tells of no more than eight.
DPDK = "DPDK must keep its memory in few files: {how} (or use pages of 1 GiB)"
OVS = (
    "ovs-vsctl set Open_vSwitch . other_config:dpdk-extra=--single-file-segments, "
    "and restart ovs-vswitchd"
)


def peer_name(sock: socket.socket) -> str:
    """The name of the program that has connected, or listens; "" where it is not known.

    It has chosen that itself: a help for people, nothing to rely on.
    """
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        pid, _, _ = CREDENTIALS.unpack(credentials)
        with open(f"/proc/{pid}/comm", "rb") as comm:
            name = comm.read(NAME_MAX)
    except OSError:
        return ""  # gone, or in no namespace of ours
    return re.sub(r"[^A-Za-z0-9_.:/+-]", "", name.decode("ascii", "ignore"))


def share_hint(front_end: str) -> str:
    """SHARE_ON, as the front-end of that name understands it."""
    if not front_end or any(word in front_end for word in ("qemu", "kvm", "virt")):
        return SHARE_ON
    if "ovs" in front_end:
        return DPDK.format(how=OVS)
    if "dpdk" in front_end or "testpmd" in front_end:
        return DPDK.format(how="give it --single-file-segments")
    return (
        f"{front_end} must share its memory: a memfd, tmpfs or hugetlbfs; "
        "if it stands on DPDK, by --single-file-segments"
    )
