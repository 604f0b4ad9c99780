"""What `net` and `blk` do once their command line is understood."""

import argparse
import asyncio
import json
from collections.abc import Callable

from vhostpy.cli import output
from vhostpy.errors import ConfigError
from vhostpy.site import site


def serve(
    program: str, options: argparse.Namespace, build: Callable[[argparse.Namespace], site.App]
) -> int:
    """Builds the App and runs it until a signal; returns the exit status."""
    site.log_to_stderr(program, options.log_level)
    site.raise_fd_limit()
    try:
        # Not within the loop, whose first Ctrl-C waits for what it runs: an image's lock may
        # take half a minute.
        process = build(options)
        asyncio.run(process.run(lambda: _say_listening(process) if options.json else None))
    except OSError as error:
        # A last net: what can be foreseen is a ConfigError with a better text.
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{where}{error.strerror or error}") from error
    except MemoryError as error:
        raise ConfigError("not enough memory", "a smaller --ram, or fewer --queues") from error
    return 0


def _say_listening(process: site.App) -> None:
    try:
        output.write(json.dumps(process.summary()) + "\n")
    except output.OutputError as error:
        # Guests may be there already, or come all the same.
        site.log.warning("%s; we serve all the same", error.args[0])
