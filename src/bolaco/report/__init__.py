"""What bolaco says about its results: tables for the terminal, model cards, charts, HTML reports, ``results.json``."""
