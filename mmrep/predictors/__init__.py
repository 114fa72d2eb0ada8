"""Predictors and decoders: from the visible tokens to what is at the hidden ones. One file per kind."""
