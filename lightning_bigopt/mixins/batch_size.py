"""BatchSizePolicyMixin."""

from __future__ import annotations

from lightning_bigopt.batching import BatchSizePolicy
from lightning_bigopt.callbacks.batch_size import BatchSizeScheduler
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["BatchSizePolicyMixin"]


class BatchSizePolicyMixin(OwnedCallbackMixin):
    """A LightningModule that owns its batch-size policy; stands before it among the bases.

    The module says which policy in :meth:`configure_batch_size_policy`; everything else is
    :class:`BatchSizeScheduler`, whose code this drives.

    Raises:
        ValueError: If the Trainer holds a BatchSizeScheduler too.

    Example:
        >>> import lightning as L
        >>> from lightning_bigopt import BatchSizePolicyMixin, ConstantBatchSize
        >>> class Model(BatchSizePolicyMixin, L.LightningModule):
        ...     def configure_batch_size_policy(self):
        ...         return ConstantBatchSize(size=256)
        >>> Model().configure_batch_size_policy()
        ConstantBatchSize(size=256)
    """

    owns = (BatchSizeScheduler, "configure_batch_size_policy")

    def configure_batch_size_policy(self) -> BatchSizePolicy | BatchSizeScheduler:
        """The global batch of every update, or a whole :class:`BatchSizeScheduler`."""
        raise TypeError(
            f"{type(self).__name__} must define configure_batch_size_policy, got "
            "BatchSizePolicyMixin without it; return a BatchSizePolicy"
        )
