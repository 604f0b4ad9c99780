"""A row of the goals' tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """What is measured, by which generator, and the ratios or the value to be reached.

    `generator` gets a device, seconds and the plan; it returns the figures of one run.
    """

    name: str
    text: str
    generator: Callable[..., dict[str, Any]]
    plan: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)  # ratios, by the peer's name
    most: float | None = None  # the value that vhostpy may not exceed
    peers: tuple[str, ...] = ()
    unit: str = ""
    figure: str = "value"  # which of a run's figures the row shows
    lower_is_better: bool = False
    chart: float | None = None  # its place on the chart's axis
    pairs: int | None = None  # interleaved runs that it needs, where noise is large
    # Whether a device that is less than busy means that the generator is the limit.
    saturates: bool = True
    sleeps: bool = False  # the device does, between two frames or requests, or always

    # What is started for it; cases that are alike in this share their devices.
    ports: int = 2
    storage: str = "null"
    poll: str = "busy"
    setup: str = ""
