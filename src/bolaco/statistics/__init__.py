"""Statistics of layer inputs and loss gradients: one file each, additive, estimated block by block."""
