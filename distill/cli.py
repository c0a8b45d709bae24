"""What the command lines share: one line and exit status 2 for whatever the user can fix."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from distill.config import known_keys, unknown_key
from distill.errors import RunInterrupted, RunStopped, UserError

USAGE_ERROR = 2


def define_config_flag() -> flags.FlagHolder:
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment, e.g. configs/arithmetic.py or configs/gsm8k.py:scratch; single keys are "
        "overridden by --config.section.key=value.",
        lock_config=True,
    )


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; never returns."""
    app.run(lambda _: _call(main), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        _check_override_names(argv)
        rest = flags.FLAGS(argv)
    except (UserError, flags.Error) as error:
        _fail(str(error))
    except Exception as error:  # whatever the config file raises when it is executed
        _fail(f"the config cannot be loaded: {type(error).__name__}: {error}")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: options are written --name=value")
    return rest


def _call(main: Callable[[], None]) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("transformers", "datasets", "huggingface_hub", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main()
    except RunInterrupted as stop:
        print(stop, flush=True)
    except UserError as error:
        _fail(str(error))
    except RunStopped as error:
        _fail(str(error), status=1)


def required_config(holder: flags.FlagHolder) -> ConfigDict:
    if holder.value is None:
        raise UserError("pass --config=FILE, e.g. --config=configs/arithmetic.py")
    try:
        return ConfigDict(holder.value)
    except Exception as error:  # ml_collections keeps a missing file's error until the first use
        raise UserError(f"the config cannot be loaded: {error}") from None


def _check_override_names(argv: Sequence[str]) -> None:
    """ml_collections names only a part of an unknown key; this names all of it and the nearest."""
    for argument in argv[1:]:
        name, dot, key = argument.partition("=")[0].lstrip("-").partition(".")
        if name == "config" and dot and key not in known_keys():
            raise unknown_key(key)


def _fail(message: str, status: int = USAGE_ERROR) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
