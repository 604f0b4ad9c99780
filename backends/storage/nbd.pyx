"""A disk on an NBD server: nbdkit, qemu-nbd, another machine.

Workers talk to the server themselves. Each connection has a thread, which waits for host
names, handshakes and lost servers, so that no worker ever does. Where the server allows it
(multi-conn), the queues of a disk share a few connections; else all of them share one, since
a flush covers only its own connection.

A connection that is lost is made again, and what it had not answered is sent again. Writes
that the server acknowledged are its own to keep, and a server whose machine crashes may
lose those that were not flushed: like any client we cannot notice that. Nor can we notice
a server that lives on with a write of the lost connection, and does it after newer ones.
"""
cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport strlen
from posix.unistd cimport close

from vhostpy.system.hw cimport load_acquire_u32, store_release_u32
from vhostpy.system.linux cimport pthread_self, pthread_setname_np
from vhostpy.backends.storage.completions cimport DoneChannel
from vhostpy.backends.storage.nbd_connection cimport (
    GAVE_UP, LOST, MENDED, STOPPED, Event, Link, Watch, attend, close_link, connect, drive,
    free_link, leave, new_link, put, serve, start_watch, stop,
)
from vhostpy.backends.storage.storage cimport Request, Storage
from vhostpy.system.notify cimport only_faults_and_interrupts

import errno as errors
import logging
import os
import re
import threading

from vhostpy.backends.storage.storage import check_block_size
from vhostpy.backends.storage.uris import library_of
from vhostpy.errors import ConfigError

cdef enum:
    CONNECTIONS = 4         # of one disk, at most; each is a thread
    FIRST_CONNECT_S = 10
    JOIN_S = 2
    SILENCE_S = 30
    GIVE_UP_S = 30

log = logging.getLogger("vhostpy")


# --- The thread of a connection --------------------------------------------------------------

class Outage:
    """What the operator is told of the connections of a disk: each event once, not each one's."""

    def __init__(self, name: str, give_up_s: float) -> None:
        self.name = name
        self.give_up_s = give_up_s
        self.lock = threading.Lock()
        self.down = 0           # connections
        self.given_up = False

    def lost(self, reason: str) -> None:
        first = False
        with self.lock:
            self.down += 1
            first = self.down == 1
        if first:
            log.warning("%s: connection lost: %s\n  what is under way waits for another one, "
                        "%g s at most", self.name, reason, self.give_up_s)

    def gave_up(self, reason: str) -> None:
        first = False
        with self.lock:
            first, self.given_up = not self.given_up, True
        if first:
            log.error("%s: no connection for %g s, requests fail: %s\n  next: start the server "
                      "again; we go on trying", self.name, self.give_up_s, reason)

    def mended(self) -> None:
        last = False
        with self.lock:
            self.down -= 1
            last = self.down == 0
            if last:
                self.given_up = False
        if last:
            log.warning("%s: connected again", self.name)


def run(uint64_t address, outage, bint connected):
    """Serves one connection; holds no storage, only the Link, which close() frees behind it."""
    cdef Link *link = <Link *>address
    cdef Event event
    with nogil:
        only_faults_and_interrupts()    # it copies to and from guest memory, too
        pthread_setname_np(pthread_self(), b"vhostpy-nbd")
    while True:
        with nogil:
            event = serve(link)
        if event == STOPPED:
            return
        if event == LOST:
            outage.lost(reason_of(link))
        elif event == GAVE_UP:
            if not connected:   # it never was: nobody was told that it is lost
                outage.lost(reason_of(link))
                connected = True
            outage.gave_up(reason_of(link))
        elif event == MENDED and connected:
            outage.mended()
        connected = True


cdef str reason_of(Link *link):
    """libnbd's text without the name of the function that failed."""
    text = link.reason[:strlen(link.reason)].decode(errors="replace")
    return re.sub(r"^(nbd_\w+: )+", "", text)


# --- Storage and channel -----------------------------------------------------------------------

@cython.final
cdef class NbdStorage(Storage):
    """The export that `uri` names: nbd://HOST[:PORT]/NAME, nbd+unix:///NAME?socket=PATH, ...

    `nbds` for TLS. Raises ConfigError where it cannot be had at once. A server that has
    requests and says nothing for `silence_s` counts as lost; requests wait `give_up_s` for
    a new connection, then fail.
    """
    cdef list links             # addresses
    cdef list ended             # addresses of links that channels may still know
    cdef list threads
    cdef object lock
    cdef object outage
    cdef bytes uri
    cdef double silence_s
    cdef double give_up_s
    cdef int connections
    cdef int channels

    def __init__(self, uri: str, read_only: bool = False, block_size: int = 512, *,
                 silence_s: float = SILENCE_S, give_up_s: float = GIVE_UP_S) -> None:
        cdef Link *link
        if self.links:
            raise TypeError("made already")
        check_block_size(block_size)
        if library_of(uri) != "libnbd":
            raise ConfigError(f"{uri}: not for an NBD server")
        self.name = self.uri_text(uri)
        self.uri = uri.encode(errors="surrogateescape")
        self.silence_s, self.give_up_s = silence_s, give_up_s
        self.links, self.threads, self.ended = [], [], []
        self.lock = threading.Lock()
        self.outage = Outage(self.name, give_up_s)
        link = self.add_link()
        try:
            self.open_first(link, read_only, block_size)
            self.start(link, True)
        except BaseException:
            self.links.clear()
            close_link(link)
            free_link(link)
            raise

    @staticmethod
    def uri_text(uri):
        # What follows the '?' may name keys; of a Unix socket it is all that there is.
        return uri if "socket=" in uri else uri.partition("?")[0]

    cdef Link *add_link(self) except NULL:
        cdef const char *uri = self.uri
        cdef Link *link = new_link(uri, self.silence_s, self.give_up_s)
        if link == NULL:
            raise OSError(errno, os.strerror(errno))
        link.local = self.uri.startswith(b"nbd+unix:")
        self.links.append(<uint64_t>link)
        return link

    cdef open_first(self, Link *link, bint read_only, uint64_t block_size):
        cdef int result
        with nogil:
            result = connect(link, FIRST_CONNECT_S)
        if result < 0:
            hint = {
                errors.ECONNREFUSED: "start the server, or see whether it listens elsewhere",
                errors.ENOENT: "start the server; see whether the path and the export's name are "
                               "right",
                errors.EACCES: "see who may use the socket: ls -l",
                errors.EPERM: "see who may use the export",
            }.get(link.reason_errno, "see what the server offers: nbdinfo --list URI")
            raise ConfigError(f"{self.name}: {reason_of(link)}", hint=hint)
        self.block_size = <uint32_t>max(block_size, link.commands.align)
        self.size_bytes = link.size_bytes // self.block_size * self.block_size
        if self.size_bytes == 0:
            raise ConfigError(f"{self.name}: {link.size_bytes} bytes, less than one block of "
                              f"{self.block_size}", hint="give the export a size")
        if self.size_bytes != link.size_bytes:
            log.warning("%s: the last %d bytes are no whole block and are not shown",
                        self.name, link.size_bytes - self.size_bytes)
        if link.read_only and not read_only:
            log.warning("%s: the server lets nobody write, so the guest cannot either", self.name)
        self.read_only = read_only or link.read_only
        self.can_discard = link.can_trim and not self.read_only
        self.can_write_zeroes = link.can_zero and not self.read_only
        self.connections = CONNECTIONS if link.can_multi_conn else 1

    cdef start(self, Link *link, bint connected):
        thread = threading.Thread(target=run, args=(<uint64_t>link, self.outage, connected),
                                  daemon=True)
        thread.start()
        self.threads.append(thread)

    cdef start_next(self):
        """Another connection; to what the first one found, or it is none."""
        cdef Link *first = <Link *><uint64_t>self.links[0]
        cdef Link *link = self.add_link()
        link.size_bytes = self.size_bytes
        link.commands.align = first.commands.align
        link.read_only = first.read_only
        store_release_u32(&first.shares, 1)
        link.shares = 1
        try:
            self.start(link, False)
        except BaseException:
            self.links.pop()
            close_link(link)
            free_link(link)
            raise

    def channel(self) -> NbdChannel:
        """Never waits for the server: a connection of its own is made behind it."""
        with self.lock:
            if not self.links:
                raise ValueError(f"{self.name}: closed")
            number = self.channels % self.connections
            if number == len(self.links):
                self.start_next()
            self.channels += 1
            return NbdChannel(self, self.links[number])

    def actual_bytes(self) -> int:
        """What the server said to all connections: it tells each one only once, and one that
        was told less takes no request beyond."""
        with self.lock:
            return min([(<Link *><uint64_t>link).size_bytes for link in self.links] or
                       [self.size_bytes])

    def close(self) -> None:
        """Ends the connections; what is under way fails. Idempotent.

        A thread that waits for a name server is left behind.
        """
        with self.lock:
            links, threads, self.links, self.threads = self.links, self.threads, [], []
        for address in links:
            stop(<Link *><uint64_t>address)
        for address, thread in zip(links, threads):
            thread.join(JOIN_S)
            if thread.is_alive():
                log.warning("%s: still waits for the name of its server", self.name)
            else:
                close_link(<Link *><uint64_t>address)
                self.ended.append(address)

    def __dealloc__(self):
        for address in self.ended or ():
            free_link(<Link *><uint64_t>address)


@cython.final
cdef class NbdChannel(DoneChannel):
    """Drives its link, which others may use too: their requests come back by their Done."""
    cdef NbdStorage storage     # its links outlive the channel
    cdef Link *link
    cdef int under_way          # requests
    cdef bint refused           # somebody else drove the link
    cdef Watch watch

    def __cinit__(self, NbdStorage storage not None, uint64_t link):
        self.storage = storage
        self.link = <Link *>link
        if start_watch(&self.watch, self.done.fd) < 0:
            number = errno
            self.close()
            raise OSError(number, os.strerror(number))
        self.completion_fd = self.watch.epoll_fd

    cdef int submit(self, Request **burst, int count) noexcept nogil:
        cdef int i
        for i in range(count):
            burst[i].home = self.done
        self.refused = not put(self.link, burst, count)
        if self.refused:
            return 0
        self.under_way += count
        return count

    cdef int poll(self, Request **done, int limit) noexcept nogil:
        cdef int count
        if self.under_way and load_acquire_u32(&self.done.count) == 0:
            drive(self.link)
        count = DoneChannel.poll(self, done, limit)
        self.under_way -= count
        return count

    cdef bint arm(self) noexcept nogil:
        if self.refused or DoneChannel.arm(self):
            self.refused = False
            return True
        if self.under_way:
            return attend(self.link, &self.watch)
        leave(self.link, &self.watch)
        return False

    def close(self) -> None:
        """Called when no request is under way; idempotent."""
        if self.done == NULL:
            return
        close(self.watch.epoll_fd)
        DoneChannel.close(self)
