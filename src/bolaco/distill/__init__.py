"""What a large model knows of a task, as a store that a tiny model reads (RetriKT, arXiv 2310.15594)."""
