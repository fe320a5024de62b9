"""What fine-tuning adds to a base, in few bits: made from two models, put on a base again, served beside others."""
