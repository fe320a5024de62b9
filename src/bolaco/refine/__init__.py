"""What is done to the blocks once the ranks are known: fitting, and local training."""
