"""`vhostpy blk` with faults before its image: python -m tests.backends.faulty_blk SEED OPTION..."""

import sys
from typing import Any

from tests.faulty import FaultyStorage
from vhostpy.backends.storage import files
from vhostpy.backends.storage.storage import Storage
from vhostpy.cli import main_blk

TORN = 0.2  # of all writes
LATE = 20  # polls, at most


def main() -> int:
    seed = int(sys.argv[1])
    open_file = files.open_file

    def open_with_faults(path: str, **options: Any) -> Storage:
        storage = FaultyStorage(open_file(path, **options), seed=seed, late=LATE)
        storage.tear(TORN)
        return storage

    files.open_file = open_with_faults
    return main_blk(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
