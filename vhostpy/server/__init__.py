"""Sockets and what is done for their sessions."""
