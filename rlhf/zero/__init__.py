"""DeepSpeed ZeRO-3: engines, sharded loading, gathering, in-stage checkpoints; nothing else imports DeepSpeed."""
