"""Strengths out of what annotators said of responses: pairwise comparisons and the Bradley-Terry model."""
