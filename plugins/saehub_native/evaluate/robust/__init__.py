"""An SAE in; whether it says the same when the text is put differently, or the model or the kind of text is another one, out."""
