"""The commands as an operator runs them: real processes, their output and exit status."""

import json
import re
import select
import signal
import struct
import subprocess
import sys

DEADLINE_S = 20


def command(*words):
    return [sys.executable, "-m", "vhostpy", *map(str, words)]


def run(*words, pass_fds=()):
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=DEADLINE_S, pass_fds=pass_fds
    )


class Running:
    """A process that serves; ended by SIGTERM, which it has to obey at once and cleanly."""

    def __init__(self, *words, pass_fds=()):
        self.process = subprocess.Popen(
            command(*words, "--json"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=pass_fds,
        )  # fmt: skip
        self.stderr = ""

    def __enter__(self):
        try:
            ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
            line = self.process.stdout.readline() if ready else ""
            assert line, self._end()
            self.listening = json.loads(line)
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_):
        self._end()
        assert self.process.returncode == 0, self.stderr
        assert "Traceback" not in self.stderr

    def _end(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            output, self.stderr = self.process.communicate(timeout=DEADLINE_S)
        finally:
            self.process.kill()
        assert output == ""
        return self.stderr


def assert_told(result, status, *texts):
    """One error of one line, one next step, no traceback, nothing on standard output."""
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
    for text in texts:
        assert text in result.stderr
    if "usage: vhostpy" not in texts[0]:
        assert re.fullmatch(r"vhostpy[^\n]*: error: [^\n]+\n  next: [^\n]+\n", result.stderr)


def get_features():
    """The first message of a front-end (vhost-user, "VHOST_USER_GET_FEATURES")."""
    return struct.pack("<III", 1, 1, 0)


def status_of(name):
    return json.loads(run("status", name, "--json").stdout)
