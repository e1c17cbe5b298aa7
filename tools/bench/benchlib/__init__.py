"""What the benchmark scripts of the folder above share."""
