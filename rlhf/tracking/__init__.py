"""Where a stage's metrics go: a JSON lines file always, Weights & Biases on request."""
