"""BatchSizeScheduler: sets the global batch size of every update by a policy."""

from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler

__all__ = ["BatchSizeScheduler"]
