"""The other end: what QEMU does, for `load` and the tests."""
