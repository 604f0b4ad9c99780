"""`make demo`: two Linux guests exchange packets through our switch; one has our disk.

Prints what it does, line by line, and one table. Exit status 0 only if every byte and every
packet arrived.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.peers import peers, traffic
from tests.peers.backend import Backend
from tests.peers.guest import Guest, boot
from tests.peers.qemu import Drive, Nic, kvm_works, qemu10

TCP_MIB = 100
DISK_MIB = 256
FILE_MIB = 50
PINGS = 10
ADDRESSES = ("10.0.0.1", "10.0.0.2")


class DemoFailed(Exception):
    """Something did not arrive; one line says what."""


class Demo:
    def __init__(self, directory: Path, say: Callable[[str], None]) -> None:
        self.directory = directory
        self.say = say
        self.rows: list[tuple[str, str]] = []

    def run(self) -> None:
        with ExitStack() as stack:
            a, b = self._start(stack)
            self._ping(a, b)
            self._tcp(a, b)
            self._disk(a)
        self._check_image()

    def _start(self, stack: ExitStack) -> tuple[Guest, Guest]:
        ports = [self.directory / name for name in ("vu0", "vu1")]
        disk = self.directory / "vb0"
        image = self._image()
        image.touch()
        os.truncate(image, DISK_MIB << 20)
        for backend in (
            ["net", "--socket", str(ports[0]), "--socket", str(ports[1])],
            ["blk", "--socket", str(disk), "--file", str(image)],
        ):
            self.say("vhostpy " + shlex.join(backend))
            stack.enter_context(Backend(*backend, directory=self.directory))
        qemu, kvm = qemu10(), kvm_works()
        guests = [
            Guest(
                name,
                self.directory / name,
                qemu=qemu,
                nics=[Nic(port, f"52:54:00:00:00:0{number}")],
                drives=[Drive(disk)] if number == 1 else [],
                memory_mib=512,
                kvm=kvm,
            )
            for number, (name, port) in enumerate(zip("ab", ports, strict=True), 1)
        ]
        for guest in guests:
            stack.callback(guest.close)
        self.say(f"two guests boot: QEMU 10, {'KVM' if kvm else 'TCG (no KVM that works here)'}")
        boot(*guests)
        for guest, address in zip(guests, ADDRESSES, strict=True):
            guest.set_address(f"{address}/24")
        self.say("both are up, Linux " + guests[0].check("uname -r"))
        return guests[0], guests[1]

    def _ping(self, a: Guest, b: Guest) -> None:
        for size in (56, 1472):
            self.say(f"ping both ways at once, {size} bytes, {PINGS} each")
            job = traffic.start_ping(b, ADDRESSES[0], size=size, count=PINGS)
            there = traffic.ping(a, ADDRESSES[1], size=size, count=PINGS)
            back = traffic.pinged(job.wait().output)
            lost = sum(ping.sent - ping.received for ping in (there, back))
            answer = f"{there.received + back.received} of {there.sent + back.sent} answered"
            mean_ms = (there.average_ms + back.average_ms) / 2
            self.rows.append((f"ping, {size} bytes", f"{answer}, mean {mean_ms:.2f} ms"))
            if lost:
                raise DemoFailed(f"ping with {size} bytes: {answer}")

    def _tcp(self, a: Guest, b: Guest) -> None:
        self.say(f"TCP: {TCP_MIB} MiB of random bytes from a to b")
        transfer = traffic.send_over_tcp(a, b, ADDRESSES[1], mib=TCP_MIB)
        if transfer.sent_sum != transfer.received_sum:
            raise DemoFailed(
                f"TCP: sha256 {transfer.sent_sum} sent, {transfer.received_sum} arrived")
        self.rows.append((f"TCP, {TCP_MIB} MiB", f"{transfer.gbit_s:.2f} Gbit/s, checksums equal"))

    def _disk(self, a: Guest) -> None:
        self.say(f"disk: ext4, a file of {FILE_MIB} MiB, fsync, unmount, read again")
        traffic.make_file_system(a)
        written, speed = traffic.write_file(a, mib=FILE_MIB)
        a.check("umount /mnt && mount /dev/vda /mnt")
        found = traffic.read_file(a)
        a.check("umount /mnt")
        if written != found:
            raise DemoFailed(f"disk: sha256 {written} written, {found} read")
        self.rows.append((f"disk, {FILE_MIB} MiB written", f"{speed:.0f} MiB/s, checksum equal"))

    def _check_image(self) -> None:
        e2fsck = peers.trixie("e2fsck")
        done = subprocess.run([*e2fsck.argv, "-fn", self._image()], capture_output=True, text=True,
                              check=False)
        if done.returncode != 0:
            raise DemoFailed(f"disk: e2fsck of the image: {done.stdout.strip().splitlines()[-1]}")
        self.rows.append(("the image on the host", "e2fsck finds no fault"))

    def _image(self) -> Path:
        return self.directory / "disk.img"


def main() -> int:
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.1f} s] {text}", flush=True)

    print(f"vhostpy demo: two guests on one switch, a disk of {DISK_MIB} MiB; takes about 30 s.\n"
          "Needs 1.5 GiB of memory; leaves nothing behind.", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: cleans up
    directory = Path(tempfile.mkdtemp(prefix="vhostpy-demo-"))
    demo = Demo(directory, say)
    try:
        demo.run()
    except KeyboardInterrupt:
        print("demo: interrupted; all is stopped", file=sys.stderr)
        return 130
    except Exception as error:
        first, _, rest = str(error).partition("\n")
        print(f"demo: failed: {first or type(error).__name__}", file=sys.stderr)
        if rest:
            print(rest, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    width = max(len(name) for name, _ in demo.rows)
    print()
    for name, value in demo.rows:
        print(f"  {name:<{width}}   {value}")
    print(f"\ndone in {time.monotonic() - start:.0f} s; README.md has the lines to try it yourself")
    return 0


if __name__ == "__main__":
    sys.exit(main())
