"""The parts of `native/verdict`: from measurements to one word, with its reasons."""
