"""What may last, off the event loop: in a thread, and never left half-way."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def aside(work: Callable[..., T], *arguments: object) -> T:
    """Calls it in a thread of its own, and returns what it returns.

    For what touches guest memory, where a page fault may last, and what waits for workers,
    which touch it too: one session's message waits then, and no other's. A caller that is
    cancelled meanwhile gets the result all the same, so that nothing happens behind its back,
    and is cancelled where it waits next.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    threading.Thread(
        target=_run, args=(loop, done, work, arguments), name="vhostpy-aside", daemon=True
    ).start()
    if await outlast(done) and (task := asyncio.current_task()) is not None:
        task.uncancel()
        task.cancel()
    try:
        return done.result()
    finally:
        del done  # an error's traceback refers to this frame


async def outlast(work: asyncio.Future[Any]) -> bool:
    """Waits for the end of `work`, however often the caller is cancelled; whether it was."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


def _run(
    loop: asyncio.AbstractEventLoop,
    done: asyncio.Future[Any],
    work: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    tell: Callable[[], None]
    try:
        tell = functools.partial(done.set_result, work(*arguments))
    except BaseException as error:
        tell = functools.partial(done.set_exception, error)
    with contextlib.suppress(RuntimeError):  # the loop is gone
        loop.call_soon_threadsafe(tell)
    del tell, done  # an error's traceback refers to this frame, too
