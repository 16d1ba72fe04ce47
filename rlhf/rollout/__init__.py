"""Sampling responses from the policy, and the experience that PPO learns from."""
