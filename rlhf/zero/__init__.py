"""DeepSpeed ZeRO: engines, sharded loading, gathering, in-stage checkpoints; nothing else imports DeepSpeed."""
