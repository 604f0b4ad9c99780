"""The learning switch: its ports, what they have learned, and the forwarders between them.

Control's: what workers do is `forwarder`'s.
"""
cimport cython
from libc.stdint cimport uint64_t

from vhostpy.system.hw cimport ticks_per_us
from vhostpy.vswitch.port cimport Port
from vhostpy.vswitch.table cimport Ports
from vhostpy.vswitch.fdb cimport FDB_PORTS_MAX, ForwardingTable
from vhostpy.vswitch.forwarder cimport Forwarder
from vhostpy.vswitch.injector cimport Injector
from vhostpy.runtime.pool cimport Workers

from vhostpy.errors import ConfigError
from vhostpy.vswitch.injector import rarp_frame

cdef double tick_rate = 0     # ticks a microsecond


@cython.final
cdef class Switch:
    """Ports, what they have learned, and the forwarders between them. Control's."""

    def __cinit__(self, Workers workers not None, name="switch", *, fdb_limit=8192, age_s=300,
                  full_wait_us=100):
        global tick_rate
        if not 0 <= full_wait_us <= 1_000_000:
            raise ConfigError(f"{name}: full wait of {full_wait_us} us is not in 0..1000000")
        if tick_rate == 0:
            tick_rate = ticks_per_us()
        self.name = name
        self.workers = workers
        self.fdb = ForwardingTable(fdb_limit, age_s)
        self.full_wait_ticks = <uint64_t>(full_wait_us * tick_rate)
        self.attached = {}
        self.forwarders = {}
        self.injectors = {}
        self.ports = Ports(workers)

    # Ports --------------------------------------------------------------------------

    def attach(self, Port port not None) -> int:
        """Makes it a port of this switch; returns its index."""
        if port.index >= 0:
            raise ValueError(f"{port.name} is attached already")
        index = next(i for i in range(len(self.attached) + 1) if i not in self.attached)
        if index >= FDB_PORTS_MAX:
            raise ConfigError(f"{self.name}: more than {FDB_PORTS_MAX} ports")
        port.index = index
        self.attached[index] = port
        self.ports.publish(self.attached)
        return index

    def detach(self, Port port not None) -> None:
        """Its queues are closed, its addresses forgotten; then no worker knows it."""
        index = self.index_of(port)
        for queue in [queue for i, queue in self.forwarders if i == index]:
            self.close_queue(port, queue)
        self.close_injector(index)
        # Nothing learns its addresses from here on. They go before the port does: a
        # Forwarder that sees the hole in the table also sees that its cache is stale.
        self.fdb.flush(index)
        del self.attached[index]
        self.ports.publish(self.attached)
        port.index = -1

    def index_of(self, Port port not None) -> int:
        """The port's index here. Raises ValueError if it is not attached here."""
        if self.attached.get(port.index) is not port:
            raise ValueError(f"{port.name} is not a port of {self.name}")
        return port.index

    # Queues -------------------------------------------------------------------------

    def open_queue(self, Port port not None, int queue, int kick_fd=-1) -> Forwarder:
        """Workers receive from that queue now; `kick_fd` wakes them, -1: they look by the clock."""
        key = self.index_of(port), queue
        if key in self.forwarders:
            raise ValueError(f"{port.name}: queue {queue} is open already")
        forwarder = self.forwarders[key] = self.forward(port, queue, kick_fd)
        return forwarder

    cdef Forwarder forward(self, Port port, int queue, int kick_fd):
        """Workers take the frames of that queue from now on."""
        cdef Forwarder forwarder = Forwarder(self.ports, self.fdb, self.full_wait_ticks,
                                             port, queue, kick_fd)
        self.workers.add(forwarder, [kick_fd] if kick_fd >= 0 else [])
        return forwarder

    def close_queue(self, Port port not None, int queue) -> None:
        """No worker receives from that queue any more; its ring is held."""
        cdef Forwarder forwarder = self.forwarders.pop((self.index_of(port), queue))
        self.workers.remove(forwarder)
        forwarder.settle()

    def set_kick(self, Port port not None, int queue, int kick_fd) -> None:
        """Another fd wakes them for that queue. The old one is still open."""
        cdef Forwarder forwarder = self.forwarders[self.index_of(port), queue]
        if kick_fd == forwarder.kick_fd:
            return
        if kick_fd >= 0:
            self.workers.watch(forwarder, kick_fd)
        if forwarder.kick_fd >= 0:
            self.workers.unwatch(forwarder, forwarder.kick_fd)
        forwarder.kick_fd = kick_fd
        # A kick may have gone to the new fd before it was watched, or to the old one after.
        self.workers.nudge()

    # Control's own frames -------------------------------------------------------------

    def announce(self, Port port not None, mac: bytes) -> None:
        """Tells the other ports that `mac` is behind this one now."""
        cdef Forwarder forwarder
        index = self.index_of(port)
        if len(mac) != 6 or mac[0] & 1:
            raise ValueError(f"{bytes(mac).hex(':')} is not the address of one station")
        if index not in self.injectors:
            injector = Injector(port.name, index)
            self.injectors[index] = self.forward(injector, 0, injector.kick_fd)
        forwarder = self.injectors[index]
        (<Injector>forwarder.port).put(rarp_frame(bytes(mac)))

    cdef int close_injector(self, index) except -1:
        cdef Forwarder forwarder
        if index in self.injectors:
            forwarder = self.injectors.pop(index)
            self.workers.remove(forwarder)
            (<Injector>forwarder.port).close()
        return 0

    # The rest -------------------------------------------------------------------------

    def tick(self, now_s: int | None = None) -> None:
        """Ageing; once a second."""
        self.fdb.tick(now_s)

    def status(self) -> dict:
        """Ports and the forwarding table's counts."""
        queues = list(self.forwarders)
        return {
            "name": self.name,
            "port_count": len(self.attached),
            "queue_count": len(queues),
            **{f"fdb_{name}": value for name, value in self.fdb.status().items()},
            "ports": [
                {"index": index, "name": port.name,
                 "queues": sorted(queue for i, queue in queues if i == index)}
                for index, port in sorted(self.attached.items())
            ],
        }

    # Doors ----------------------------------------------------------------------------

    def forwarder(self, Port port not None, int queue=0) -> Forwarder:
        """The one of an open queue."""
        return self.forwarders[self.index_of(port), queue]

    def injector(self, Port port not None) -> Forwarder:
        """The one of the port's announcements."""
        return self.injectors[self.index_of(port)]
