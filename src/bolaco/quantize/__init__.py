"""Matrices in few bits: integer codes on a grid, rounded to nearest or with error feedback (GPTQ)."""
