"""Studies on two processes: python -m tests.distributed.study_scenarios FOLDER, or torchrun."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import torch

from lightning_bigopt import LearningRateScheduler, WarmupStableDecay
from lightning_bigopt.tuning import Choice, Side, compare, study
from tests.tuning.study_helpers import Network, make_data, make_trainer

# One that completes, one that is pruned and one that diverges.
RATES = (0.05, 0.2, 1e20)


class PrunesOne(optuna.pruners.BasePruner):
    """Prunes the trial with the rate 0.2 after eight updates."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.params["lr"] == 0.2 and (trial.last_step or 0) >= 8


class Records(L.Callback):
    """Keeps what each fit has trained: rate, updates, losses and weights."""

    def __init__(self) -> None:
        self.fits: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.fits.append({"lr": pl_module.lr, "from": trainer.global_step})

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        self.fits[-1] |= {"updates": trainer.global_step, "weights": repr(weights.sum().item())}


def plain_run(lr: float, **options: Any) -> str:
    L.seed_everything(0, workers=True, verbose=False)
    module, trainer = Network(lr), distributed_trainer(Records(), **options)
    trainer.fit(module, *make_data())
    return repr(float(trainer.callback_metrics["val_loss"]))


def distributed_trainer(*more: Any, **options: Any) -> L.Trainer:
    trainer = make_trainer(*more, devices=2, strategy="ddp", **options)
    trainer.callbacks[0] = LearningRateScheduler(WarmupStableDecay(warmup=2, decay="25%"))
    return trainer


def wide(lr: float = 0.05) -> Network:
    return Network(lr, width=16)


def described(found: Any) -> list[Any]:
    return [
        [t.state, t.values["lr"], repr(t.loss), t.reason, t.updates, t.updates_saved, len(t.curve)]
        for t in found.trials
    ]


def run(out: Path) -> None:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    records, branches = Records(), Records()
    found = study(
        lambda: distributed_trainer(records),
        Network,
        make_data=make_data,
        space={"lr": Choice(list(RATES))},
        trials=3,
        sampler=optuna.samplers.BruteForceSampler(seed=0),
        pruner=PrunesOne(),
        storage=out / "study.db",
    )
    trunks = study(
        lambda: distributed_trainer(branches, max_steps=24),
        Network,
        make_data=make_data,
        space={"lr": Choice([0.05])},
        trials=1,
        budgets=["50%", "100%"],
        pruner=None,
        storage=out / "trunks.journal",
    )
    seeds = Records()
    sides = [
        Side(make_trainer=lambda: distributed_trainer(seeds), make_module=make, make_data=make_data)
        for make in (Network, wide)
    ]
    first, second = (
        compare(
            *sides,
            tune="lr",
            space={"lr": Choice([0.05, 0.02])},
            trials=2,
            seeds=2,
            sampler=optuna.samplers.BruteForceSampler(seed=0),
            pruner=None,
            folder=out / "compared",
        )
        for _ in range(2)
    )
    rank = torch.distributed.get_rank()
    result = {
        "trials": described(found),
        "fits": records.fits,
        "trunk": described(trunks),
        "curve": [[step, repr(value)] for step, value in trunks.trials[0].curve],
        "branches": branches.fits,
        "plain": plain_run(0.05),
        "plain budgets": [[n, plain_run(0.05, max_steps=n)] for n in (12, 24)],
        "left": sorted(path.name for path in out.glob("*.trunks")),
        "compared": str(first),
        "compared again": str(second),
        "losses": [[repr(loss) for loss in side.losses] for side in (first.a, first.b)],
        "seeds": [[fit["lr"], fit["updates"], fit["weights"]] for fit in seeds.fits],
        "rank": int(os.environ["LOCAL_RANK"]),
    }
    (out / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
