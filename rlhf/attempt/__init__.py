"""One attempt at a stage, as driver and ranks share it: context, folder, signs of life, checkpoints."""
