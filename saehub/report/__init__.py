"""A run folder in; tables for the terminal, one offline HTML page and a run card out."""
