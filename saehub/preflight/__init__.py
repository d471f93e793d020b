"""Checks before work: is the tensor the one you think it is, and fit to train on."""
