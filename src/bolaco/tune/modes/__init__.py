"""The tuning modes, one file each."""
