"""Strengths of responses from ratings, rankings and comparisons, with their standard errors."""
