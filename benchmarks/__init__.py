"""Measurements that are too long for the tests: known answers, peers, and curves. Each module is a command."""
