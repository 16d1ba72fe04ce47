"""Strengths out of what annotators said of responses, and how well they are known."""
