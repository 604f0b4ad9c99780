"""The back-end's state machine: messages in, steps out; no I/O."""
