"""The stages of the pipeline; each file reads as its algorithm."""
