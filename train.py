"""Trains a ConvNeXt.

    python train.py                                         # the digits that scikit-learn carries
    python train.py --config configs/image_folder.py --config.data.folder=photos
    python train.py --config configs/image_folder.py:finetune --config.data.folder=photos \
        --config.init_from=facebook/convnext-tiny-224
    python train.py --config configs/fashion_mnist.py --workdir runs/mine --config.batch_size=256
    python train.py --config configs/imagenet1k.py --plan v5e:4x4    # what it would take there
    python train.py --config configs/imagenet1k.py --plan            # and on this machine

A run continues when it is started again with the same settings and the same --workdir. It ends
with status 75 after SIGTERM, when it has saved its state: start it again.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

INSTALL = "install what training needs with pip install -e '.[train]'"

try:
    from absl import flags, logging
    from ml_collections import config_flags

    from convnext_jax.errors import InputError
except ModuleNotFoundError as error:
    sys.exit(f"train.py: {error}: {INSTALL}")

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with the settings of the run; default configs/digits.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config's name>.")
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "Trace so many steps into the folder profile of the run.", lower_bound=0
)
_PLAN = flags.DEFINE_string(
    "plan",
    None,
    "Do not train: say what it takes, on a TPU slice such as v5e:4x4 or on this machine.",
)
# Where JAX does not find out by itself, as it does on TPU pods and under Slurm and Open MPI.
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0 of several.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.", lower_bound=0)


def main(argv: list[str]) -> int:
    """Parses the flags and trains; the exit status."""
    sys.stdout.reconfigure(line_buffering=True)  # so that a log holds all of a run that is killed
    logging.set_verbosity(logging.FATAL)  # orbax also logs the errors that it raises
    if {"-h", "--help"} & set(argv):
        print(__doc__ + "\nSettings, with their defaults: convnext_jax/training/config.py")
        return 0
    if not any(flag.lstrip("-").split("=")[0] == "config" for flag in argv[1:]):
        # Not as the flag's default, against which overrides would be checked before this function.
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    # `--plan` may stand alone, where absl would take the flag after it for its value.
    argv = [
        "--plan=" if flag == "--plan" and (not after or after.startswith("-")) else flag
        for flag, after in zip(argv, [*argv[1:], ""], strict=True)
    ]
    try:
        unknown = flags.FLAGS(argv)[1:]
        if unknown:
            return _complain(f"what is {unknown[0]!r}? Settings are given as --config.NAME=VALUE")
        name, *row = flags.FLAGS["config"].config_filename.split(":", 1)
        config_file = Path(name)
        if not config_file.is_file():
            return _complain(f"there is no {config_file}: give --config one of configs/")
        config = _CONFIG.value
    except AttributeError as error:  # how ml_collections says that a key does not exist
        name, meant = (re.search(p, str(error)) for p in (r"\w+", r'Did you mean "(\w+)"'))
        hint = f"; did you mean {meant[1]!r}?" if meant else ": see the file that --config names"
        return _complain(f"there is no setting {name[0] if name else error!r}" + hint)
    except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
        # Of an error inside the file, which comes with its traceback, the last line.
        message = str(error).strip().splitlines()[-1]
        if "get_config() takes 0 positional arguments" in message:
            message = "this configuration has no rows: leave out the colon and what follows it"
        return _complain(message.removeprefix("convnext_jax.errors.InputError: "))

    try:
        from convnext_jax.training import ahead, loop, parallel  # after the flags: takes seconds
    except ModuleNotFoundError as error:
        return _complain(f"{error}: {INSTALL}")
    except KeyboardInterrupt:
        return 130

    try:
        if _PLAN.value is not None:
            ahead.print_forecast(config, _PLAN.value)
            return 0
        _keep_compiled_programs()
        parallel.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        workdir = _WORKDIR.value or Path("runs") / "_".join([config_file.stem, *row])
        loop.train(config, workdir, profile_steps=_PROFILE.value)
    except loop.Preempted as error:
        print(f"train.py: {error}; the same command continues it", file=sys.stderr)
        return os.EX_TEMPFAIL
    except (InputError, OSError) as error:
        status = _complain(str(error))
        if parallel.is_shared():
            _leave(status)
        return status
    except loop.NotFinite as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "train.py: stopped; the same command continues from the last checkpoint, if any",
            file=sys.stderr,
        )
        if parallel.is_shared():
            _leave(130)
        return 130
    except Exception:
        if not parallel.is_shared():
            raise
        traceback.print_exc()
        _leave(1)
    return 0


def _leave(status: int) -> NoReturn:
    """Ends one of several processes at once.

    The others may be in the middle of a step: they are to find this one gone, where the usual way
    out would wait for them to end too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _keep_compiled_programs() -> None:
    """Lets a run that is started again find its programs compiled."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "convnext_jax" / "compiled"))


def _complain(message: str) -> int:
    print("train.py:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
