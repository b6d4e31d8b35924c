"""The `objdrive` command."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from objdrive.adapters.formats import EXPORT_FORMATS
from objdrive.adapters.store import ArtifactStore
from objdrive.base.sizes import parse_size
from objdrive.errors import ObjdriveError, StoreError

COMMANDS_GROUP = "objdrive.commands"
"""Entry points of this group add commands: they are called with the parser's subparsers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 fine, 1 problems with objects, 2 wrong usage or nothing done."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ObjdriveError as error:
        print(f"objdrive: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever reads the output, such as `head`, has had enough. Python would fail once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="objdrive", description="Personalized pictures of products.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="draw pictures of an object"))
    _add_export(commands.add_parser("export", help="write an object's adapter as files of another tool"))
    store = commands.add_parser("store", help="look after a store of artifacts")
    _add_store(store.add_subparsers(required=True, metavar="COMMAND"))
    # Rooms that build on the library bring commands of their own.
    for room in entry_points(group=COMMANDS_GROUP):
        room.load()(commands)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, help="the store's address")
    parser.add_argument("--object", required=True, metavar="ID", help="the object")
    parser.add_argument("--prompt", required=True, help='"{}" stands for the object: "a photo of {} on grass"')
    parser.add_argument("--negative-prompt", default="", help="what to lead away from")
    parser.add_argument("--n", type=int, default=1, help="how many pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first picture's seed; the next ones count up")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels, as in 832x1216 (default: the base's native square)")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: the recipe's)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the recipe's)")
    parser.add_argument("--base", help="the base, where it isn't found by the name that the artifact notes")
    parser.add_argument("--clip", help="folder or hub id of the CLIP with the image tower, for bases without one")
    parser.add_argument("--vae", help="folder or hub id of an autoencoder in place of the base's own")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the PNGs (default: here)")
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    # Heavy imports, which listing a store does not need.
    from transformers.utils.logging import disable_progress_bar

    from objdrive.generate import generate

    disable_progress_bar()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ObjdriveError(f"--out {arguments.out} can't be made a folder: {error}") from error
    pictures = generate(
        ArtifactStore(arguments.store),
        arguments.object,
        arguments.prompt,
        seeds=range(arguments.seed, arguments.seed + arguments.n),
        negative_prompt=arguments.negative_prompt,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        base=arguments.base,
        clip=arguments.clip,
        vae=arguments.vae,
        size=parse_size(arguments.size) if arguments.size else None,
    )
    for seed, picture in zip(range(arguments.seed, arguments.seed + arguments.n), pictures, strict=True):
        path = arguments.out / f"{arguments.object}-{seed}.png"
        picture.save(path)
        print(path)
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's address")
    parser.add_argument("object", metavar="ID", help="the object")
    parser.add_argument("--format", required=True, choices=EXPORT_FORMATS, help="whose form")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        help="folder, such as the tool's own: files go where it looks (default: here)",
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    # Heavy imports, which listing a store does not need.
    from objdrive.adapters.adapter import family_of_files, parse_adapter
    from objdrive.adapters.export import export_adapter

    metadata, files = ArtifactStore(arguments.store).read(arguments.object)
    family = family_of_files(files)
    adapter = parse_adapter(files, token=metadata.token, family=family)
    exported = export_adapter(adapter, metadata, arguments.format, family=family)
    for name, data in sorted(exported.files.items()):
        path = arguments.out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise ObjdriveError(f"{path} can't be written: {error}") from error
        print(path)
    print(f"prompt: {exported.prompt}")
    return 0


def _add_store(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ls = commands.add_parser("ls", help="list the objects")
    show = commands.add_parser("show", help="print what is known of an object's current artifact")
    verify = commands.add_parser("verify", help="read artifacts in full and say what is wrong")
    gc = commands.add_parser("gc", help="remove superseded artifacts and what dead writers left")
    for command in (ls, show, verify, gc):
        command.add_argument("store", help="the store's address")
    show.add_argument("object", metavar="ID")
    verify.add_argument("objects", metavar="ID", nargs="*", help="(default: all)")
    gc.add_argument(
        "--older-than", type=float, default=24.0, metavar="HOURS", help="leave what is younger (%(default)s)"
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    ls.set_defaults(run=_ls)
    show.set_defaults(run=_show)
    verify.set_defaults(run=_verify)
    gc.set_defaults(run=_gc)


def _ls(arguments: argparse.Namespace) -> int:
    store = ArtifactStore(arguments.store)
    failures = 0
    for object_id, looked in store.for_each(store.current):
        try:
            artifact = looked.result()
        except StoreError as error:
            failures += 1
            print(f"{object_id}\t({error})", flush=True)
            continue
        if artifact is None:
            print(f"{object_id}\t(no current artifact)", flush=True)
        else:
            fields = (object_id, artifact.digest, artifact.class_name, artifact.base.id, artifact.created)
            print(*fields, sep="\t", flush=True)
    return 1 if failures else 0


def _show(arguments: argparse.Namespace) -> int:
    artifact = ArtifactStore(arguments.store).current(arguments.object)
    if artifact is None:
        raise ObjdriveError(f"{arguments.store} has no object {arguments.object!r}: 'objdrive store ls' lists them")
    print(artifact.model_dump_json(indent=2))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    store = ArtifactStore(arguments.store)

    def verify(object_id: str) -> list[str]:
        found = store.verify(object_id)
        if arguments.objects and not found and not store.digests(object_id):
            return [f"{store.url} has no artifact of {object_id!r}: 'objdrive store ls' lists the objects"]
        return found

    count, problems = 0, 0
    for _, verified in store.for_each(verify, arguments.objects or None):
        count += 1
        try:
            found = verified.result()
        except StoreError as error:
            found = [str(error)]
        problems += len(found)
        for problem in found:
            print(problem, flush=True)
    print(f"{count} object(s), {problems} problem(s)")
    return 1 if problems else 0


def _gc(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    removed, failures = 0, 0
    for _, swept in ArtifactStore(arguments.store).gc(arguments.older_than * 3600, dry_run=arguments.dry_run):
        try:
            addresses = swept.result()
        except StoreError as error:
            failures += 1
            print(error, flush=True)
            continue
        removed += len(addresses)
        for address in addresses:
            print(address, flush=True)
    verb = "would be removed" if arguments.dry_run else "removed"
    failed = f", {failures} object(s) failed" if failures else ""
    print(f"{removed} {verb}{failed} in {time.monotonic() - started:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
