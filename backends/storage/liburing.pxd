"""liburing, as far as `uring` uses it."""
from libc.stdint cimport int32_t, uint8_t, uint64_t
from posix.uio cimport iovec

cdef extern from "<liburing.h>" nogil:
    struct io_uring_sq:
        unsigned int *kflags
    struct io_uring:
        io_uring_sq sq
        unsigned int flags
        int ring_fd
    struct io_uring_params:
        unsigned int flags
    struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        int fd
        uint64_t off
        uint64_t addr
        uint64_t addr3
        uint64_t user_data
    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
    struct io_uring_probe:
        pass
    int io_uring_queue_init_params(unsigned int, io_uring *, io_uring_params *)
    void io_uring_queue_exit(io_uring *)
    int io_uring_enable_rings(io_uring *)
    int io_uring_register_files(io_uring *, const int *, unsigned int)
    int io_uring_register_eventfd(io_uring *, int)
    io_uring_probe *io_uring_get_probe_ring(io_uring *)
    void io_uring_free_probe(io_uring_probe *)
    int io_uring_opcode_supported(const io_uring_probe *, int)
    io_uring_sqe *io_uring_get_sqe(io_uring *)
    unsigned int io_uring_sq_ready(const io_uring *)
    unsigned int io_uring_cq_ready(const io_uring *)
    unsigned int io_uring_peek_batch_cqe(io_uring *, io_uring_cqe **, unsigned int)
    void io_uring_cq_advance(io_uring *, unsigned int)
    int io_uring_submit_and_get_events(io_uring *)
    int io_uring_submit(io_uring *)
    int io_uring_cq_eventfd_toggle(io_uring *, bint)
    void io_uring_prep_read(io_uring_sqe *, int, void *, unsigned int, uint64_t)
    void io_uring_prep_write(io_uring_sqe *, int, const void *, unsigned int, uint64_t)
    void io_uring_prep_readv(io_uring_sqe *, int, const iovec *, unsigned int, uint64_t)
    void io_uring_prep_writev(io_uring_sqe *, int, const iovec *, unsigned int, uint64_t)
    void io_uring_prep_fsync(io_uring_sqe *, int, unsigned int)
    void io_uring_prep_fallocate(io_uring_sqe *, int, int, uint64_t, uint64_t)
    void io_uring_prep_rw(int, io_uring_sqe *, int, const void *, unsigned int, uint64_t)
    unsigned int IORING_SETUP_R_DISABLED, IORING_SETUP_SUBMIT_ALL, IORING_SETUP_COOP_TASKRUN
    unsigned int IORING_SETUP_TASKRUN_FLAG, IORING_SETUP_SINGLE_ISSUER
    unsigned int IORING_SETUP_DEFER_TASKRUN
    unsigned int IORING_SQ_TASKRUN, IORING_SQ_CQ_OVERFLOW, IORING_FSYNC_DATASYNC
    uint8_t IOSQE_FIXED_FILE, IOSQE_ASYNC
    int IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV, IORING_OP_WRITEV
    int IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_URING_CMD
