"""``python -m tasks.continual --config FILE``: run a protocol, or what is left of it, and write its tables."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.continual.cli import one_line_errors, parse
from tasks.continual.protocol import run
from tasks.continual.report import write_report


def main(args: Sequence[str] | None = None) -> None:
    """Run it. Errors of ours end with one line on stderr and exit status 1, wrong usage with 2."""
    with one_line_errors():
        cli = parse(args)
        results = run(cli.trainer, cli.model, cli.datamodule)
        if cli.trainer.is_global_zero:
            print(write_report(results, cli.model.tables))


if __name__ == "__main__":
    main()
