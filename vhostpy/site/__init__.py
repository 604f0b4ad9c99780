"""What one process runs, and how it is asked and told."""
