"""What a virtqueue is made of, for both its ends."""
