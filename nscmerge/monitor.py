"""What one would want to watch while coefficients are learned: TensorBoard figures, warnings, and a closing table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from rich.box import SIMPLE
from rich.table import Table

from nscmerge.console import print_table
from nscmerge.plots import heat_map

if TYPE_CHECKING:
    from nscmerge.module import MergeModule

#: Up to this many coefficients get a curve each; beyond, the spread per task is drawn.
MOST_CURVES = 400


class CoefficientMonitor(Callback):
    """Logs coefficients, learning rate and step time; warns when a coefficient leaves [0, 1].

    The null-space ratio has no bottom that marks the best merge: it goes on falling while a merge is being ruined. How
    far the coefficients have moved is therefore logged beside it.

    Args:
        every: Steps between two sets of histograms, heat map and trajectories.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._warned = self._said = False
        self._tick = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Draw the start values, and the ratios there as far as a sanity check has measured them."""
        self._draw(trainer, pl_module)
        start = {
            f"val/{pl_module.objective.quantity}/{task}": ratio for task, ratio in pl_module.validation_ratios.items()
        }
        for logger in trainer.loggers if start else ():
            logger.log_metrics(start, step=trainer.global_step)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the step's clock."""
        self._tick = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log step time, learning rate and how far the coefficients have moved."""
        module: MergeModule = pl_module
        moved = (module.coefficients.matrix() - module.coefficients.init).abs()
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        scalars = {"step_seconds": time.perf_counter() - self._tick, "lr": lr}
        scalars |= {"lam/moved_mean": float(moved.mean()), "lam/moved_max": float(moved.max())}
        module.log_dict(scalars, rank_zero_only=True)
        if module.unreached is not None and not self._said:
            self._say_unreached(module)
        if trainer.global_step % self.every == 0:
            self._draw(trainer, module)
        self._warn_outside(module)

    @rank_zero_only
    def teardown(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Print the table of what was learned, below the finished progress bar."""
        if stage == "fit":
            print_table(self._table(pl_module, trainer.global_step))

    def _say_unreached(self, module: MergeModule) -> None:
        self._said = True
        rows, names = len(module.coefficients.layers), module.unreached or []
        total = rows * len(module.tasks)
        if names:
            rank_zero_info(
                f"{len(names) * len(module.tasks)} of {total} coefficients cannot be reached from the target layers "
                f"and stay at {module.coefficients.init}: {', '.join(names)}."
            )

    def _warn_outside(self, module: MergeModule) -> None:
        matrix = module.coefficients.matrix()
        outside = ((matrix < 0) | (matrix > 1)).nonzero()
        if len(outside) and not self._warned:
            self._warned = True
            row, k = outside[0].tolist()
            rank_zero_warn(
                f"the coefficient of '{module.tasks[k]}' at layer '{module.coefficients.layers[row]}' has left [0, 1] "
                f"({float(matrix[row, k]):.3f}). The objective may be over-optimised: use fewer steps or a lower "
                "learning rate, and check the merge on a task you can score."
            )

    @rank_zero_only
    def _draw(self, trainer: lightning.Trainer, module: MergeModule) -> None:
        step, matrix = trainer.global_step, module.coefficients.matrix().cpu()
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            board = logger.experiment
            board.add_figure("lam/heat_map", heat_map(matrix, module.coefficients.layers, module.tasks), step)
            for k, task in enumerate(module.tasks):
                board.add_histogram(f"lam_histogram/{task}", matrix[:, k], step)
                if matrix.numel() <= MOST_CURVES:
                    for layer, value in zip(module.coefficients.layers, matrix[:, k].tolist(), strict=True):
                        board.add_scalar(f"lam_{task}/{layer}", value, step)
                for name, value in (
                    ("mean", matrix[:, k].mean()),
                    ("min", matrix[:, k].min()),
                    ("max", matrix[:, k].max()),
                ):
                    board.add_scalar(f"lam_{name}/{task}", value, step)

    def _table(self, module: MergeModule, steps: int) -> Table:
        table = Table(title=f"merge of {len(module.tasks)} adapters after {steps} steps", box=SIMPLE)
        quantity = module.objective.quantity
        for title in ("task", f"{quantity} at start", f"{quantity} now", "lambda", "min", "max", "outside [0, 1]"):
            table.add_column(title, justify="left" if title == "task" else "right", no_wrap=True)
        matrix = module.coefficients.matrix().cpu()
        for k, task in enumerate(module.tasks):
            own = matrix[:, k]
            ratios = (f"{r[task]:.4f}" if task in r else "-" for r in (module.first_ratios, module.validation_ratios))
            outside = int(((own < 0) | (own > 1)).sum())
            table.add_row(task, *ratios, *(f"{float(v):.3f}" for v in (own.mean(), own.min(), own.max())), str(outside))
        return table
