"""`python -m serve`: the server process.

Comes in: flags, environment, noria.toml. Goes out: an exit code. Everything heavy is imported inside `main`, after the
environment is set: the engine's process imports this module again.
"""

from __future__ import annotations

import argparse
import sys

from noria.errors import NoriaError, wire_of
from noria.settings import Settings, load_settings
from serve.logs import configure_logs


def parse(argv: list[str]) -> tuple[Settings, str | None, bool]:
    """Settings with the flags on top, the model's name, and whether to serve aside. Raises SettingsError."""
    parser = argparse.ArgumentParser(prog="python -m serve", description="Noria's server: vLLM, capture, hot swap.")
    parser.add_argument("--host", help="address to bind to")
    parser.add_argument("--http-port", type=int, help="HTTP port, 0 for a free one")
    parser.add_argument("--grpc-port", type=int, help="gRPC port, 0 for a free one")
    parser.add_argument("--model", help="version (v3) or base model to make live; default: what is live")
    parser.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="listen beyond this machine without any key: whoever reaches the port may do everything",
    )
    parser.add_argument(
        "--aside",
        action="store_true",
        help="answer beside the home's server: nothing is made live, swapped, captured or registered; HTTP only",
    )
    given = vars(parser.parse_args(argv))
    model, aside = given.pop("model"), given.pop("aside")
    server = {name: value for name, value in given.items() if value is not None}
    return load_settings(server=server or None), model, aside


def main(argv: list[str] | None = None) -> int:
    """Runs the server; the exit code is 0 after SIGTERM."""
    configure_logs()
    try:
        settings, model, aside = parse(sys.argv[1:] if argv is None else argv)
        settings.home.mkdir(parents=True, exist_ok=True)
        from serve.engine import environment

        environment.set_environment(settings)
        if not aside:
            from serve.tls import certificates_of

            certificates_of(settings.server.tls)  # a file that cannot be used is told at once
        if settings.engine.fast_start:
            environment.start_fork_server()
        import uvloop

        from serve.aside import run_aside
        from serve.process import run

        return int(uvloop.run(run_aside(settings, model) if aside else run(settings, model)))
    except NoriaError as error:
        print(f"noria: {error.message}", file=sys.stderr)
        return wire_of(error).exit_code


if __name__ == "__main__":
    sys.exit(main())
