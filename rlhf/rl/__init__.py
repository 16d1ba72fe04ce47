"""PPO's mathematics: pure functions of tensors, with no model, no rank and no input or output."""
