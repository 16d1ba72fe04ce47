"""Training under ZeRO: PPO's models, TRL's trainers, the resumable loop, its journal and checkpoints."""
