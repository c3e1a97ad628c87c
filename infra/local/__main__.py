"""``python -m infra.local``: the stack without the application."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from infra.local import supervisor
from infra.local.progress import shown
from infra.local.stack import Stack, StackStatus
from infra.local.state import Phase, StackConfig, StackError, default_data_dir


def main() -> int:
    """Run a command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.local", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status", "env", "restart", "supervise"])
    parser.add_argument("name", nargs="?", help="process to restart")
    parser.add_argument("--home", type=Path, default=default_data_dir(), help="data directory (%(default)s)")
    parser.add_argument("--nodes", type=int, choices=[1, 3], default=1, help="size of the stack")
    parser.add_argument("--fresh", action="store_true", help="start with an empty data directory")
    parser.add_argument("--detach", action="store_true", help="return when ready and leave the stack running")
    arguments = parser.parse_args()
    if arguments.command == "supervise":
        supervisor.main()
        return 0
    stack = Stack.open(StackConfig(nodes=arguments.nodes, data_dir=arguments.home))
    try:
        return _run(stack, arguments)
    except StackError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        stack.down()
        return 130


def _run(stack: Stack, arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "up":
            with shown() as say:
                _show(stack.up(detach=arguments.detach, fresh=arguments.fresh, say=say))
            return 0 if arguments.detach or stack.wait().state is Phase.STOPPED else 1
        case "down":
            stack.down()
            return 0
        case "restart":
            stack.restart(arguments.name or "")
            return 0
        case "env":
            sys.stdout.writelines(f"{name}={value}\n" for name, value in stack.environment().items())
            return 0
        case _:
            status = stack.status()
            _show(status)
            return 0 if status.state is Phase.READY else 1


def _show(status: StackStatus) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"stack: {status.state}")
    for process in status.processes:
        rss = f"{process.rss_bytes / 1e6:.0f} MB" if process.rss_bytes is not None else "-"
        crashes = f", {process.crashes} crashes" if process.crashes else ""
        console.print(
            f"{process.name:16} {process.state:10} {process.pid or '-':>8} {rss:>8} {process.address or ''}{crashes}"
        )
        if process.error is not None:
            console.print(process.error)
    if status.error is not None:
        console.print(status.error)


if __name__ == "__main__":
    sys.exit(main())
