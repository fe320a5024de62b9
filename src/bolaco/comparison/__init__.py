"""Several methods at several sizes on one model and one text, side by side."""
