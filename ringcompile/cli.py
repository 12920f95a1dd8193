"""The command line: parse, call, print, exit.

Exit codes: 0 done; 1 refused or failed, with one message on stderr; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import click

from ringcompile.commands.bench import bench
from ringcompile.commands.calibrate import calibrate
from ringcompile.commands.check import check
from ringcompile.commands.dump import dump
from ringcompile.commands.examples import epilog
from ringcompile.commands.generate import generate
from ringcompile.commands.info import info
from ringcompile.commands.models import models
from ringcompile.commands.plan import plan
from ringcompile.commands.run import run
from ringcompile.commands.simulate import simulate
from ringcompile.commands.transform import transform
from ringcompile.commands.verify import verify
from ringcompile.commands.view import view
from ringcompile.errors import RingCompileError


@click.group(context_settings={"auto_envvar_prefix": "RINGCOMPILE"})
@click.version_option(package_name="ringcompile")
def cli() -> None:
    """Compile a single-device PyTorch transformer into one program per GPU.

    MODEL is a folder with a Hugging Face checkpoint, a GGUF file, package.module:function for a
    function that returns a module and example inputs, or one of the small models that
    `ringcompile models` lists.
    OUT is an artifact: the folder that `ringcompile transform` writes.

    Every option can also be set by an environment variable, for example
    RINGCOMPILE_TRANSFORM_PARALLEL=ring=4.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """


def main() -> None:
    """Entry point: an error of ours is one message and exit code 1, never a traceback."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("aborted", err=True)
        sys.exit(1)
    except RingCompileError as error:
        click.echo(str(error), err=True)
        _tell_torchrun(str(error))
        sys.exit(1)


def _tell_torchrun(message: str) -> None:
    """Put a message into the report that torchrun prints last, thirty lines below our own."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        details = {"timestamp": str(int(time.time())), "py_callstack": message}
        report = {"message": {"message": message, "extraInfo": details}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(report), encoding="utf-8")


for _command in (
    bench, calibrate, check, dump, generate, info, models, plan, run, simulate, transform, verify,
    view,
):
    _options = tuple(
        str(option.name) for option in _command.params if isinstance(option, click.Option)
    )
    _command.epilog = epilog(str(_command.name), _options)
    cli.add_command(_command)
