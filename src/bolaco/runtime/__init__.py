"""How a model is run: matrices laid out for this machine, and the same model in other runtimes."""
