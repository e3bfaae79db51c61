"""The command `tierd`: serve, status, config.

Exit codes: 0 done; 1 the daemon cannot listen, cannot start its backend, or cannot be reached; 2 the command line or the
configuration is wrong.
"""

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import tomli_w
from rich.console import Console
from rich.table import Table
from tierd_proto.v1 import tierd_pb2 as pb
from tierd_proto.v1 import tierd_pb2_grpc

from tierd.config import Settings, load, parse_target
from tierd.engine import Engine
from tierd.errors import InvalidArgument, Unavailable
from tierd.listen import CannotListen
from tierd.server import Daemon
from tierd.warm import warm_policy, warm_up


class CommandFailed(Exception):
    """The text is for the user; exit code 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    flags = {name: getattr(parsed, name, None) for name in Settings.model_fields}
    command: Callable[[Settings, argparse.Namespace], None] = parsed.run
    try:
        command(load(flags, parsed.config), parsed)
    except InvalidArgument as error:
        print(f"tierd: {error}", file=sys.stderr)
        return 2
    except (CannotListen, CommandFailed, Unavailable) as error:
        print(f"tierd: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tierd", description="keeps quantised KV caches and answers attention with a certificate")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the daemon")
    config = commands.add_parser("config", help="print the effective configuration as TOML")
    status = commands.add_parser("status", help="ask a running daemon for its numbers")
    for command, run, names in (
        (serve, _serve, Settings.model_fields), (config, _config, Settings.model_fields), (status, _status, ["listen"]),
    ):  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML file; flags and TIERD_* variables go before it")
        for name in names:
            text = Settings.model_fields[name].description
            # Text as it is: the schema converts and checks it, as it does for the environment.
            command.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=text)
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="how long to wait for the answer")
    return parser


def _serve(settings: Settings, _: argparse.Namespace) -> None:
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_run_daemon(settings))


async def _run_daemon(settings: Settings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    engine = Engine(settings.engine())
    daemon = Daemon(settings, engine)
    target = daemon.bind()
    await asyncio.to_thread(warm_up if engine.backend == "cpu" else warm_policy)
    await daemon.start()
    if daemon.metrics_port is not None:
        print(f"metrics on http://127.0.0.1:{daemon.metrics_port}/metrics", flush=True)
    print(f"listening on {target}", flush=True)
    await stopping.wait()
    await daemon.stop()


def _config(settings: Settings, _: argparse.Namespace) -> None:
    # TOML has no null: a value that is not set is left out, which means the same when it is read.
    print(tomli_w.dumps(settings.model_dump(exclude_none=True)), end="")


def _status(settings: Settings, parsed: argparse.Namespace) -> None:
    status = _ask(settings.listen, parsed.timeout)
    if parsed.json:
        print(json.dumps(status, indent=2))
    else:
        Console().print(_table(settings.listen, status))


def _ask(target: str, timeout_s: float) -> dict[str, Any]:
    address = parse_target(target)
    name = f"unix://{address}" if isinstance(address, Path) else target
    with grpc.insecure_channel(name) as channel:
        try:
            reply = tierd_pb2_grpc.TierStub(channel).Status(pb.StatusRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise CommandFailed(f"no answer from a daemon on {target}: {error.details()}") from error
    status: dict[str, Any] = json.loads(reply.json)
    return status


def _table(target: str, status: dict[str, Any]) -> Table:
    table = Table(title=f"tierd on {target}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in status.items():
        if name == "pools":
            for pool, sizes in value.items():
                table.add_row(f"pool {pool}", f"{sizes['used_bytes']:,} of {sizes['total_bytes']:,} bytes")
        elif name == "tiering":
            table.add_row("tiering policy", str(value["policy"]))
            table.add_row("share of the host link used", f"{value['link_share']:.2%}")
        elif name == "events":
            for event, count in value.items():
                table.add_row(f"event {event}", f"{count:,}")
        else:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    return table
