"""The back-end's state machine: messages in, effects out; no I/O."""
