"""What guests do to each other and to a disk, with the content checked at both ends."""

import re
import time
from dataclasses import dataclass

from tests.peers.guest import Guest, GuestFailed, Job

PING_SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) packets received")
PING_AVERAGE = re.compile(r"min/avg/max = [\d.]+/([\d.]+)/")


@dataclass(frozen=True, slots=True)
class Pinged:
    sent: int
    received: int
    average_ms: float
    output: str

    @property
    def lost_percent(self) -> float:
        return 100 * (self.sent - self.received) / self.sent


def ping_command(address: str, *, size: int = 56, count: int = 10, interval_s: float = 0.1) -> str:
    return f"ping -c {count} -i {interval_s} -W 5 -s {size} {address}"


def pinged(output: str) -> Pinged:
    """What ping's summary says."""
    summary = PING_SUMMARY.search(output)
    if summary is None:
        raise GuestFailed(f"ping gave no summary:\n{output}")
    average = PING_AVERAGE.search(output)
    return Pinged(
        int(summary[1]), int(summary[2]), float(average[1]) if average else 0.0, output)


def ping(guest: Guest, address: str, *, size: int = 56, count: int = 10,
         interval_s: float = 0.1) -> Pinged:
    command = ping_command(address, size=size, count=count, interval_s=interval_s)
    return pinged(guest.run(command, timeout_s=count * interval_s + 20).output)


def start_ping(guest: Guest, address: str, *, size: int = 56, count: int = 10,
               interval_s: float = 0.1) -> Job:
    return guest.background(
        ping_command(address, size=size, count=count, interval_s=interval_s))


@dataclass(frozen=True, slots=True)
class Transfer:
    mib: int
    duration_s: float
    sent_sum: str
    received_sum: str

    @property
    def gbit_s(self) -> float:
        return self.mib * 2**20 * 8 / self.duration_s / 1e9


def send_over_tcp(sender: Guest, receiver: Guest, address: str, *, mib: int,
                  timeout_s: float = 120, port: int = 5000) -> Transfer:
    """Sends `mib` MiB of random bytes to the receiver at `address`; times until all arrived."""
    receiver.check("printf '#!/bin/sh\\ncat > /tmp/received\\n' > /tmp/take && chmod +x /tmp/take")
    listener = receiver.background(f"nc -l -p {port} -e /tmp/take")
    # The receiver's cat ends at our end of file, and nc returns when it has.
    receiver.check(f"until netstat -ltn | grep -q ':{port} '; do usleep 10000; done")
    sent = sender.check(
        f"dd if=/dev/urandom of=/tmp/sent bs=1M count={mib} 2> /dev/null && sha256sum < /tmp/sent",
        timeout_s)
    start = time.monotonic()
    sender.check(f"nc {address} {port} < /tmp/sent", timeout_s)
    duration_s = time.monotonic() - start
    listener.wait(timeout_s)
    received = receiver.check("sha256sum < /tmp/received && rm /tmp/received", timeout_s)
    sender.check("rm /tmp/sent")
    return Transfer(mib, duration_s, sent.split()[0], received.split()[0])


def make_file_system(guest: Guest, device: str = "/dev/vda") -> None:
    guest.check(f"mkfs.ext4 -q {device} && mount {device} /mnt", timeout_s=60)


def write_file(guest: Guest, *, mib: int, path: str = "/mnt/file") -> tuple[str, float]:
    """Writes random bytes and syncs them to the disk: their checksum, and MiB a second."""
    source = "/tmp/source"
    written = guest.check(
        f"dd if=/dev/urandom of={source} bs=1M count={mib} 2> /dev/null && sha256sum < {source}",
        timeout_s=60).split()[0]
    start = time.monotonic()
    guest.check(f"dd if={source} of={path} bs=1M conv=fsync 2> /dev/null", timeout_s=60)
    duration_s = time.monotonic() - start
    guest.check(f"rm {source}")
    return written, mib / duration_s


def read_file(guest: Guest, path: str = "/mnt/file") -> str:
    """The file's checksum, read from the disk and not from the guest's cache."""
    guest.check("echo 3 > /proc/sys/vm/drop_caches")
    return guest.check(f"sha256sum < {path}", timeout_s=60).split()[0]
