"""What the command lines share: one line and exit status 2 for whatever the user can fix."""

from __future__ import annotations

import ast
import errno
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from distill.base import processes
from distill.base.errors import RunInterrupted, RunStopped, UserError, printable
from distill.config.parse import CREDENTIALS, known_keys, parse_config, unknown_key
from distill.config.schema import schema_key
from distill.config.words import help_lines

USAGE_ERROR = 2
_LONGEST_ERROR = 2000  # characters
_HELP = {"--help", "-help", "--helpshort", "-h", "-?"}
_PROCESS_FLAGS = (
    "coordinator_address",
    "num_processes",
    "process_id",
    "initialization_timeout",
    "heartbeat_timeout",
)
_arguments: list[str] = []  # in which ml_collections looks for keys of the config
_own_values: dict[str, Any] = {}  # of keys that users name, given on the command line
_CONFIGS = Path(__file__).parents[1] / "configs"
_PACKAGED = f"one of the package: {', '.join(sorted(path.stem for path in _CONFIGS.glob('*.py')))}"
_WRONG_TYPE = re.compile(  # as ml_collections says it
    r"TypeError: Could not override field '(\w+)' .*?\. (.*) is of original type <class '(.+?)'> "
    r"and cannot be casted to type <class '(.+?)'>"
)
_NO_NUMBER = re.compile(r"(invalid literal for int\(\)|could not convert string to float).*")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}


def define_config_flag() -> flags.FlagHolder:
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment: a file, or the name of one that comes with the package, e.g. arithmetic or "
        "gsm8k:scratch; single keys are overridden by --config.section.key=value.",
        lock_config=True,
        sys_argv=_arguments,
    )


def _define_process_flags() -> None:
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT where process 0 of several listens. Slurm, Open MPI and TPU pods say this and "
        "the next two themselves.",
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "initialization_timeout", 300, "Seconds to wait for all processes.", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "Seconds without a sign of life from one of several processes after which all end.",
        lower_bound=1,
    )


def join_processes() -> None:
    """Joins the other processes of the run, if flags or the environment speak of any."""
    values = flags.FLAGS
    processes.join(
        values.coordinator_address,
        values.num_processes,
        values.process_id,
        timeout=values.initialization_timeout,
        silence=values.heartbeat_timeout,
    )


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`, of the command's module; never returns."""
    _define_process_flags()
    _begin(main)
    app.run(lambda _: _call(main), flags_parser=_parse_flags)


def run_with_arguments(main: Callable[[list[str]], None]) -> None:
    """`run` for a command of one process whose `main` takes the arguments that are no flags."""
    _begin(main)
    app.run(lambda argv: _call(lambda: main(argv[1:])), flags_parser=_parse_flags_among_arguments)


def _begin(main: Callable) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)  # errors in the config are told once, in a line
    # The user's own choice, but for one thing: nobody else may write to what a run leaves.
    os.umask(os.umask(0o077) | 0o002)
    if "--version" in sys.argv[1:]:
        print(f"distill {sys.modules['distill'].__version__}")  # the package that this is in
        sys.exit(0)
    if not _HELP.isdisjoint(sys.argv[1:]):
        _print_to_pipe("\n".join(_help_lines(main.__module__)))
        sys.exit(0)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    rest = _parse_flags_among_arguments(argv)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}: options are written --name=value")
    return rest


def _parse_flags_among_arguments(argv: Sequence[str]) -> list[str]:
    try:
        _check_override_names(argv)
        _arguments[:] = [argv[0], *_with_packaged_config(_without_own_keys(argv[1:]))]
        rest = flags.FLAGS(list(_arguments))
    except flags.UnrecognizedFlagError as error:
        _fail(_unknown_flag(error))
    except (UserError, flags.Error) as error:
        # Where the config file raises, ml_collections shows a traceback, whose last line counts.
        _, is_config, said = str(error).strip().partition("Error whilst parsing config file")
        line = _WRONG_TYPE.sub(
            r"config key '\1' is \2, of type \3: it takes a value of type \4",
            said.strip().rpartition("\n")[2],
        )
        if is_config:
            _fail(f"the config cannot be loaded: {line}")
        _fail(_NO_NUMBER.sub(_takes_a_number, str(error)))
    except Exception as error:  # whatever the config file raises when it is executed
        # ml_collections gives the file that it executes a name of its own.
        said = str(error).replace("module 'config_config'", "the config file")
        _fail(f"the config cannot be loaded: {type(error).__name__}: {said}")
    except SystemExit:
        if "--helpfull" not in argv:
            raise
        sys.exit(0)  # absl takes it for a failure
    return rest


def _without_own_keys(arguments: Sequence[str]) -> list[str]:
    """Without keys of plugins and named teachers, which a config file need not have.

    `required_config` sets them.
    """
    key = r"--?config\.(plugin\.\w+|teachers\.[\w.-]+)"
    if bare := next((each for each in arguments if re.fullmatch(key, each)), None):
        raise UserError(f"{bare} has no value: write {bare}=VALUE")
    own = re.compile(f"{key}=(.*)", re.S)
    matches = [own.fullmatch(each) for each in arguments]
    _own_values.clear()
    for key, text in (match.groups() for match in matches if match):
        if key.startswith("teachers.") and key in _own_values:
            raise UserError(f"--config.{key} is given twice: two teachers need two names")
        _own_values[key] = _literal(text)
    return [each for each, match in zip(arguments, matches, strict=True) if not match]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _with_packaged_config(arguments: Sequence[str]) -> list[str]:
    """With the path of a config that comes with the package, where a name stands for it."""
    found = list(arguments)
    for i, argument in enumerate(found):
        option, equals, value = argument.partition("=")
        if option.lstrip("-") != "config" or not option.startswith("-"):
            continue
        place = i if equals else i + 1
        name, colon, rest = (value if equals else "".join(found[place : place + 1])).partition(":")
        match = re.fullmatch(r"(?:configs/)?(\w+)(?:\.py)?", name)
        packaged = _CONFIGS / f"{match[1] if match else ''}.py"
        if not name or (Path(name).exists() and not Path(name).is_dir()):
            continue
        if not packaged.exists():
            raise UserError(f"there is no config file {name}: pass another, or {_PACKAGED}")
        found[place] = f"{option}=" * bool(equals) + f"{packaged}{colon}{rest}"
    return found


def _takes_a_number(found: re.Match) -> str:
    """In place of what Python says of a text that is no number."""
    return f"it takes a {'whole ' * ('int()' in found[1])}number"


def _unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    """With what was meant, where that is known: a key of the config, or nothing at all."""
    name = error.flagname.partition("=")[0]
    if name in ("resume", "continue", "resume_from_checkpoint"):
        return f"there is no flag --{name}: a run goes on by the same command, with its --workdir"
    keys = [key for key in known_keys() if key.rpartition(".")[2] == name]
    if keys:
        return f"there is no flag --{name}: did you mean --config.{keys[0]}=...?"
    return f"{error}: flags are listed by --help, keys of the config are --config.section.key=value"


def _print_to_pipe(text: str) -> None:
    """Prints to a reader that may have seen enough, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


def _help_lines(module: str) -> Iterator[str]:
    """What --help prints: absl would list the flags of every library, and no key of the config."""
    yield (sys.modules[module].__doc__ or "").strip()
    by_module = flags.FLAGS.flags_by_module_dict()
    shared = [flag for flag in by_module.get(__name__, ()) if flag.name not in _PROCESS_FLAGS]
    yield from _flag_lines(
        "options", [*shared, *by_module.get(sys.argv[0] if module == "__main__" else module, ())]
    )
    if _PROCESS_FLAGS[0] not in flags.FLAGS:  # nor a config: a command that reads what runs left
        return
    yield from _flag_lines(
        "one of several processes", [flags.FLAGS[name] for name in _PROCESS_FLAGS]
    )
    yield "\ncommon keys of the config, with the defaults that a config file starts from:"
    yield from help_lines()
    completion = 'eval "$(python -m distill.config.completion)"'
    yield f"\nall keys: python -m distill.config.words; completion: {completion}"


def _flag_lines(heading: str, listed: Sequence[flags.Flag]) -> Iterator[str]:
    yield f"\n{heading}:"
    for flag in listed:
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        yield f"  --{flag.name}"
        yield f"      {flag.help}{default}"


def _call(main: Callable[[], None]) -> None:
    _silence_libraries()
    try:
        main()
    except RunInterrupted as stop:
        print(stop, flush=True)
    except UserError as error:
        _fail(str(error))
    except RunStopped as error:
        _fail(str(error), status=1)
    except (Exception, KeyboardInterrupt) as error:
        if _says_no_room(error):
            where = getattr(error, "filename", None)
            where = f" for {where}" if where else ""
            line = f"the disk has no room left{where}: make room, and give the same command"
            _fail(line, status=1)
        if "Unable to initialize backend" in str(error):
            platforms = os.environ.get("JAX_PLATFORMS", "")
            _fail(
                f"JAX cannot use the devices of JAX_PLATFORMS={platforms!r}: install what they "
                f"need, such as jax[tpu] or jax[cuda13], or unset it ({error})"
            )
        if processes.several():  # the others would wait for this one
            processes.wait_for_the_cause(error)
            traceback.print_exc()
            _fail(f"{type(error).__name__}: {error}", status=1)
        raise


def _silence_libraries() -> None:
    """What libraries print about themselves; what they raise is shown all the same."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("transformers", "datasets", "huggingface_hub", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    threading.excepthook, sys.unraisablehook = _show_of_thread, _show_ignored


def _show_of_thread(args) -> None:
    # Whoever waits for a thread that finds no room says so, in one line.
    if not _says_no_room(args.exc_value):
        threading.__excepthook__(args)


def _show_ignored(args) -> None:
    # A save that has failed closes the loop to which TensorStore's threads would report.
    if str(args.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(args)


def _says_no_room(error: BaseException | None) -> bool:
    """Whether the disk is full, in the words of whatever library."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_ROOM
    return any(os.strerror(number) in str(error) for number in _NO_ROOM)


def required_config(holder: flags.FlagHolder) -> ConfigDict:
    if holder.value is None:
        if holder.present:
            raise UserError(
                "get_config of the config file returned None: it must return the config"
            )
        raise UserError(f"pass --config=FILE, or {_PACKAGED}")
    try:
        config = ConfigDict(holder.value)
        with config.unlocked(), config.ignore_type():
            for key, value in _own_values.items():
                _set_own_key(config, key.split("."), value)
    except Exception as error:  # ml_collections keeps a missing file's error until the first use
        raise UserError(f"the config cannot be loaded: {error}") from None
    parse_config(config)  # a mistake does not wait for JAX
    return config


def _set_own_key(section: ConfigDict, names: Sequence[str], value: Any) -> None:
    first, *rest = names
    if not rest:
        section[first] = value
        return
    if first not in section:
        section[first] = ConfigDict()
    _set_own_key(section[first], rest, value)


def _check_override_names(argv: Sequence[str]) -> None:
    """ml_collections names only a part of an unknown key; this names all of it and the nearest."""
    known = set(known_keys())
    for argument in argv[1:]:
        name, dot, key = argument.partition("=")[0].lstrip("-").partition(".")
        if name not in ("config", "noconfig") or not dot:
            continue
        # Those of plugins are looked at where they are imported.
        if not key.startswith("plugin.") and schema_key(key) not in known:
            raise unknown_key(key)


def _fail(message: str, status: int = USAGE_ERROR) -> None:
    line = printable(_without_secrets(message))
    shown = line if len(line) <= _LONGEST_ERROR else f"{line[:_LONGEST_ERROR]} ..."
    if processes.several() or status != USAGE_ERROR:
        # Threads of a run that fails, as on a full disk, may be writing tracebacks meanwhile.
        processes.leave(f"error: {shown}", status)
    print(f"error: {shown}", file=sys.stderr)
    sys.exit(status)


def _without_secrets(message: str) -> str:
    """Without passwords in URLs, and without values of variables that are named like secrets.

    Messages quote what other libraries and servers say.
    """
    for name, value in os.environ.items():
        if re.search("TOKEN|KEY|SECRET|PASSWORD", name) and len(value) >= 8:
            message = message.replace(value, f"${name}")
    return CREDENTIALS.sub("...", message)
