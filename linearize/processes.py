"""The processes of one run, as `accelerate launch` or torchrun start them: who writes, who waits, who says what failed.

Each runs the same program. The main one writes and prints; the others take from it what they did not do themselves. A
process that fails says so and ends the others, which may be waiting for it in the middle of a sum.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .errors import UserError

Plain = TypeVar("Plain")  # what JSON holds

_FAILED = "failed"
_PAUSE = 0.1  # seconds between looks at what another process has done
# A process that waits in a collective sees no signal: it is given this many seconds, and ended.
GRACE = 10.0
# Other ways to spread a training, which accelerate's launcher asks for in these variables.
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# What the libraries say where the other end of a connection is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "recvValue")

_store: Any = None
_asked = 0
_sharded = False
_ending = threading.Event()
_peer_failed = threading.Event()


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def count() -> int:
    """How many processes this run has. Raises UserError for a launcher that does not say which of them this is."""
    number = int(os.environ.get("WORLD_SIZE") or 1)
    if "WORLD_SIZE" not in os.environ and any(int(os.environ.get(name) or 1) > 1 for name in _BY_MPI):
        raise UserError("several processes were started by MPI: use torchrun, or `accelerate launch --multi_gpu`")
    if number > 1 and ("RANK" not in os.environ or "LOCAL_RANK" not in os.environ):
        raise UserError(
            f"WORLD_SIZE is {number}, and RANK or LOCAL_RANK is not set: start several processes with `accelerate "
            "launch` or torchrun, or one without WORLD_SIZE"
        )
    return number


def several() -> bool:
    return count() > 1


def rank() -> int:
    """Which of them this is; 0 is the main one."""
    return int(os.environ["RANK"]) if several() else 0


def is_main() -> bool:
    return rank() == 0


def sharded() -> bool:
    """Whether the run shards its weights (FSDP 2), as accelerate's launcher asked for."""
    return _sharded


def start(device: str | None = None) -> None:
    """Brings the processes together, before models are loaded; nothing where there is one.

    Raises UserError for fewer GPUs than processes, and for a way to spread a training that is not supported.
    """
    global _store, _sharded
    if not several() or _store is not None:
        return
    for name, what in _OTHERS.items():
        if _on(name):
            raise UserError(f"accelerate's config asks for {what}, which is not supported: use DDP, or FSDP 2")
    if _on("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("accelerate's config asks for FSDP 1: set fsdp_version: 2")
        # Sharding follows the stages here: accelerate must not wrap what it does not call.
        os.environ.pop("ACCELERATE_USE_FSDP")
        _sharded = True
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # --precision says it

    import torch
    import torch.distributed as dist

    on_cpu = (device or "").startswith("cpu") or _on("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if not on_cpu:
        place = int(os.environ["LOCAL_RANK"])
        if place >= torch.cuda.device_count():
            raise UserError(
                f"process {rank() + 1} of {count()} finds {torch.cuda.device_count()} GPU(s) here: start one process "
                "a GPU, or pass --device cpu"
            )
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if on_cpu else "cuda:nccl,cpu:gloo")
    _store = dist.PrefixStore("linearize", dist.distributed_c10d._get_default_store())


def from_main(make: Callable[[], Plain]) -> Plain:
    """What the main process makes, in all of them: plain data. The others wait for as long as it takes."""
    global _asked
    if not several():
        return make()
    assert _store is not None, "processes.start() comes first"
    _asked += 1
    key = f"main/{_asked}"
    if is_main():
        made = make()
        _store.set(key, json.dumps(made))
        return made
    while not _store.check([key]):
        time.sleep(_PAUSE)
    return json.loads(_store.get(key))


# -- how a run ends


@contextmanager
def together(device: str | None) -> Iterator[None]:
    """A program whose whole life is the run: this process ends soon after another one has failed, and not before all
    have come to the good end."""
    start(device)
    if several():
        threading.Thread(target=_watch, daemon=True).start()
    yield
    if several():
        import torch.distributed as dist

        from_main(lambda: None)
        dist.barrier()
        _ending.set()
        dist.destroy_process_group()


def _watch() -> None:
    while not _ending.wait(5 * _PAUSE):
        try:
            failed = _store.check([_FAILED])
        except RuntimeError:  # the store has gone with the process that held it
            failed = True
        if failed and not _ending.is_set():
            _peer_failed.set()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE)
            os._exit(1)


def peer_failed() -> bool:
    """Whether another process has failed, so that this one must not wait for it any more."""
    return _peer_failed.is_set()


def speaks_of_failure() -> bool:
    """Called by a process that failed: whether the message is its to print, as the first of all. Ends the others."""
    _ending.set()
    if _store is None:
        return os.environ.get("RANK", "0") == "0"  # before they came together, all fail alike
    if _peer_failed.is_set():
        return False
    try:
        return _store.add(_FAILED, 1) == 1
    except RuntimeError:
        return False


def is_lost(error: BaseException) -> bool:
    """Whether it says that another process has gone."""
    return isinstance(error, RuntimeError) and _store is not None and any(sign in str(error) for sign in _GONE)


@contextmanager
def lost_said() -> Iterator[None]:
    """One message, a UserError, where the body fails because another process has gone."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, before the message is out
        raise UserError(
            "another process of this run has ended without a word (was it killed?); --resume goes on from the last "
            "checkpoint"
        ) from error
