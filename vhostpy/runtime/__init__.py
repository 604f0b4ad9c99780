"""Workers: threads that poll, and what they poll."""
