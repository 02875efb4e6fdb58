"""What the operations share: choosing an implementation."""
