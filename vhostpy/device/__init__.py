"""What a type of device says to the core."""
