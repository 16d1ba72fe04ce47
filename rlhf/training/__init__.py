"""Training under ZeRO-3: PPO's models, TRL's trainers, the resumable loop, its journal and checkpoints."""
