"""What every room stands on: the C library, fds, signals, threads, lines for people."""
