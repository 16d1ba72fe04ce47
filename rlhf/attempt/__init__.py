"""One attempt at a stage, as driver and ranks share it: context, signs of life, checkpoints, cost."""
