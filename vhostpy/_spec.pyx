"""The standard's numbers, for Cython and Python alike; see `_spec.pxd`."""
