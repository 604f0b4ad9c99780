"""`vhostpy resize`: a running disk takes over the size that its image has now."""

from vhostpy.cli.options import Once, Parser, add_target_flags, format_size
from vhostpy.cli.target import ask, print_json, printable, show

EXAMPLE = """
a disk's image grows, and its guest sees it
  truncate -s 20G disk.img
  vhostpy resize vb0
"""


def main(arguments: list[str], program: str) -> int:
    """Has the process look, and shows the size; returns the exit status."""
    parser = Parser(program, "Shows a guest that its disk has grown.", EXAMPLE)
    add_target_flags(parser)
    parser.add_argument("--port", metavar="P", action=Once, help="this disk, where there are many")
    options = parser.parse_args(arguments)
    result = ask(options, "resize", kind="blk", port=options.port)
    if options.json:
        print_json(result)
        return 0
    before, size = result["size_before_bytes"], result["size_bytes"]
    if size == before:
        show(f"{printable(result['port'])}: {format_size(size)}, as before")
    else:
        told = (
            "the guest has been told"
            if result["guest_told"]
            else "the guest sees it when its front-end connects again"
        )
        show(f"{printable(result['port'])}: {format_size(before)} -> {format_size(size)}; {told}")
    return 0
