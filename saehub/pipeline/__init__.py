"""A checked recipe in; a plan of content-addressed stages and a finished run folder out."""
