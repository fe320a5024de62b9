"""Ways to make a delta small, one file each; the folder is their list."""
