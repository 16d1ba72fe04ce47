"""DeepSpeed ZeRO-3: engines, sharded loading, gathering, in-stage checkpoints. The only package that imports DeepSpeed."""
