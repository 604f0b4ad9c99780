"""Signals to fds that somebody else holds too: none waits for long.

Whoever receives an eventfd makes it O_NONBLOCK. But that flag belongs to the open file,
which its sender has as well: he fills the counter, takes the flag away, and a write waits
for ever, with all that its thread should do. No system call adds to an eventfd without
regard to the flag. So each write is entered in a table while it is under way, and a
watchdog thread interrupts those that it finds there twice.

A Unix socket needs none of this: MSG_DONTWAIT is the call's own flag. Of what else can be
written to nothing will do. Whoever writes to a pipe or a TCP socket from memory whose page
fault nobody answers holds its lock meanwhile, and no flag and no signal helps who waits there.

Knows file descriptors and threads; knows no ring and no session.
"""
from vhostpy.system.linux cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd

cdef extern from *:
    """
    #include <errno.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    enum {
        NOTIFY_SLOTS = 256,              /* writes under way at a time */
        NOTIFY_LOOK_NS = 20 * 1000000    /* a write is interrupted in its second period */
    };

    struct notify_slot {                 /* a cache line each */
        uint32_t tid;                    /* who writes; 0: free */
        uint32_t serial;                 /* which write */
        uint32_t seen;                   /* the watchdog's: found under way before */
        uint32_t padding[13];
    } __attribute__((aligned(64)));

    static struct notify_slot notify_table[NOTIFY_SLOTS];
    static uint32_t notify_high;         /* slots ever used */
    static pid_t notify_watched;         /* the process whose watchdog runs */
    static int notify_bell = -1;
    static __thread uint32_t notify_tid;
    static __thread uint32_t notify_at;

    static struct notify_slot *notify_enter(void)
    {
        if (!notify_tid)
            notify_tid = (uint32_t)syscall(SYS_gettid);
        for (uint32_t i = 0; i < NOTIFY_SLOTS; i++) {
            uint32_t at = (notify_at + i) % NOTIFY_SLOTS, none = 0;
            struct notify_slot *slot = &notify_table[at];
            if (!__atomic_compare_exchange_n(&slot->tid, &none, notify_tid, 0,
                                             __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
                continue;
            __atomic_store_n(&slot->serial, slot->serial + 1, __ATOMIC_RELEASE);
            uint32_t high = __atomic_load_n(&notify_high, __ATOMIC_RELAXED);
            while (high <= at && !__atomic_compare_exchange_n(
                       &notify_high, &high, at + 1, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
                ;
            notify_at = at;
            return slot;
        }
        return NULL;
    }

    /* 0, or the errno that says why not. */
    static int notify_write(int fd)
    {
        uint64_t one = 1;
        struct notify_slot *slot = notify_enter();
        int error;
        if (!slot)
            return EAGAIN;               /* all of them hang: better lost than late */
        error = write(fd, &one, sizeof one) < 0 ? errno : 0;
        __atomic_store_n(&slot->tid, 0, __ATOMIC_RELEASE);
        return error;
    }

    static int notify_send(int fd)
    {
        uint64_t one = 1;
        /* What is full is readable already; what is closed hears nothing. */
        return send(fd, &one, sizeof one, MSG_DONTWAIT | MSG_NOSIGNAL) > 0;
    }

    /* Takes no lock that others can hold, as getsockname() would. */
    static int notify_is_unix_socket(int fd)
    {
        int domain;
        socklen_t size = sizeof domain;
        return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX;
    }

    static void notify_interrupted(int number)
    { (void)number; }

    static int notify_number(void)
    { return SIGRTMIN + 5; }

    static void notify_interrupt(long tid)
    { syscall(SYS_tgkill, getpid(), tid, notify_number()); }

    static void notify_mask(void)
    {
        int let_through[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, notify_number()};
        sigset_t mask;
        sigfillset(&mask);
        for (size_t i = 0; i < sizeof let_through / sizeof *let_through; i++)
            sigdelset(&mask, let_through[i]);
        pthread_sigmask(SIG_SETMASK, &mask, NULL);
    }

    static void *notify_watch(void *unused)
    {
        struct timespec nap = {0, NOTIFY_LOOK_NS};
        (void)unused;
        for (;;) {
            nanosleep(&nap, NULL);
            uint32_t high = __atomic_load_n(&notify_high, __ATOMIC_ACQUIRE);
            for (uint32_t i = 0; i < high; i++) {
                struct notify_slot *slot = &notify_table[i];
                uint32_t tid = __atomic_load_n(&slot->tid, __ATOMIC_ACQUIRE);
                uint32_t serial = __atomic_load_n(&slot->serial, __ATOMIC_ACQUIRE);
                /* A thread that has just come back gets an EINTR too many at most. */
                if (tid && serial == slot->seen)
                    notify_interrupt(tid);
                slot->seen = serial;
            }
        }
        return NULL;
    }

    static int notify_start(void)
    {
        pid_t before = __atomic_load_n(&notify_watched, __ATOMIC_ACQUIRE);
        struct sigaction action;
        pthread_attr_t attributes;
        pthread_t thread;
        sigset_t all, old;
        int error;
        if (before == getpid())
            return 0;
        if (!__atomic_compare_exchange_n(&notify_watched, &before, getpid(), 0,
                                         __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return 0;
        memset(&action, 0, sizeof action);   /* no SA_RESTART: the write gives up */
        action.sa_handler = notify_interrupted;
        sigaction(notify_number(), &action, NULL);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, 64 << 10);
        error = pthread_create(&thread, &attributes, notify_watch, NULL);
        if (!error)
            pthread_setname_np(thread, "vhostpy-guard");
        else
            __atomic_store_n(&notify_watched, 0, __ATOMIC_RELEASE);
        pthread_attr_destroy(&attributes);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        return error;
    }

    /* A full counter is readable already: one more would say nothing new. */
    static int notify_has_room(int fd)
    {
        struct pollfd look = {fd, POLLOUT, 0};
        return poll(&look, 1, 0) == 1 && look.revents & POLLOUT;
    }
    """
    enum: EINTR
    int notify_bell
    int notify_write(int) nogil
    bint notify_send(int) nogil
    bint notify_is_unix_socket(int) nogil
    void notify_interrupt(long) nogil
    void notify_mask() nogil
    int notify_start() nogil
    bint notify_has_room(int) nogil

notify_bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
if notify_bell < 0:
    raise OSError("eventfd")


cdef int signal_eventfd(int fd) noexcept nogil:
    cdef int error = notify_write(fd)
    if error == 0:
        return SIGNALLED
    return BLOCKS if error == EINTR else NOT_TAKEN


cdef int signal_socket(int fd) noexcept nogil:
    return SIGNALLED if notify_send(fd) else NOT_TAKEN


cdef void sound_bell() noexcept nogil:
    notify_write(notify_bell)


cdef void start_watchdog() noexcept nogil:
    notify_start()


cdef void interrupt_thread(long tid) noexcept nogil:
    notify_interrupt(tid)


cdef void only_faults_and_interrupts() noexcept nogil:
    notify_mask()


def is_unix_socket(fd: int) -> bool:
    """Whether it is one; asks nobody who could be slow to answer."""
    return notify_is_unix_socket(fd)


def bell_fd() -> int:
    """An eventfd, readable when a ring broke or its call fd blocks: look at all rings.

    It belongs to this module: read it, don't close it.
    """
    return notify_bell


def signal_once(fd: int) -> bool:
    """Signals a front-end's eventfd or Unix socket, from control, unless it is full; False: it
    blocks.

    Control looks for room first. A worker does not: that would be another system call a
    burst, and costs only its own attacker, whose session ends.
    """
    cdef int number = fd
    cdef bint done = True
    with nogil:
        notify_start()
        if notify_is_unix_socket(number):
            notify_send(number)
        elif notify_has_room(number):
            done = signal_eventfd(number) != BLOCKS
    return done
