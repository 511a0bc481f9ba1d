"""The command line: `millirec serve`, and whatever commands the installed packages add."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.metadata import entry_points
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from app.auth import is_loopback
from app.settings import Settings

PLUGINS = "millirec.commands"


def fail(message: str) -> NoReturn:
    """Ends the command with one line on stderr and exit status 2."""
    typer.echo(f"millirec: {message}", err=True)
    raise typer.Exit(2)


class Commands(TyperGroup):
    """The commands of this module and those of the entry point group `millirec.commands`, each a function for typer.

    A command is imported when it is called or described, so that `serve` does not wait for what training imports.
    """

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted({*super().list_commands(ctx), *entry_points(group=PLUGINS).names})

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if (own := super().get_command(ctx, cmd_name)) or cmd_name not in entry_points(group=PLUGINS).names:
            return own
        plugin = typer.Typer(add_completion=False)
        try:
            plugin.command(cmd_name)(entry_points(group=PLUGINS)[cmd_name].load())
        except Exception as error:
            anything = {"allow_extra_args": True, "ignore_unknown_options": True}
            plugin.command(cmd_name, context_settings=anything)(_broken(cmd_name, error))
        return typer.main.get_command(plugin)


def _broken(name: str, error: Exception) -> Callable[[], None]:
    def broken() -> None:
        fail(f"the command {name} cannot be loaded: {error!r}")

    broken.__doc__ = f"Cannot be loaded: {error!r}"
    return broken


cli = typer.Typer(
    cls=Commands, help="Recommendations in milliseconds.", no_args_is_help=True, pretty_exceptions_enable=False
)


def _settings() -> Settings:
    try:
        return Settings()
    except SettingsError as error:
        fail(str(error))
    except ValidationError as error:
        # Neither the value nor the whole location: both may hold an API key.
        wrong = (f"{_variable(str(each['loc'][0]))}: {each['msg']}" for each in error.errors())
        fail("; ".join(wrong))


def _variable(field: str) -> str:
    return f"MILLIREC_{field.upper()}"


@cli.command()
def settings() -> None:
    """Show every setting with its value."""
    current = _settings()
    table = Table("Variable", "Value", "What it sets")
    for name, field in Settings.model_fields.items():
        value = getattr(current, name)
        shown = str(value) if field.repr else "(set)" if value else ""
        table.add_row(_variable(name), shown, field.description)
    Console(markup=False).print(table)


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback MILLIREC_API_KEYS is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
) -> None:
    """Serve the current bundle over HTTP; without MILLIREC_REDIS_URL with an embedded Valkey."""
    chosen = _settings()
    if not chosen.api_keys and not is_loopback(host):
        fail(f"without MILLIREC_API_KEYS only loopback can be served, not {host}")
    # Without this, SIGTERM would end the process before what is left below has run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as running:
        listener = running.enter_context(_listen(host, port))

        # Seconds of imports, for which nothing above should wait.
        import uvicorn
        from uvicorn.supervisors import Multiprocess

        from app.bundle import BundleError, current, open_bundle
        from app.embedded import EmbeddedError, embedded_valkey

        version = current(chosen.bundles)
        if version is None:
            fail(f"no bundle is active in {chosen.bundles}; `millirec train` or `millirec demo` makes one")
        try:
            open_bundle(chosen.bundles / version)
            if chosen.redis_url is None:
                os.environ[_variable("redis_url")] = running.enter_context(embedded_valkey(chosen.home))
        except BundleError as error:
            fail(f"the bundle cannot be served: {error}")
        except EmbeddedError as error:
            fail(str(error))
        if workers > 1:
            folder = running.enter_context(tempfile.TemporaryDirectory(prefix="millirec-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        config = uvicorn.Config(
            "app.main:app_from_env",
            factory=True,
            workers=workers,
            loop="uvloop",
            http="httptools",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=10,
            timeout_worker_healthcheck=30,
        )
        address = f"[{host}]" if ":" in host else host
        typer.echo(f"millirec: serving on http://{address}:{listener.getsockname()[1]}", err=True)
        with suppress(KeyboardInterrupt):
            if workers > 1:
                Multiprocess(config, sockets=[listener]).run()
            else:
                uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror}")


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
