/* SIGBUS on guest memory: a front-end truncated its file under us. The handler
 * puts zeros where the file was, so that the faulting thread goes on, and marks
 * the mapping poisoned, so that control ends that session; it knows mappings and
 * nothing else. Handler code calls only mmap and write, as raw system calls. */
#ifndef VHOSTPY_SIGBUS_H
#define VHOSTPY_SIGBUS_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "system/hw.h"

enum { SIGBUS_SLOTS = 65536 };   /* as many mappings as vm.max_map_count allows */

/* `version` is odd while control changes the slot. A thread that faults on a
 * mapping keeps it alive, so a slot that changes is never the one looked for. */
struct sigbus_slot {
    uint64_t begin;
    uint64_t length;       /* 0: free; a multiple of page_size */
    uint64_t page_size;
    uint32_t version;
    uint32_t poisoned;
};

static struct sigbus_slot sigbus_table[SIGBUS_SLOTS];
static uint32_t sigbus_high;          /* slots ever used: the handler looks no further */
static uint32_t sigbus_first_free;    /* no free slot below it */
static uint32_t sigbus_lock;          /* between control threads; never taken by the handler */
static int sigbus_event = -1;
static struct sigaction sigbus_before;
static uint32_t sigbus_passed_on;     /* foreign faults handed to sigbus_before */

static int sigbus_find(uint64_t address)
{
    uint32_t high = __atomic_load_n(&sigbus_high, __ATOMIC_ACQUIRE);
    for (uint32_t i = 0; i < high; i++) {
        struct sigbus_slot *slot = &sigbus_table[i];
        uint32_t version = __atomic_load_n(&slot->version, __ATOMIC_ACQUIRE);
        uint64_t begin = read_once_u64(&slot->begin);
        uint64_t length = read_once_u64(&slot->length);
        if (address - begin >= length)
            continue;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (!(version & 1) && version == __atomic_load_n(&slot->version, __ATOMIC_RELAXED))
            return (int)i;
    }
    return -1;
}

static void sigbus_mark(int index)
{
    uint64_t one = 1;
    __atomic_store_n(&sigbus_table[index].poisoned, 1, __ATOMIC_RELEASE);
    (void)!syscall(SYS_write, sigbus_event, &one, sizeof one);
}

static int sigbus_zeros(uint64_t begin, uint64_t length)
{
    return syscall(SYS_mmap, begin, length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                   -1, 0) == (long)begin;
}

/* Two threads may fault on one mapping at once: both map zeros, which is harmless. */
static int sigbus_contain(uint64_t address)
{
    int index = sigbus_find(address);
    struct sigbus_slot *slot;
    if (index < 0)
        return 0;
    slot = &sigbus_table[index];
    /* The whole mapping; one page of it where the kernel won't commit so much
     * (vm.overcommit_memory=2). Part of a huge page cannot be replaced. */
    if (!sigbus_zeros(slot->begin, slot->length)
        && !sigbus_zeros(address & ~(slot->page_size - 1), slot->page_size))
        return 0;
    sigbus_mark(index);
    return 1;
}

static void sigbus_die(void)
{
    struct sigaction fatal;
    memset(&fatal, 0, sizeof fatal);
    fatal.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &fatal, NULL);
}

static void sigbus_handler(int number, siginfo_t *info, void *context)
{
    int error = errno;
    int sent = info->si_code <= 0;       /* by kill() or raise(): no address */
    uint32_t passed_on;
    /* Zeros would not cure a misaligned access: it would fault for ever. */
    if (!sent && info->si_code != BUS_ADRALN
        && sigbus_contain((uint64_t)(uintptr_t)info->si_addr)) {
        errno = error;
        return;
    }
    passed_on = __atomic_fetch_add(&sigbus_passed_on, 1, __ATOMIC_RELAXED);
    errno = error;
    if ((sigbus_before.sa_flags & SA_SIGINFO) || (sigbus_before.sa_handler != SIG_DFL
                                                  && sigbus_before.sa_handler != SIG_IGN)) {
        /* A handler that raises again (faulthandler does) wants the process to die. */
        if (!(sent && passed_on && info->si_pid == getpid())) {
            if (sigbus_before.sa_flags & SA_SIGINFO)
                sigbus_before.sa_sigaction(number, info, context);
            else
                sigbus_before.sa_handler(number);
            return;
        }
    } else if (sent && sigbus_before.sa_handler == SIG_IGN) {
        return;
    }
    sigbus_die();                        /* a fault comes again on return, and kills */
    if (sent)
        raise(SIGBUS);
}

/* Installs the handler where it isn't: also after somebody else's (faulthandler)
 * has displaced it, which then is the one that foreign faults go to. Returns errno. */
static int sigbus_install(void)
{
    struct sigaction action, current;
    int error = 0;
    spin_lock(&sigbus_lock);
    if (sigbus_event < 0) {
        sigbus_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (sigbus_event < 0)
            error = errno;
    }
    if (!error && sigaction(SIGBUS, NULL, &current) == 0
        && !((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == sigbus_handler)) {
        memset(&action, 0, sizeof action);
        action.sa_sigaction = sigbus_handler;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigbus_before = current;
        if (sigaction(SIGBUS, &action, NULL) < 0)
            error = errno;
    }
    spin_unlock(&sigbus_lock);
    return error;
}

/* The slot of a new mapping, or -1 when the table is full. */
static int sigbus_add(void *begin, uint64_t length, uint64_t page_size)
{
    struct sigbus_slot *slot;
    uint32_t i;
    spin_lock(&sigbus_lock);
    for (i = sigbus_first_free; i < sigbus_high && sigbus_table[i].length; i++)
        ;
    sigbus_first_free = i;
    if (i == SIGBUS_SLOTS) {
        spin_unlock(&sigbus_lock);
        return -1;
    }
    slot = &sigbus_table[i];
    __atomic_fetch_add(&slot->version, 1, __ATOMIC_SEQ_CST);
    slot->page_size = page_size;
    slot->poisoned = 0;
    write_once_u64(&slot->begin, (uint64_t)(uintptr_t)begin);
    write_once_u64(&slot->length, length);
    __atomic_fetch_add(&slot->version, 1, __ATOMIC_SEQ_CST);
    sigbus_first_free = i + 1;
    if (i == sigbus_high)
        __atomic_store_n(&sigbus_high, i + 1, __ATOMIC_RELEASE);
    spin_unlock(&sigbus_lock);
    return (int)i;
}

/* Before munmap: afterwards the addresses are somebody else's. */
static void sigbus_remove(int index)
{
    struct sigbus_slot *slot = &sigbus_table[index];
    spin_lock(&sigbus_lock);
    __atomic_fetch_add(&slot->version, 1, __ATOMIC_SEQ_CST);
    write_once_u64(&slot->length, 0);
    write_once_u64(&slot->begin, 0);
    __atomic_fetch_add(&slot->version, 1, __ATOMIC_SEQ_CST);
    if ((uint32_t)index < sigbus_first_free)
        sigbus_first_free = (uint32_t)index;
    spin_unlock(&sigbus_lock);
}

static int sigbus_poisoned(int index)
{ return __atomic_load_n(&sigbus_table[index].poisoned, __ATOMIC_ACQUIRE) != 0; }

#endif
