"""Allocation: which rank each matrix gets, under a parameter budget."""
