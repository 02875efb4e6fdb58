"""What every other package may import: array names, weighted sums, errors, random streams."""
