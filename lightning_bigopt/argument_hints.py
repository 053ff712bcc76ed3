"""The arguments of other libraries, with what to write in this package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["EXAMPLES", "HINTS", "Hint"]


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Advice for an argument that another library has.

    Args:
        names: Names of the argument elsewhere.
        text: What to write here. ``{value}`` stands for the value that was passed, ``{cls}`` for
            the name of the class.
        parameter: The argument of this package that the hint is about; the hint is given only by
            classes that have it. None for any class.
        classes: Names of the classes that give the hint, base classes included; empty for all.
    """

    names: frozenset[str]
    text: str
    parameter: str | None = None
    classes: frozenset[str] = frozenset()

    def fits(self, cls: type, name: str, parameters: Iterable[str]) -> bool:
        """Returns whether a class that does not have the argument ``name`` gives this hint."""
        bases = {base.__name__ for base in cls.__mro__}
        return (
            name in self.names
            and (self.parameter is None or self.parameter in parameters)
            and (not self.classes or bool(bases & self.classes))
        )


def _hint(names: str, text: str, *, parameter: str | None = None, classes: str = "") -> Hint:
    return Hint(
        names=frozenset(names.split()),
        text=text,
        parameter=parameter,
        classes=frozenset(classes.split()),
    )


# The first hint that fits is given, so that those for a class precede those for any class.
HINTS: tuple[Hint, ...] = (
    # ------------------------------------------------------------------------------ schedules
    _hint(
        "warmup_steps num_warmup_steps n_warmup_steps warmup_num_steps warmup_iters lr_warmup_iters"
        " num_warmup",
        "write warmup={value}: an int is a number of updates, '5%' a fraction of the run",
        parameter="warmup",
    ),
    _hint(
        "warmup_ratio warmup_fraction pct_start",
        "write warmup={value}: a float is a fraction of the run",
        parameter="warmup",
    ),
    _hint("warmup_epochs warmup_t", "write warmup='{value} epochs'", parameter="warmup"),
    _hint(
        "milestones gamma",
        "write each milestone with its factor: MultiStep({{'30 epochs': 0.1, '80 epochs': 0.01}})",
        classes="MultiStep",
    ),
    _hint(
        "gamma decay_rate factor",
        "write decay={value}, the factor of one step",
        classes="StepDecay Exponential",
    ),
    _hint(
        "step_size decay_steps decay_t decay_epochs",
        "write every={value}: an int is a number of updates; for epochs write "
        "every='{value} epochs'",
        classes="StepDecay Exponential",
    ),
    _hint(
        "decay_steps num_decay_steps lr_decay_iters cooldown_steps decay_ratio cooldown_fraction",
        "write decay={value}: an int is a number of updates, a float a fraction of the run",
        parameter="decay",
    ),
    _hint(
        "T_0 t_initial cycle_length first_cycle_steps",
        "write first_cycle={value}: an int is a number of updates",
        parameter="first_cycle",
    ),
    _hint(
        "num_cycles cycles n_cycles",
        "write first_cycle=1 / {value}: a float is a fraction of the run",
        parameter="first_cycle",
    ),
    _hint(
        "d_model model_size",
        "remove it: the optimizer's lr is the peak learning rate, which torch users compute as "
        "(d_model * warmup) ** -0.5",
        classes="Noam",
    ),
    _hint(
        "T_mult cycle_mult cycle_mul",
        "write cycle_multiplier={value}",
        parameter="cycle_multiplier",
    ),
    _hint("gamma cycle_decay_rate", "write cycle_decay={value}", parameter="cycle_decay"),
    _hint(
        "step_size_up up_steps",
        "write up={value}: an int is a number of updates",
        parameter="up",
    ),
    _hint(
        "step_size_down down_steps",
        "write down={value}: an int is a number of updates",
        parameter="down",
    ),
    _hint(
        "div_factor initial_div_factor",
        "write start=1 / {value}, a factor of the peak learning rate",
        parameter="start",
    ),
    _hint(
        "final_div_factor",
        "write end=..., a factor of the peak learning rate; torch divides by div_factor × {value}",
        parameter="end",
    ),
    _hint(
        "start_factor warmup_init_factor init_factor alpha_i",
        "write start={value}, a factor of the learning rate of the optimizer",
        parameter="start",
    ),
    _hint(
        "end_factor final_factor min_lr_ratio min_lr_rate alpha_f min_factor",
        "write end={value}, a factor of the learning rate of the optimizer",
        parameter="end",
    ),
    _hint(
        "eta_min min_lr lr_min end_lr lr_end final_lr",
        "write LearningRateScheduler({cls}(...), min_lr={value}); schedules return factors of the "
        "learning rate of the optimizer",
        classes="Schedule",
    ),
    _hint(
        "max_lr peak_lr base_lr lr learning_rate initial_lr lr_max",
        "set the peak as lr of the optimizer; schedules return factors of it",
        classes="Schedule",
    ),
    _hint(
        "T_max total_steps max_steps num_training_steps total_iters max_iters epochs max_epochs "
        "steps_per_epoch num_steps decay_iters max_t",
        "remove it: a schedule ends with the training; set max_steps or max_epochs of the Trainer",
        classes="Schedule",
    ),
    _hint(
        "last_epoch verbose optimizer interval frequency cycle_momentum",
        "remove it: LearningRateScheduler({cls}(...)) writes the learning rate of every update and "
        "resumes",
        classes="Schedule",
    ),
    # ------------------------------------------------------------------ callbacks of schedules
    _hint(
        "warmup warmup_steps num_warmup_steps warmup_ratio warmup_epochs decay end start",
        "it belongs to the schedule, as in LearningRateScheduler(WarmupCosine(warmup='5%'))",
        classes="LearningRateScheduler",
    ),
    _hint(
        "scheduler lr_scheduler lr_lambda",
        "write schedule=..., for example LearningRateScheduler(WarmupCosine())",
        classes="LearningRateScheduler",
    ),
    _hint("name parameter key", "write field={value}", parameter="field"),
    _hint(
        "lr learning_rate peak_lr",
        "set lr of the optimizer; the schedule returns factors of it",
        classes="LearningRateScheduler",
    ),
    _hint(
        "optimizer interval frequency monitor strict name last_epoch",
        "remove it: the callback writes the learning rate of every update of every optimizer",
        classes="LearningRateScheduler HyperparameterScheduler",
    ),
    _hint(
        "eta_min lr_min",
        "write min_lr={value}, an absolute learning rate",
        classes="LearningRateScheduler",
    ),
    _hint(
        "total_steps max_steps num_training_steps T_max epochs max_epochs",
        "set max_steps or max_epochs of the Trainer, or write budget='2e6 samples'",
        parameter="budget",
    ),
    _hint(
        "min_lr",
        "write min_factor=..., a factor; LearningRateScheduler(..., min_lr={value}) bounds the "
        "learning rate itself",
        classes="ReduceOnPlateau",
    ),
    _hint(
        "optimizer verbose eps",
        "remove it: the callback reduces the learning rates of all optimizers",
        classes="ReduceOnPlateau",
    ),
    _hint("metric", "write monitor={value}", parameter="monitor"),
    # ------------------------------------------------------------------------------- clipping
    _hint(
        "max_norm max_grad_norm gradient_clip_val clip_norm clip_grad grad_clip clip_grad_norm",
        "write GradientClipping(NormClip(max_norm={value}))",
        classes="GradientClipping",
    ),
    _hint(
        "clip_value max_abs clip_grad_value",
        "write GradientClipping(ValueClip(max_abs={value}))",
        classes="GradientClipping",
    ),
    _hint(
        "gradient_clip_algorithm algorithm norm_type",
        "choose a rule: GradientClipping(NormClip()) for 'norm', GradientClipping(ValueClip()) for "
        "'value'",
        classes="GradientClipping",
    ),
    _hint(
        "max_grad_norm gradient_clip_val clip_norm clip_val threshold max_value",
        "write max_norm={value}",
        parameter="max_norm",
    ),
    _hint(
        "clip_value max_value gradient_clip_val threshold",
        "write max_abs={value}",
        parameter="max_abs",
    ),
    _hint("clipping clip_coef", "write clip_factor={value}", parameter="clip_factor"),
    _hint("z_thresh", "write z_threshold={value}", parameter="z_threshold"),
    _hint("matrix_approximation_rank r", "write rank={value}", classes="PowerSGD"),
    _hint("k ratio density compress_ratio", "write keep=0.01, a fraction", classes="TopK"),
    _hint(
        "start_powerSGD_iter start_iter warmup_steps",
        "write start={value}: an int is a number of updates, '5%' a fraction of the run",
        classes="Compressor",
    ),
    _hint("decay beta", "write half_life=ln(2) / (1 - decay) in updates", classes="EMA"),
    # ------------------------------------------------------------------------------ step guard
    _hint("detector", "write detectors=[...]", parameter="detectors"),
    _hint("action", "write actions=[...]", parameter="actions"),
    _hint(
        "patience max_skip max_skips max_bad_steps",
        "write max_consecutive={value}",
        parameter="max_consecutive",
    ),
    # ------------------------------------------------------------------------------ batch size
    _hint(
        "batch_size global_batch_size size",
        "write BatchSizeScheduler(ConstantBatchSize({value}))",
        classes="BatchSizeScheduler",
    ),
    _hint(
        "sizes milestones steps rampup_batch_size",
        "write BatchSizeScheduler(BatchSizeSteps({{'0%': 32, '50%': 64}})), or a BatchSizeRamp",
        classes="BatchSizeScheduler",
    ),
    _hint(
        "accumulate_grad_batches gradient_accumulation_steps",
        "the accumulation follows from the global batch size in the policy; remove it",
        classes="BatchSizeScheduler BatchSizePolicy",
    ),
    _hint("batch_size global_batch_size", "write size={value}", parameter="size"),
    _hint("batch_size", "write micro_batch_size={value}", parameter="micro_batch_size"),
    _hint("stop end_size max_size", "write end={value}", classes="BatchSizeRamp"),
    _hint(
        "pin_memory persistent_workers prefetch_factor timeout worker_init_fn",
        "pass it to the inner DataLoader: options={{...: {value}}}",
        classes="GlobalBatchLoader",
    ),
    _hint(
        "drop_last",
        "write tail='drop' to leave out the samples left at the end of an epoch, or tail='merge'",
        classes="GlobalBatchLoader",
    ),
    _hint("steps num_steps duration ramp_steps", "write over={value}", parameter="over"),
    _hint("min_size start minimum", "write low={value}", classes="NoiseScaleBatchSize"),
    _hint("max_size end maximum", "write high={value}", classes="NoiseScaleBatchSize"),
    # ------------------------------------------------------------------------ monitor, tuning
    _hint(
        "log_every_n_steps every_n_steps log_every",
        "write every={value}, a number of updates",
        classes="OptimizationMonitor",
    ),
    _hint(
        "logging_interval interval",
        "write every=10, a number of updates",
        classes="OptimizationMonitor",
    ),
    _hint(
        "every log_every_n_steps",
        "remove it: every update is measured",
        classes="GradientNoiseScale",
    ),
    _hint("min_lr", "write start={value}", classes="LearningRateRangeTest"),
    _hint("max_lr", "write end={value}", classes="LearningRateRangeTest"),
    _hint(
        "num_training num_iter num_steps", "write steps={value}", classes="LearningRateRangeTest"
    ),
    _hint("early_stop_threshold", "write stop_at={value}", classes="LearningRateRangeTest"),
    _hint("mode", "write search={value}", classes="GlobalBatchFinder"),
)
"""Advice for arguments of torch, Hugging Face, Lightning, timm and Megatron-LM."""

EXAMPLES = {
    "BatchSizeScheduler": "BatchSizeScheduler(ConstantBatchSize(256))",
    "MeasuredBatchSize": "MeasuredBatchSize(32, high=256)",
    "Chain": "Chain([('50%', Linear()), Cosine()])",
    "GlobalBatchLoader": "GlobalBatchLoader(loader.dataset, micro_batch_size=8)",
    "GradientCompression": "GradientCompression(PowerSGD(rank=1))",
    "GradientClipping": "GradientClipping(NormClip(max_norm=1.0))",
    "HyperparameterScheduler": "HyperparameterScheduler('weight_decay', Linear())",
    "ModelAveraging": "ModelAveraging(EMA(half_life='1%'))",
    "LearningRateScheduler": "LearningRateScheduler(WarmupCosine())",
    "Product": "Product([Linear(), Cosine()])",
    "StepGuard": "StepGuard([NonFinite(), NormSpike()])",
}
"""Calls of classes whose positional arguments are often forgotten or written in another form."""
