"""Runs from model to result folder, each told from top to bottom in a file of its own, and the stages they share."""
