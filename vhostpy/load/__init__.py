"""Our front-end as a generator: packets for any vhost-user-net back-end, I/O for any disk."""
