"""The commands `objdrive serve` and `objdrive api-key`."""

import argparse
import json
from pathlib import Path
from typing import Any

from objdrive.errors import ObjdriveError
from serve.hosts import is_loopback


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to those of `objdrive`."""
    _add_serve(commands.add_parser("serve", help="answer the HTTP API on this machine"))
    _add_api_key(commands.add_parser("api-key", help="make an API key"))


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, help="the store's address")
    parser.add_argument("--base", default="", help="(default: the one that the store's objects were fine-tuned on)")
    parser.add_argument("--clip", help="folder or hub id of the CLIP with the image tower, for bases without one")
    parser.add_argument("--vae", help="folder or hub id of an autoencoder in place of the base's own")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="file of the API keys; 'objdrive api-key' makes its entries"
    )
    who.add_argument("--no-auth", action="store_true", help="need no API keys, and answer only this machine")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as batch_size=4"
    )
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.no_auth and not is_loopback(arguments.host):
        raise ObjdriveError(
            f"--no-auth --host {arguments.host}: a server without keys listens on loopback addresses only; "
            "give --api-keys FILE, or --host 127.0.0.1"
        )
    # Heavy imports, which no other command needs.
    from transformers.utils.logging import disable_progress_bar

    try:
        from serve.local import run_server
    except ModuleNotFoundError as error:
        raise ObjdriveError(f"the server needs the extra `serve` ({error}): pip install 'objdrive[serve]'") from error
    from serve.settings import Settings

    disable_progress_bar()
    values: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("store", "base", "clip", "vae", "api_keys", "no_auth")
    }
    others = dict(_pair(text) for text in arguments.set)
    for name in values.keys() & others.keys():
        raise ObjdriveError(f"--set {name}={others[name]}: give the option --{name.replace('_', '-')} instead")
    settings = Settings.of(**values, **others)
    run_server(settings, arguments.host, arguments.port)
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ObjdriveError(f"--set {text}: give NAME=VALUE")
    return name, value


def _add_api_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="whose key it is")
    parser.add_argument("--prefix", default="", help="the key sees only objects whose ids begin with this")
    parser.set_defaults(run=_api_key)


def _api_key(arguments: argparse.Namespace) -> int:
    from serve.auth import new_key

    secret, entry = new_key(arguments.name, prefix=arguments.prefix)
    # Quoted: a name such as 2024 is a number to YAML, and so is a hash such as 12e34...
    fields = {"name": entry.name, "sha256": entry.sha256} | ({"prefix": entry.prefix} if entry.prefix else {})
    quoted = ", ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    print(f"# The key, shown only this once: {secret}")
    print(f'# Its entry in the key file, under "keys:":\n- {{{quoted}}}')
    return 0
