"""Which io_uring this kernel has, and how a channel's ring is set up for it."""

cdef unsigned int setup_flags(int setup) noexcept nogil
# io_uring_params.flags of what choose_setup() said.
