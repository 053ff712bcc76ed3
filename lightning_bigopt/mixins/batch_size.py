"""BatchSizePolicyMixin: a LightningModule that defines its batch-size policy."""

from __future__ import annotations

from lightning_bigopt.batching.policies.batch_size_policy import BatchSizePolicy
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.mixins.base import OwnedCallbackMixin

__all__ = ["BatchSizePolicyMixin"]


class BatchSizePolicyMixin(OwnedCallbackMixin):
    """A mixin for a LightningModule that defines its batch-size policy.

    List it before LightningModule among the base classes. The module returns its policy from
    :meth:`configure_batch_size_policy`; the mixin adds a :class:`BatchSizeScheduler` with it.

    Raises:
        TypeError: If it is listed after LightningModule.
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
        """Returns the policy, or a :class:`BatchSizeScheduler` with all its arguments."""
        raise TypeError(
            f"{type(self).__name__} must define configure_batch_size_policy, got "
            "BatchSizePolicyMixin without it; return a BatchSizePolicy"
        )
