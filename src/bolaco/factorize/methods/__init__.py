"""The factorization methods, one file each."""
