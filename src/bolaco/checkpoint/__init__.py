"""Checkpoints: a normal Hugging Face folder that carries its own modelling code."""
