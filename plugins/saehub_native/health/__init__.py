"""The parts of `native/health`: how sound a dictionary is, whatever it reconstructs."""
