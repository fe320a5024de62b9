"""From a model to a smaller or sparser model of the same architecture, without factors."""
