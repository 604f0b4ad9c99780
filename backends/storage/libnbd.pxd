"""What we use of libnbd's C interface (libnbd(3))."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "<libnbd.h>" nogil:
    ctypedef struct nbd_handle "struct nbd_handle":
        pass
    ctypedef struct nbd_completion_callback:
        int (*callback)(void *user_data, int *error) noexcept nogil
        void *user_data
        void (*free)(void *user_data) noexcept nogil

    nbd_handle *nbd_create()
    void nbd_close(nbd_handle *)
    const char *nbd_get_error()
    int nbd_get_errno()

    int nbd_set_uri_allow_local_file(nbd_handle *, bint)
    int nbd_set_pread_initialize(nbd_handle *, bint)
    int nbd_set_request_structured_replies(nbd_handle *, bint)
    int nbd_aio_connect_uri(nbd_handle *, const char *)
    int nbd_poll(nbd_handle *, int timeout_ms)

    int nbd_is_read_only(nbd_handle *)
    int nbd_can_flush(nbd_handle *)
    int nbd_can_trim(nbd_handle *)
    int nbd_can_zero(nbd_handle *)
    int nbd_can_multi_conn(nbd_handle *)
    int64_t nbd_get_size(nbd_handle *)
    int64_t nbd_get_block_size(nbd_handle *, int)
    int LIBNBD_SIZE_MINIMUM, LIBNBD_SIZE_MAXIMUM

    int64_t nbd_aio_pread(nbd_handle *, void *, size_t, uint64_t, nbd_completion_callback,
                          uint32_t)
    int64_t nbd_aio_pwrite(nbd_handle *, const void *, size_t, uint64_t,
                           nbd_completion_callback, uint32_t)
    int64_t nbd_aio_flush(nbd_handle *, nbd_completion_callback, uint32_t)
    int64_t nbd_aio_trim(nbd_handle *, uint64_t, uint64_t, nbd_completion_callback, uint32_t)
    int64_t nbd_aio_zero(nbd_handle *, uint64_t, uint64_t, nbd_completion_callback, uint32_t)
    int nbd_aio_disconnect(nbd_handle *, uint32_t)
    uint32_t LIBNBD_CMD_FLAG_NO_HOLE

    int nbd_aio_get_fd(nbd_handle *)
    unsigned nbd_aio_get_direction(nbd_handle *)
    int nbd_aio_notify_read(nbd_handle *)
    int nbd_aio_notify_write(nbd_handle *)
    int nbd_aio_is_connecting(nbd_handle *)
    int nbd_aio_is_negotiating(nbd_handle *)
    int nbd_aio_is_ready(nbd_handle *)
    int nbd_aio_is_processing(nbd_handle *)
    unsigned LIBNBD_AIO_DIRECTION_READ, LIBNBD_AIO_DIRECTION_WRITE
