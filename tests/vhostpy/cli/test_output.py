"""Standard streams that are closed, full or broken, and the signals that end commands."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import time

import pytest

from tests.vhostpy.cli.commands import DEADLINE_S, Running, command, run, status_of


def redirected(how, *words):
    """A shell that starts the command so."""
    return ["sh", "-c", f'exec "$@" {how}', "sh", *command(*words)]


@contextlib.contextmanager
def lost_output(how):
    """What Popen needs, so that nobody gets what the command says."""
    if how == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        try:
            yield "", writer
        finally:
            os.close(writer)
    else:
        yield {"closed": ">&-", "full": ">/dev/full"}[how], None


HOWS = {"closed": "bad file descriptor", "full": "no space left on device", "broken": ""}


WORDS = (
    "--version", "net --help", "net --print-capabilities", "status", "fdb show --json",
    "load vu0 --seconds 0.1 --warmup 0.1",
)  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_output_that_cannot_be_written_is_told_in_one_line(place, how):
    with Running("net", "--socket", "vu0"), lost_output(how) as (redirection, stdout):
        for words in WORDS:
            result = subprocess.run(
                redirected(redirection, *words.split()), stdout=stdout, stderr=subprocess.PIPE,
                text=True, timeout=DEADLINE_S,
            )  # fmt: skip
            assert result.returncode == 1, (words, result.stderr)
            if how == "broken":
                assert result.stderr == "", words
            else:
                told = f"error: cannot write to standard output: {HOWS[how]}\n"
                assert told in result.stderr, words
                assert result.stderr.count("\n") == 2, words


@pytest.mark.parametrize("how", HOWS)
def test_who_cannot_say_that_it_listens_serves_all_the_same(place, how):
    with lost_output(how) as (redirection, stdout):
        process = subprocess.Popen(
            redirected(redirection, "net", "--socket", "vu0", "--json"),
            stdout=stdout, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    with served(process) as status:
        assert status["sockets"][0]["socket"] == "vu0"
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.returncode == 0, stderr
    assert "warning: cannot write to standard output" in stderr and "Traceback" not in stderr


def test_closed_streams_are_no_numbers_for_sockets(place):
    process = subprocess.Popen(redirected("<&- >&- 2>&-", "blk", "--socket", "vb0", "--ram", "1M"))
    with served(process, "vb0"):
        for number in range(3):
            assert os.readlink(f"/proc/{process.pid}/fd/{number}") == "/dev/null"
    assert process.returncode == 0


def test_a_log_that_is_full_changes_no_exit_status(place):
    process = subprocess.Popen(redirected("2>/dev/full", "net", "--socket", "vu0"))
    with served(process):
        pass
    assert process.returncode == 0
    assert subprocess.run(redirected("2>/dev/full", "net", "--bad")).returncode == 2


@contextlib.contextmanager
def served(process, name="vu0", number=signal.SIGTERM):
    """Once it serves; ended by a signal, which it has to obey."""
    try:
        deadline = time.monotonic() + DEADLINE_S
        while (result := run("status", name, "--json")).returncode:
            assert process.poll() is None and time.monotonic() < deadline, result.stderr
        yield json.loads(result.stdout)
        process.send_signal(number)
        process.wait(DEADLINE_S)
    finally:
        process.kill()


# Signals -------------------------------------------------------------------------------


def test_a_terminal_that_goes_away_ends_it_cleanly(place):
    process = subprocess.Popen(command("net", "--socket", "vu0"), stderr=subprocess.DEVNULL)
    with served(process, number=signal.SIGHUP):
        process.send_signal(signal.SIGHUP)  # the shell sends one, and the kernel
    assert process.returncode == 0
    assert os.listdir(place) == ["vhostpy"] and os.listdir("vhostpy") == []


def test_a_hangup_that_is_ignored_stays_so(place):
    process = subprocess.Popen(
        command("net", "--socket", "vu0"), stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    with served(process):
        process.send_signal(signal.SIGHUP)
        assert status_of("vu0")["sockets"][0]["socket"] == "vu0"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("net", [signal.SIGINT, signal.SIGTERM]),  # at once, as timeout(1) sends its own
        ("net", [signal.SIGTERM]),
        ("blk", [signal.SIGINT]),
    ],
)
def test_a_load_that_is_interrupted_shows_the_figures_so_far(place, kind, numbers):
    back_end = {"net": "net --socket s --socket t", "blk": "blk --socket s --ram 1M"}[kind]
    load = {"net": "load s t", "blk": "load s --verify --pattern write"}[kind]
    terminal, ours = pty.openpty()
    with Running(*back_end.split()):
        process = subprocess.Popen(
            command(*load.split(), "--seconds", "300"), stdout=subprocess.PIPE, stderr=ours,
            text=True,
        )  # fmt: skip
        os.close(ours)
        while b"generator" not in os.read(terminal, 1000):  # its line of progress
            pass
        for number in (signal.SIGSTOP, *numbers, signal.SIGCONT):
            process.send_signal(number)
        shown, _ = process.communicate(timeout=DEADLINE_S)
    os.close(terminal)
    assert process.returncode == 128 + numbers[0]
    assert "s measured, then interrupted" in " ".join(shown.split())
    assert " Mpps" in shown or " kIOPS" in shown
    assert " 1 MAC pair, " in shown or " on 1 split queue of " in shown
    assert "verified" not in shown  # nothing was read back
