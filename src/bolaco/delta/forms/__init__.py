"""Forms of the delta of one matrix, one file each; the folder is their list."""
