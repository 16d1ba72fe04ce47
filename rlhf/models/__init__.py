"""Policies, reward models and value models: their folders, loading, saving, and what they compute."""
