"""Losses, perplexity, tasks and speed of dense and compressed models."""
