"""Rewards that are no model under ZeRO-3: Python functions and HTTP endpoints."""
