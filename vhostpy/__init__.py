"""vhostpy: a vhost-user back-end for virtio-net and virtio-blk."""
