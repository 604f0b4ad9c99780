"""Images that are no raw ones, by what they begin with.

Served as raw, the guest sees a disk full of somebody's tables, and its first writes destroy
them. That a file is raw can never be told from its contents: a guest may write anything to
its disk, so what is found here is refused or warned about, and never opened as what it says.
"""

import shlex

# QEMU names each format so, and these are the beginnings that its drivers look for.
MAGIC = (
    ("qcow", 0, b"QFI\xfb\x00\x00\x00\x01"),
    ("qcow2", 0, b"QFI\xfb"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"\xbe\xba\xfe\xca\x00\x00\x00\x00"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("qed", 0, b"QED\0"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    # A guest that encrypts its whole disk makes one of these as well.
    ("luks", 0, b"LUKS\xba\xbe"),
)


def format_of(head: bytes) -> str:
    """What an image that begins with `head` says it is; "" where it may be a raw one."""
    return next((name for name, at, magic in MAGIC if head.startswith(magic, at)), "")


def how_to_serve(path: str, name: str, read_only: bool) -> str:
    """The next step for an image in a format that we do not read."""
    flag = "-r " if read_only else ""
    return (
        f"qemu-nbd -t {flag}-f {name} -k /tmp/nbd {shlex.quote(path)} serves it to "
        "--uri 'nbd+unix:///?socket=/tmp/nbd'; --raw shows the guest the file as it is"
    )
