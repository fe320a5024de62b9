"""Files of a run: its work folder, tensors block by block, output folders that appear whole or not at all."""
