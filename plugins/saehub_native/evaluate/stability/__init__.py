"""SAEs in; how far two of them, or one under other circumstances, have the same features out."""
