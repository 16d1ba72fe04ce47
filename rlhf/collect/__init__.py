"""Collecting people's rankings: a local web page, a journal that loses no answer, and comparison sets out of it."""
