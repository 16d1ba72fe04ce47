"""A pipeline from a language model, demonstrations and human rankings to an aligned model."""
