"""The commands: words of the command line to a call of the API, and what is printed of it; heavy imports are inside."""
