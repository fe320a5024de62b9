"""What a run shows: tables in the terminal, the model card in the folder."""
