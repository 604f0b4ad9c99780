"""A guest that shares its memory and does nothing: every byte of it stays as it is."""

import random
from types import TracebackType
from typing import Self

from tests.hostile.attacker import EVERYTHING, FEATURES, LAYOUT
from vhostpy.frontend.frontend import FrontEnd


class Canary:
    """On a socket of its own, for the block's time."""

    def __init__(self, path: str, layout: tuple[tuple[int, int], ...] = LAYOUT) -> None:
        self.end = FrontEnd(path, timeout_s=20, layout=layout)
        self.end.negotiate(FEATURES, EVERYTHING)
        self.end.set_mem_table()
        dice = random.Random(1)
        self.content = [(gpa, dice.randbytes(size)) for gpa, size in layout]
        for gpa, data in self.content:
            self.end.memory.write(gpa, data)

    def changed(self) -> int:
        """How many bytes are not what they were."""
        return sum(
            sum(a != b for a, b in zip(now, data, strict=True))
            for gpa, data in self.content
            if (now := self.end.memory.read(gpa, len(data))) != data
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end.close()
