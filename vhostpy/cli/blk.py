"""`vhostpy blk`: a disk behind a vhost-user socket."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from vhostpy.cli import output
from vhostpy.cli.options import (
    Once,
    Parser,
    add_limit_flags,
    add_process_flags,
    bad,
    check_fd,
    check_process_flags,
    device_names,
    disk_size,
    format_size,
    size_bytes,
)

if TYPE_CHECKING:
    from vhostpy.site.site import App

# QEMU refuses a disk with fewer queues than its guest has processors.
QUEUES, QUEUES_MAX = 128, 256
# virtio 1.3, "Block Device / Device Operation": VIRTIO_BLK_T_GET_ID returns 20 bytes.
SERIAL_MAX = 20
BLOCK_SIZES = (512, 1024, 2048, 4096)

EXAMPLE = r"""
a disk of 1 GiB in memory
  vhostpy blk --socket /tmp/vb0 --ram 1G
and the guest (its memory has to be shared):
  qemu-system-x86_64 -m 512 -display none \
    -object memory-backend-memfd,id=mem,size=512M,share=on -machine q35,memory-backend=mem \
    -chardev socket,id=vb,path=/tmp/vb0 -device vhost-user-blk-pci,chardev=vb
"""


def main(arguments: list[str], program: str) -> int:
    """Serves until a signal; returns the exit status."""
    if "--print-capabilities" in arguments:  # vhost-user: all else is ignored then
        output.write(json.dumps({"type": "block", "features": ["read-only", "blk-file"]}) + "\n")
        return 0
    parser = _parser(program)
    options = parser.parse_args(arguments)
    check_process_flags(parser, options)
    if options.null is not None and options.read_only:
        parser.error("--null has no contents to protect\nleave --read-only out")
    for flag in ("direct", "share_rw", "raw"):
        if getattr(options, flag) and options.file is None:
            name = "--" + flag.replace("_", "-")
            parser.error(f"{name} is for --file\nleave it out")
    size = options.ram or options.null or 0
    if size % options.block_size:
        whole = -(-size // options.block_size) * options.block_size
        parser.error(
            f"a disk of {size} bytes is not a whole number of blocks of {options.block_size}\n"
            f"round it, e.g. to {whole}"
        )
    for fd in options.fds:
        check_fd(fd)

    from vhostpy.cli.process import serve

    return serve(program, options, _build)


def _parser(program: str) -> Parser:
    parser = Parser(program, "A disk for a virtual machine.", EXAMPLE)
    add_process_flags(parser, queues=QUEUES, queues_limit=QUEUES_MAX, many=False)
    contents = parser.add_mutually_exclusive_group(required=True)
    contents.add_argument(
        "--file", "--blk-file", metavar="PATH", action=Once, help="a raw image or a block device"
    )
    contents.add_argument(
        "--uri", action=Once,
        help="a disk elsewhere: nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, "
        "nbds for TLS; rbd:POOL/IMAGE",
    )  # fmt: skip
    contents.add_argument(
        "--ram", metavar="SIZE", type=disk_size, action=Once,
        help="memory, lost when this process ends; e.g. 1G",
    )  # fmt: skip
    contents.add_argument(
        "--null", metavar="SIZE", type=disk_size, action=Once,
        help="nothing: writes vanish, reads leave the guest's buffers alone; for measurements",
    )  # fmt: skip
    parser.add_argument("--read-only", action="store_true", help="the guest cannot write")
    parser.add_argument(
        "--direct", action="store_true",
        help="--file past this machine's page cache (O_DIRECT): steady on a fast disk",
    )  # fmt: skip
    parser.add_argument(
        "--share-rw", action="store_true",
        help="--file may be open for writing elsewhere with this flag, too: for both ends of a "
        "live migration",
    )  # fmt: skip
    parser.add_argument(
        "--raw", action="store_true",
        help="--file is served as it is, though it begins as a qcow2, vmdk, ... image does",
    )  # fmt: skip
    parser.add_argument(
        "--serial", type=_serial, default="", action=Once,
        help=f"what the guest sees as serial number, at most {SERIAL_MAX} bytes",
    )  # fmt: skip
    parser.add_argument(
        "--block-size", metavar="SIZE", type=_block_size, default=512, action=Once,
        help="logical block size that the guest sees: 512 to 4K (default: 512)",
    )  # fmt: skip
    add_limit_flags(parser)
    return parser


def _build(options: argparse.Namespace) -> "App":
    from vhostpy.backends.blk.device import Disk
    from vhostpy.runtime.limits import Settings
    from vhostpy.runtime.pool import Workers
    from vhostpy.server.listen import Server
    from vhostpy.site.site import App

    storage = _open_storage(options)
    workers = Workers(options.workers, poll=options.poll, cpus=options.cpus)
    (name,) = device_names(options.sockets, options.fds)
    disk = Disk(
        name,
        storage,
        workers,
        queues=options.queues,
        serial=options.serial,
        block_size=options.block_size,
        read_only=options.read_only,
    )
    disk.set_limits(
        Settings(
            options.iops or None,
            options.bandwidth or None,
            *([] if options.burst is None else [options.burst / 1e6]),
        )
    )
    server = Server(
        disk,
        path=options.sockets[0] if options.sockets else None,
        fd=options.fds[0] if options.fds else None,
        client=options.client,
        mode=options.mode,
        group=options.group,
        file_memory=options.allow_file_memory,
    )
    return App(
        "blk",
        workers=workers,
        servers=[server],
        control_path=options.control,
        storages=[storage],
    )


def _open_storage(options: argparse.Namespace) -> Any:
    if options.file is not None:
        from vhostpy.backends.storage.files import open_file

        return open_file(
            options.file,
            read_only=options.read_only,
            block_size=options.block_size,
            direct=options.direct,
            share_rw=options.share_rw,
            raw=options.raw,
        )
    if options.uri is not None:
        return _open_uri(options.uri, options.read_only, options.block_size)
    if options.ram is not None:
        from vhostpy.backends.storage.ram import RamStorage

        return RamStorage(options.ram, options.block_size)
    from vhostpy.backends.storage.null import NullStorage

    return NullStorage(options.null, options.block_size)


def _open_uri(uri: str, read_only: bool, block_size: int) -> Any:
    from vhostpy.backends.storage.uris import library_of
    from vhostpy.errors import ConfigError

    library = library_of(uri)
    try:
        if library == "librbd":
            from vhostpy.backends.storage.rbd import RbdStorage

            return RbdStorage(uri, read_only=read_only, block_size=block_size)
        from vhostpy.backends.storage.nbd import NbdStorage

        return NbdStorage(uri, read_only=read_only, block_size=block_size)
    except ModuleNotFoundError:
        raise ConfigError(
            f"{uri}: vhostpy was built without {library}",
            f"apt install {library}-dev, then build or install vhostpy again",
        ) from None
    except ImportError as error:  # built with it, and it was removed since
        raise ConfigError(
            f"{uri}: {error}", f"apt install {'librbd1' if library == 'librbd' else 'libnbd0'}"
        ) from None


def _serial(text: str) -> str:
    length = len(text.encode(errors="surrogateescape"))
    if length > SERIAL_MAX or not text.isascii() or not text.isprintable():
        raise bad(
            f"serial number {text!r} ({length} bytes) does not fit virtio-blk",
            f"at most {SERIAL_MAX} printable ASCII characters",
        )
    return text


def _block_size(text: str) -> int:
    size = size_bytes(text)
    if size not in BLOCK_SIZES:
        possible = ", ".join(map(format_size, BLOCK_SIZES))
        raise bad(f"block size {text} is not possible", f"one of {possible}")
    return size
