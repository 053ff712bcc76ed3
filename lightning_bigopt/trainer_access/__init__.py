"""The only reader of Trainer internals: Lightning's private names stay behind these functions."""

from lightning_bigopt.trainer_access.callbacks import (
    callbacks_of,
    checkpoint_interval,
    newest_checkpoint,
)
from lightning_bigopt.trainer_access.loaders import (
    data_in_place,
    exact_loader,
    greet_loaders,
    source_loaders,
    train_loaders,
    train_source,
)
from lightning_bigopt.trainer_access.logs import (
    should_log,
    show_on_progress_bar,
    tensorboard_writers,
)
from lightning_bigopt.trainer_access.optimizers import (
    add_scheduler,
    is_private,
    named_parameters,
    optimizer_label,
    parameter_names,
    plain_name,
    remove_schedulers,
)
from lightning_bigopt.trainer_access.position import (
    batches_that_stepped,
    closes_window,
    is_fast_dev_run,
    is_last_batch,
    ready_batches,
)
from lightning_bigopt.trainer_access.precision import (
    gradient_scaler,
    loss_scale,
    scaler_found_inf,
    unscale_gradients_,
    unscaled_loss,
)
from lightning_bigopt.trainer_access.sizes import (
    count_rows,
    epoch_batches,
    epoch_samples,
    last_batch_samples,
    micro_batch_size,
)
from lightning_bigopt.trainer_access.strategies import (
    data_parallel_size,
    data_rank,
    is_deepspeed,
    shard_group,
    shards_gradients,
    sum_over_data,
    sum_over_data_,
    watch_local_gradients,
)

__all__ = [
    "add_scheduler",
    "batches_that_stepped",
    "callbacks_of",
    "checkpoint_interval",
    "closes_window",
    "count_rows",
    "data_in_place",
    "data_parallel_size",
    "data_rank",
    "epoch_batches",
    "epoch_samples",
    "exact_loader",
    "gradient_scaler",
    "greet_loaders",
    "is_deepspeed",
    "is_fast_dev_run",
    "is_last_batch",
    "is_private",
    "last_batch_samples",
    "loss_scale",
    "micro_batch_size",
    "named_parameters",
    "newest_checkpoint",
    "optimizer_label",
    "parameter_names",
    "plain_name",
    "ready_batches",
    "remove_schedulers",
    "scaler_found_inf",
    "shard_group",
    "shards_gradients",
    "should_log",
    "show_on_progress_bar",
    "source_loaders",
    "sum_over_data",
    "sum_over_data_",
    "tensorboard_writers",
    "train_loaders",
    "train_source",
    "unscale_gradients_",
    "unscaled_loss",
    "watch_local_gradients",
]
