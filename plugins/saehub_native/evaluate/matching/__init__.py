"""Two dictionaries in; which latent of one belongs to which of the other, and a bound on how much better any other answer could be, out."""
