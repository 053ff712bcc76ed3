"""Keeps the last snapshots of a run, in CPU memory or in files that survive the process."""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_bigopt.callbacks.step_guard.whole_file import save_whole
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.engine.update import Restorable
from lightning_bigopt.trainer_access import output_paths, strategies

__all__ = ["KeptSnapshot", "SnapshotStore"]

_VERSION = 1


@dataclass(kw_only=True)
class KeptSnapshot:
    """A snapshot with its place in the run; the same on all processes but for its contents.

    Args:
        number: Number of the snapshot in the run.
        token: Random identifier of the fit in which the snapshot was taken.
        steps: The Trainer's ``global_step``.
        samples: Samples consumed, over all processes.
        batches: Batches of one process consumed.
        snapshot: The snapshot; None if a file holds it.
        state: Its state from a checkpoint, until it is needed.
    """

    number: int
    token: str
    steps: int
    samples: int
    batches: int
    snapshot: Restorable | None = None
    state: dict[str, Any] | None = None

    def place(self) -> dict[str, Any]:
        """Returns the place in the run as plain data."""
        names = ("number", "token", "steps", "samples", "batches")
        return {name: getattr(self, name) for name in names}


class SnapshotStore:
    """The last snapshots of a run.

    With a folder each process writes a file for each snapshot, as a whole or not at all, in the
    background. A file is deleted when neither the run nor the two checkpoints saved last need it.

    Args:
        folder: The folder; None for CPU memory.
        keep: Number of snapshots.
        with_loaders: Whether snapshots hold the states of the loaders.
    """

    def __init__(self, folder: str | None, keep: int, *, with_loaders: bool) -> None:
        self.folder, self._keep, self._with_loaders = folder, keep, with_loaders
        # Of the fit.
        self._rank = self._world_size = 0
        self._token, self._is_sharded = "", False
        self._has_written = self._has_warned = False
        self.clear()

    def clear(self) -> None:
        """Drops all snapshots."""
        self.kept: list[KeptSnapshot] = []
        self._next = 0
        self._needed: list[set[int]] = []  # by checkpoints
        self._files = set[int]()  # the numbers of the files
        self._has_ended = False  # the fit in which they were taken
        self._writing: Future[None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies must not contain the fit.
        fresh = type(self)(self.folder, self._keep, with_loaders=self._with_loaders)
        return {**vars(fresh), "_next": self._next, "_files": set(self._files)}

    # ------------------------------------------------------------------------ start and end

    def start(self, fit: Fit) -> None:
        """Checks the folder, and drops snapshots that cannot be restored here; a collective.

        Raises:
            ValueError: If a process cannot write to the folder.
        """
        trainer = fit.trainer
        if self._has_ended:  # the weights may have been replaced since the last fit
            self.kept, self._has_ended = [], False
        # Not drawn from the generators of the run, which it would advance.
        self._token = str(trainer.strategy.broadcast(uuid4().hex))
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._is_sharded = strategies.shards_gradients(trainer) and trainer.world_size > 1
        problem = "" if self.folder is None else output_paths.folder_problem(self.folder)
        error = None
        if problem:
            error = ValueError(
                f"to must be a folder that can be written to, got {self.folder!r}, {problem}; "
                "choose another folder, or 'memory'"
            )
        output_paths.raise_on_every_process(trainer, error, name="to")
        if self.folder is None and self._is_sharded:
            rank_zero_info(
                "RollBack(to='memory'): checkpoints do not hold the snapshots of a sharded model; "
                "after a resume new ones are taken. Write to='snapshots' to keep them."
            )
        self.drop_lost(fit)

    def drop_lost(self, fit: Fit) -> None:
        """Drops snapshots that a process cannot restore, and logs their number; a collective."""
        if not self.kept:
            return
        self.wait()
        trainer = fit.trainer
        mine = [float(self._is_available(kept)) for kept in self.kept]
        found = strategies.sum_over_data_(
            trainer, torch.tensor(mine, device=trainer.strategy.root_device)
        )
        available = [n >= strategies.data_parallel_size(trainer) for n in found.tolist()]
        lost = len(available) - sum(available)
        self.kept = [kept for kept, is_here in zip(self.kept, available, strict=True) if is_here]
        if lost:
            rank_zero_info(
                f"RollBack: {lost} of {len(available)} snapshots cannot be used: their files are "
                "missing or damaged, or RollBack(to=) or the number of processes has changed."
            )

    def _is_available(self, kept: KeptSnapshot) -> bool:
        if kept.snapshot is not None:
            return True
        if kept.state is not None:
            return self._fits(kept.state, kept)
        if self.folder is None:
            return False
        try:
            return self._fits(self._load(kept.number), kept)
        except Exception:  # noqa: BLE001  # a damaged file is as good as none
            return False

    def _fits(self, state: dict[str, Any], kept: KeptSnapshot) -> bool:
        # One process, or equal replicas, restore the state of process 0.
        is_same = state["world_size"] == self._world_size or not self._is_sharded
        return state["version"] == _VERSION and is_same and state["place"] == kept.place()

    def end(self) -> None:
        """Waits for the file that is being written, and releases the snapshots of the fit."""
        self.wait()
        self._has_ended = True
        for kept in self.kept:
            if kept.snapshot is not None:
                kept.state = self._contents(kept)
            kept.snapshot = None

    # ---------------------------------------------------------------------------- snapshots

    def take(self, fit: Fit) -> None:
        """Takes a snapshot; drops the oldest ones if there are more than ``keep``."""
        clock = fit.clock
        del self.kept[: max(0, len(self.kept) - self._keep + 1)]  # first, to free its memory
        kept = KeptSnapshot(
            number=self._next,
            token=self._token,
            steps=fit.trainer.global_step,
            samples=clock.samples,
            batches=clock.batches,
            snapshot=fit.take_snapshot(portable=True, with_loaders=self._with_loaders),
        )
        self._next += 1
        self.kept.append(kept)
        if self.folder is not None:
            self.wait()
            pool = ThreadPoolExecutor(1)
            self._writing = pool.submit(self._write, kept)
            pool.shutdown(wait=False)
            self._files.add(kept.number)
            self._remove_unneeded()

    def drop_newest(self) -> None:
        """Drops the newest snapshot."""
        self.kept.pop()

    def restorable(self, fit: Fit, kept: KeptSnapshot) -> Restorable:
        """Returns a snapshot that can be restored; reads its file if it has one."""
        self.wait()
        if kept.snapshot is None:
            state = self._load(kept.number) if kept.state is None else kept.state
            contents = dict(state["snapshot"])
            if state["rank"] != self._rank:
                # A checkpoint in one file holds the state of process 0: equal random numbers on
                # all processes would be wrong, so that theirs stay as they are.
                contents["random"] = None
            snapshot = fit.take_snapshot(state=contents)
            if self.folder is not None:
                return snapshot
            kept.snapshot, kept.state = snapshot, None
        return kept.snapshot

    def wait(self) -> None:
        """Waits for the file that is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    # -------------------------------------------------------------------------------- files

    def _contents(self, kept: KeptSnapshot) -> dict[str, Any]:
        assert kept.snapshot is not None  # checked by the callers
        return {
            "version": _VERSION,
            "world_size": self._world_size,
            "rank": self._rank,
            "place": kept.place(),
            "snapshot": kept.snapshot.state_dict(),
        }

    def _path(self, number: int) -> Path:
        assert self.folder is not None  # checked by the callers
        return Path(self.folder, f"snapshot-{number:06d}-rank{self._rank}.pt")

    def _load(self, number: int) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(
            self._path(number), map_location="cpu", weights_only=True
        )
        return state

    def _write(self, kept: KeptSnapshot) -> None:
        path = self._path(kept.number)
        try:
            save_whole(path, self._contents(kept))
            if not self._has_written:
                self._load(kept.number)  # objects that torch does not load raise here
                self._has_written = True
        except Exception as error:  # noqa: BLE001  # a full disk must not end the training
            # The snapshot stays in memory, so that all processes still have the same ones.
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"A snapshot could not be written to {str(path)!r} ({type(error).__name__}: "
                    f"{error}). It stays in memory, without another warning; repair the folder, so "
                    "that snapshots survive the process.",
                    stacklevel=2,
                )
            return
        kept.snapshot = None

    def _remove_unneeded(self) -> None:
        needed = set[int]().union({kept.number for kept in self.kept}, *self._needed)
        for number in self._files - needed:
            self._path(number).unlink(missing_ok=True)
        self._files &= needed

    # -------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Returns the places of the snapshots, and with CPU memory their contents."""
        self.wait()
        numbers = {kept.number for kept in self.kept}
        if numbers not in self._needed:
            self._needed = [*self._needed[-1:], numbers]
        snapshots = []
        for kept in self.kept:
            entry: dict[str, Any] = {"place": kept.place()}
            if self.folder is None:
                if self._is_sharded:
                    continue  # a checkpoint holds the state of process 0 only
                is_here = kept.snapshot is not None
                entry["state"] = self._contents(kept) if is_here else kept.state
            snapshots.append(entry)
        return {"next": self._next, "snapshots": snapshots, "files": sorted(self._files)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint; :meth:`start` drops what cannot be restored."""
        self.clear()
        self._next = state["next"]
        self._files = set(state["files"])
        self.kept = [
            KeptSnapshot(**entry["place"], state=entry.get("state")) for entry in state["snapshots"]
        ]
        del self.kept[: -self._keep]
        self._needed = [{kept.number for kept in self.kept}]
