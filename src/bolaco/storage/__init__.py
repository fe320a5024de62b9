"""Storages: how a matrix of a given rank is stored, and what that costs. One file each."""
