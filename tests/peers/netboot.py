"""A boot server at a port of ours: DHCP and TFTP, as far as a boot ROM wants them."""

import contextlib

from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.layers.tftp import TFTP, TFTP_DATA, TFTP_RRQ
from scapy.packet import Packet, Raw

from vhostpy._spec import Feature
from vhostpy.frontend.frontend import FrontEnd

SERVER, CLIENT, MASK = "10.0.0.1", "10.0.0.2", "255.255.255.0"
SERVER_MAC = "52:54:00:00:00:01"
BUFFER = 2048
HEADER = 12
BUFFERS = 64


class BootServer:
    """Gives whoever asks an address and `program`, which fits one block."""

    def __init__(self, path: str, program: bytes) -> None:
        assert len(program) < 512
        self.program = program
        self.end = FrontEnd(path)
        self.end.negotiate(1 << Feature.VERSION_1)
        self.end.set_mem_table()
        self.receiving = self.end.start_queue(0, BUFFERS)
        self.sending = self.end.start_queue(1, BUFFERS)
        self.out = self.end.allocate(BUFFER)
        self.posted: dict[int, int] = {}
        for _ in range(BUFFERS):
            self._post(self.end.allocate(BUFFER))
        self.receiving.ring.kick()

    def _post(self, gpa: int) -> None:
        self.posted[self.receiving.ring.add([], [(gpa, BUFFER)])] = gpa

    def serve(self, timeout_s: float) -> None:
        """Answers what comes, until nothing came for so long."""
        with contextlib.suppress(TimeoutError):
            while True:
                for buffer, length in self.receiving.wait_used(1, timeout_s):
                    gpa = self.posted.pop(buffer)
                    frame = self.end.memory.read(gpa, length)[HEADER:]
                    self._post(gpa)
                    self.receiving.ring.kick()
                    answer = self._answer(Ether(frame))
                    if answer is not None:
                        self._send(bytes(answer))

    def _send(self, frame: bytes) -> None:
        self.end.memory.write(self.out, bytes(HEADER) + frame)
        self.sending.ring.add([(self.out, HEADER + len(frame))], [])
        self.sending.ring.kick()
        self.sending.wait_used()

    def _answer(self, asked: Packet) -> Packet | None:
        to = Ether(src=SERVER_MAC, dst=asked.src)
        if ARP in asked and asked[ARP].op == 1 and asked[ARP].pdst == SERVER:
            return to / ARP(
                op=2, hwsrc=SERVER_MAC, psrc=SERVER, hwdst=asked.src, pdst=asked[ARP].psrc
            )
        if DHCP in asked:
            kind = dict(o for o in asked[DHCP].options if len(o) == 2)["message-type"]
            options = [
                ("message-type", {1: "offer", 3: "ack"}[kind]),
                ("server_id", SERVER),
                ("lease_time", 3600),
                ("subnet_mask", MASK),
                "end",
            ]
            request = asked[BOOTP]
            answer = BOOTP(
                op=2, xid=request.xid, yiaddr=CLIENT, siaddr=SERVER, chaddr=request.chaddr,
                file=b"program",
            )  # fmt: skip
            ip = IP(src=SERVER, dst="255.255.255.255")
            return to / ip / UDP(sport=67, dport=68) / answer / DHCP(options=options)
        if TFTP_RRQ in asked:
            udp = UDP(sport=69, dport=asked[UDP].sport)
            data = TFTP(op=3) / TFTP_DATA(block=1) / Raw(self.program)
            return to / IP(src=SERVER, dst=CLIENT) / udp / data
        return None

    def close(self) -> None:
        self.end.close()
