"""The recipe: the sections of a run put together, from words, presets and files."""
