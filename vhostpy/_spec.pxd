"""The standard's numbers: one definition each, for Cython and Python alike.

Feature bits are *bit numbers*: a mask is `1 << Feature.VERSION_1`.
"""

# virtio 1.3: "Reserved Feature Bits", "Network Device / Feature bits",
# "Block Device / Feature bits"; vhost-user: "Feature bits".
cpdef enum Feature:
    NET_CSUM = 0
    NET_GUEST_CSUM = 1
    NET_MTU = 3
    NET_MAC = 5
    NET_GUEST_TSO4 = 7
    NET_GUEST_TSO6 = 8
    NET_GUEST_ECN = 9
    NET_GUEST_UFO = 10
    NET_HOST_TSO4 = 11
    NET_HOST_TSO6 = 12
    NET_HOST_ECN = 13
    NET_HOST_UFO = 14
    NET_MRG_RXBUF = 15
    NET_STATUS = 16
    NET_CTRL_VQ = 17
    NET_CTRL_RX = 18
    NET_CTRL_VLAN = 19
    NET_GUEST_ANNOUNCE = 21
    NET_MQ = 22
    NET_CTRL_MAC_ADDR = 23
    BLK_SIZE_MAX = 1
    BLK_SEG_MAX = 2
    BLK_RO = 5
    BLK_BLK_SIZE = 6
    BLK_FLUSH = 9
    BLK_TOPOLOGY = 10
    BLK_CONFIG_WCE = 11
    BLK_MQ = 12
    BLK_DISCARD = 13
    BLK_WRITE_ZEROES = 14
    BLK_SECURE_ERASE = 16
    LOG_ALL = 26            # VHOST_F_LOG_ALL
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30  # VHOST_USER_F_PROTOCOL_FEATURES
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    RING_RESET = 40

# vhost-user: "Protocol features"
cpdef enum ProtocolFeature:
    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    GPA_ADDRESSES = 21
    SHMEM = 22
    GET_VRING_BASE_SKIP_DRAIN = 23

# virtio 1.3, "The Virtqueue Descriptor Table"
cpdef enum DescriptorFlag:
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    # virtio 1.3, "Driver and Device Ring Wrap Counters" (packed)
    DESC_AVAIL = 128
    DESC_USED = 32768

# virtio 1.3, "Driver and Device Event Suppression" (packed): Event Flags
cpdef enum EventFlag:
    EVENT_ENABLE = 0
    EVENT_DISABLE = 1
    EVENT_DESC = 2

# virtio 1.3, "The Virtqueue Available Ring" / "The Virtqueue Used Ring"
cpdef enum RingFlag:
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1

cpdef enum Limit:
    QUEUE_SIZE_MAX = 32768   # virtio 1.3, "Split Virtqueues"
    MEM_SLOTS_MAX = 509      # what QEMU itself can use (KVM's slots less its own)
    PAGE_LOG = 4096          # vhost-user, "Migration": bytes a log bit stands for
