"""Words typed in a terminal in; data on stdout, talk on stderr and an exit code out."""
