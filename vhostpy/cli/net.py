"""`vhostpy net`: a learning switch; each vhost-user socket is a port."""

import argparse
import json
from typing import TYPE_CHECKING

from vhostpy.cli import output
from vhostpy.cli.options import (
    Once,
    Parser,
    add_process_flags,
    check_fd,
    check_process_flags,
    device_names,
    microseconds,
    whole,
)

if TYPE_CHECKING:
    from vhostpy.site.site import App

# The default number of queue pairs that a guest is shown, and the most it can be.
PAIRS, PAIRS_MAX = 4, 128

EXAMPLE = r"""
two guests on one switch; each gets a socket of its own
  vhostpy net --socket /tmp/vu0 --socket /tmp/vu1
and for each guest (the memory has to be shared):
  qemu-system-x86_64 -m 512 -display none \
    -object memory-backend-memfd,id=mem,size=512M,share=on -machine q35,memory-backend=mem \
    -chardev socket,id=vu,path=/tmp/vu0 -netdev vhost-user,id=net,chardev=vu \
    -device virtio-net-pci,netdev=net,mac=02:00:00:00:00:01
"""


def main(arguments: list[str], program: str) -> int:
    """Serves until a signal; returns the exit status."""
    if "--print-capabilities" in arguments:  # vhost-user: all else is ignored then
        output.write(json.dumps({"type": "net", "features": []}) + "\n")
        return 0
    parser = _parser(program)
    options = parser.parse_args(arguments)
    check_process_flags(parser, options)
    for fd in options.fds:
        check_fd(fd)

    from vhostpy.cli.process import serve

    return serve(program, options, _build)


def _parser(program: str) -> Parser:
    parser = Parser(
        program, "A learning switch for virtual machines: each socket is a port.", EXAMPLE
    )
    add_process_flags(parser, queues=PAIRS, queues_limit=PAIRS_MAX, many=True)
    parser.add_argument(
        "--mtu", metavar="N", type=whole(68, 65535), action=Once,
        help="refuse a front-end that sets a larger MTU (the guest's comes from host_mtu=)",
    )  # fmt: skip
    parser.add_argument(
        "--full-wait", metavar="TIME", type=microseconds, default=100, action=Once,
        help="how long frames wait for a receiver without buffers (default: 100us)",
    )  # fmt: skip
    parser.add_argument(
        "--fdb-limit", metavar="N", type=whole(1, 65536), default=8192, action=Once,
        help="MAC addresses that the switch learns (default: 8192, at most 65536)",
    )  # fmt: skip
    return parser


def _build(options: argparse.Namespace) -> "App":
    from vhostpy.backends.net.device import NetDevice
    from vhostpy.runtime.pool import Workers
    from vhostpy.server.listen import Server
    from vhostpy.site.site import App
    from vhostpy.vswitch.switch import Switch

    workers = Workers(options.workers, poll=options.poll, cpus=options.cpus)
    switch = Switch(workers, fdb_limit=options.fdb_limit, full_wait_us=options.full_wait)
    names = device_names(options.sockets, options.fds)
    places = [{"path": path} for path in options.sockets] + [{"fd": fd} for fd in options.fds]
    servers = [
        Server(
            NetDevice(name, switch, pairs=options.queues, mtu_limit=options.mtu),
            client=options.client,
            mode=options.mode,
            group=options.group,
            file_memory=options.allow_file_memory,
            **place,
        )
        for name, place in zip(names, places, strict=True)
    ]
    return App("net", workers=workers, servers=servers, switch=switch, control_path=options.control)
