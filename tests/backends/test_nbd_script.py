"""Disks on an NBD server that does by order what a real one does by chance."""

import contextlib
import logging
import threading
import time

from tests.backends.nbdscript import NbdScript
from vhostpy.backends.storage._storage import Op
from vhostpy.backends.storage.nbd import NbdStorage

LONG_S = 60  # what a test waits for in vain only when it fails


def test_a_server_that_hangs_up_on_every_command_is_not_asked_all_the_time(tmp_path, caplog):
    calls = 0

    def hang_up(script):
        nonlocal calls
        with contextlib.suppress(OSError):
            while True:
                connection = script.accept()
                calls += 1
                with contextlib.suppress(EOFError):
                    connection.command()
                connection.close()

    with NbdScript(tmp_path, 1 << 20) as script, caplog.at_level(logging.WARNING, "vhostpy"):
        threading.Thread(target=hang_up, args=[script], daemon=True).start()
        with contextlib.closing(NbdStorage(script.uri, give_up_s=0.5)) as storage:
            channel = storage.channel()
            before = time.monotonic()
            assert channel.run(Op.READ, 0, 512, timeout_s=LONG_S)[0] < 0
            assert time.monotonic() - before < LONG_S / 2
            assert calls < 20
            assert len(caplog.records) < 60
            channel.close()
