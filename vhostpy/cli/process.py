"""What `net` and `blk` do once their command line is understood."""

import argparse
import asyncio
import json
from collections.abc import Callable

from vhostpy import app
from vhostpy.errors import ConfigError


def serve(
    program: str, options: argparse.Namespace, build: Callable[[argparse.Namespace], app.App]
) -> int:
    """Builds the App and runs it until a signal; returns the exit status."""
    app.log_to_stderr(program, options.log_level)
    app.raise_fd_limit()
    try:
        asyncio.run(_run(options, build))
    except OSError as error:
        # A last net: what can be foreseen is a ConfigError with a better text.
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{where}{error.strerror or error}") from error
    except MemoryError as error:
        raise ConfigError("not enough memory", "a smaller --ram, or fewer --queues") from error
    return 0


async def _run(options: argparse.Namespace, build: Callable[[argparse.Namespace], app.App]) -> None:
    process = build(options)

    def listening() -> None:
        if options.json:
            print(json.dumps(process.summary()), flush=True)

    await process.run(listening)
