"""SAEs, a model and datasets in; measurements with standard errors and definitions out."""
