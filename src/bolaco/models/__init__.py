"""Models: loading one from any source, the matrices inside it, running its blocks, and its compressed form."""
