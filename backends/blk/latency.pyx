"""How long a disk's requests take: a histogram for each operation of each queue."""
from libc.stdint cimport uint32_t, uint64_t

from vhostpy.system.hw cimport read_once_u64, ticks_per_us

from vhostpy.backends.storage.storage import Op

SHARES = {"p50_us": 0.5, "p99_us": 0.99, "p99_9_us": 0.999}

cdef double rate = 0            # ticks a microsecond


cdef object latency_bins(const Latency *latency):
    found = {}
    cdef uint64_t count
    cdef int op, index
    for op in range(OPS):
        bins = {}
        for index in range(BINS):
            count = read_once_u64(&latency.bins[op][index])
            if count:
                bins[index] = count
        if bins:
            found[Op(op).name.lower()] = bins
    return found


def add_bins(total: dict, more: dict) -> None:
    """Adds the bins of `more` to `total`."""
    for op, bins in more.items():
        sums = total.setdefault(op, {})
        for index, count in bins.items():
            sums[index] = sums.get(index, 0) + count


def summary(bins: dict) -> dict:
    """{operation: count, percentiles, and the histogram as [[up to us, count], ...]}."""
    return {op: _summary(bins[op]) for op in (o.name.lower() for o in Op) if op in bins}


def _summary(bins: dict) -> dict:
    total = sum(bins.values())
    row = {"count": total}
    for name, share in SHARES.items():
        left = max(1, -int(-share * total // 1))
        for index in sorted(bins):
            left -= bins[index]
            if left <= 0:
                row[name] = top_us(index)
                break
    row["max_us"] = top_us(max(bins))
    row["histogram_us"] = [[top_us(index), bins[index]] for index in sorted(bins)]
    return row


def top_us(uint32_t index) -> float:
    """No time in the bin is longer."""
    global rate
    cdef uint32_t exponent = index >> STEP_BITS
    cdef uint64_t low = index & ((1 << STEP_BITS) - 1)
    if rate == 0:
        rate = ticks_per_us()
    if exponent == 0:
        return round((low + 1) / rate, 3)
    low += (1 << STEP_BITS) + 1
    return round(<double>low * (<uint64_t>1 << (exponent - 1)) / rate, 3)


# Door, for tests. ----------------------------------------------------------------------

def bin_of_ticks(uint64_t elapsed) -> int:
    """Where a time of `elapsed` ticks is counted."""
    return bin_of(elapsed)
