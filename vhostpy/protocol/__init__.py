"""vhost-user on the wire: bytes and types, no state, no I/O."""
