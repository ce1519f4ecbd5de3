"""Everything around the network: devices, download, data, inference, scores, the run.

Images are RGB uint8 (H, W, 3); labels are uint8 ids (H, W): 0 background, 1 road,
255 void. Only this module writes to the disk. The sections stand in the order in which
a run uses them.
"""

import collections
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import functools
import hashlib
import html
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
    import resource
except ImportError:  # Windows: there nothing keeps two programs off one file
    fcntl = resource = None

# ---------------------------------------------------------------------- messages


class ProgramError(Exception):
    """What the user can mend: the program prints it as it is and exits with 1."""


ASKED_TO_SPEAK = "TF_CPP_MIN_LOG_LEVEL" in os.environ  # by the user


def open_standard_streams():
    """Open those that are closed on nothing: no other file may get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


@contextlib.contextmanager
def quietly():
    """Hold back what TensorFlow writes of itself, unless something fails inside.

    It does so before its log has a level, so TF_CPP_MIN_LOG_LEVEL does not help.
    """
    open_standard_streams()
    if ASKED_TO_SPEAK:
        yield
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except ProgramError:
            raise
        except Exception:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


try:
    tempfile.gettempdir()  # TensorFlow's import needs it
except OSError as error:
    sys.exit(f"{error.strerror}: make room there, or set TMPDIR")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, by the import
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever keras.json says
# Else memory goes back to the system after each operation, and comes back zeroed: a
# step on a CPU takes a fifth longer.
os.environ["TF_CPU_ALLOCATOR_USE_BFC"] = "1"
try:
    with quietly():
        import h5py  # comes with keras
        import imageio_ffmpeg  # comes with imageio[ffmpeg]
        import keras
        import numpy as np
        import PIL
        import requests  # comes with tensorflow
        import tensorflow as tf
        import urllib3  # comes with requests
        from PIL import Image, ImageDraw, ImageOps
        from tqdm import tqdm
except KeyboardInterrupt:
    sys.exit(130)
keras.config.set_image_data_format("channels_last")  # whatever keras.json says


class Stopped(KeyboardInterrupt):
    """A signal came that ends the program; its number is the argument."""


WORKER_ENDED = tf.errors.UnavailableError, tf.errors.AbortedError  # another one
DEVICE_FAILED = tf.errors.InternalError, tf.errors.UnknownError  # a GPU, or a disk
OUT_OF_MEMORY = MemoryError, tf.errors.ResourceExhaustedError


@contextlib.contextmanager
def blaming(path, what, advice):
    """Turn what goes wrong with `path` inside into a ProgramError: it is not `what`.

    A lack of memory, a device that fails and a worker that has ended pass.
    """
    try:
        yield
    except (*OUT_OF_MEMORY, *WORKER_ENDED, *DEVICE_FAILED, ProgramError):
        raise
    except PermissionError as error:
        raise ProgramError(f"{path}: {error.strerror}: see who may read it") from error
    except Exception as error:  # decoders raise what they like
        reason = first_line(getattr(error, "strerror", None) or error)
        raise ProgramError(f"{path}: not {what} ({reason}): {advice}") from error


def first_line(error):
    """Return the first line of an error's message, not too long.

    TensorFlow names the operation and its source first; the reason comes after them.
    """
    message = str(error).strip() or type(error).__name__
    message = re.sub(r"^{{function_node .*?}} | \[Op:\w+\] name:.*", "", message)
    if message.startswith("Graph execution error"):
        before_node = message.partition("\n\t [[")[0].rstrip()
        message = re.split(r"\n\n(?! )|<stack traces unavailable>\n", before_node)[-1]
        message = re.sub(r"^\d+ root error\(s\) found\.\s+\(0\) ", "", message)
    return message.partition("\n")[0][:200]


def printable(text):
    """Return `text` without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def count_of(count, noun):
    """Return "1 image", "2 images"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(seconds):
    """Return a time in words: "50 s", "4.1 minutes", "2.5 hours"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"


def forecast(seconds, steps, left):
    """Say how long epochs of `steps` and `left` steps take at `seconds` a step."""
    epoch, rest = duration(seconds * steps), duration(seconds * left)
    return f"an epoch takes about {epoch}, what is left of the training {rest}"


FULL = errno.ENOSPC, errno.EDQUOT, errno.EROFS  # where nothing more can be written
EXPECTED = (  # what may end the program; anything else is a bug, with a traceback
    ProgramError,
    OSError,
    *OUT_OF_MEMORY,
    *WORKER_ENDED,
    *DEVICE_FAILED,
    tf.errors.NotFoundError,  # of an algorithm, on a GPU that is full
    KeyboardInterrupt,
)


def explain(error):
    """Print to stderr which of EXPECTED ended the program; return its exit code."""
    code = 1
    if isinstance(error, ProgramError):
        message = str(error)
    elif isinstance(error, OUT_OF_MEMORY):
        message = "out of memory: lower --batch-size, --image-height or --image-width"
    elif isinstance(error, OSError):
        message = f"{error.filename or 'the disk'}: {error.strerror or error}"
        if error.errno in FULL:
            message += ": make room, or name folders on another disk"
    elif isinstance(error, KeyboardInterrupt):
        signum = signal.Signals(*error.args or [signal.SIGINT])
        message, code = f"stopped by {signum.name}", 128 + signum
        look_again(signum, delay=0)
    elif isinstance(error, WORKER_ENDED):
        message = "another worker has ended: start all of them again, with --resume"
    else:
        message = f"TensorFlow: {first_line(error)}: see whether another program has "
        message += "the GPU (nvidia-smi) or the disk fails; or lower --batch-size"
    print(printable(message), file=sys.stderr)
    return code


class Stream:
    """A standard stream that never ends the program: unread, it is given up."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if self is sys.stdout:  # stderr has the bars, which steer the terminal
            text = printable(text)
        try:
            return self.stream.write(text)
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error):
        with open(os.devnull, "wb") as nowhere:  # also what is still in its buffer
            os.dup2(nowhere.fileno(), self.stream.fileno())
        if self is sys.stdout:
            print(
                f"standard output: {error.strerror}: going on without", file=sys.stderr
            )


def be_a_program(main):
    """Run `main` as a program: mind streams and signals, exit with its code."""
    for name in "stdout", "stderr":
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
        setattr(sys, name, Stream(stream))
    heed_signals(interrupt)
    sys.unraisablehook = note_ignored
    warnings.filterwarnings("ignore")  # of Keras and Pillow: the program speaks itself
    if not ASKED_TO_SPEAK:  # TensorFlow takes threads that wait for a trace for traces
        tf.get_logger().setLevel(logging.ERROR)
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # on turned videos
    sys.exit(main())


# ----------------------------------------------------------------------- signals

SIGNALS = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)
SAME_SIGNAL = 1  # seconds in which several signals are one


def interrupt(signum, frame, since=-math.inf):
    """End the program where it is; a signal a moment later must not end its ending."""
    if time.monotonic() - since < SAME_SIGNAL:
        return
    heed_signals(functools.partial(interrupt, since=time.monotonic()))
    look_again(signum, delay=SAME_SIGNAL + 1)
    raise Stopped(signum)


def look_again(signum, delay):
    """Have a Stopped raised again in `delay` seconds, should it be lost; 0: no more.

    Extensions in C drop an exception where they only ask for an attribute, and Python
    those in destructors.
    """
    if hasattr(signal, "setitimer"):
        if delay:
            signal.signal(signal.SIGALRM, functools.partial(raise_again, signum))
        signal.setitimer(signal.ITIMER_REAL, delay)


def raise_again(signum, *_):
    """Raise Stopped, unless the program is ending by one already."""
    error = sys.exc_info()[1]
    while error:
        if isinstance(error, Stopped):
            return
        error = error.__context__
    look_again(signum, delay=SAME_SIGNAL + 1)
    raise Stopped(signum)


def note_ignored(ignored):
    """Say what Python ignored in a destructor, but for a Stopped."""
    if not isinstance(ignored.exc_value, Stopped):
        sys.__unraisablehook__(ignored)


class Stop(threading.Event):
    """Set where training is to end; `signum` is the signal that came, or None.

    On several workers a signal is only noted, as all of them stop together.
    """

    def __init__(self, workers):
        super().__init__()
        self.workers, self.signum = workers, None

    def note(self, signum, frame=None):
        self.signum = self.signum or signum
        if self.workers == 1:
            self.set()


def watch_signals(numbers, stop):
    """Note in `stop` the first signal that comes; end the program at a second one.

    `numbers` is the socket that gets each signal's number, at once: Python's own
    handlers wait for the end of the operation, which takes seconds on a CPU.
    """
    came = None
    while number := numbers.recv(1):
        if number[0] not in SIGNALS:
            continue
        signum = signal.Signals(number[0])
        if came is None:
            came = time.monotonic()
            stop.note(signum)
            when = "this step" if stop.workers == 1 else "this epoch, as all workers"
            said = f"{signum.name}: stopping after {when}, then the checkpoint is "
            said += "written; a second signal stops at once\n"
            if os.isatty(1):
                said = "\r\x1b[K" + said  # over the bar and the terminal's ^C
            with contextlib.suppress(OSError):
                os.write(1, said.encode())
        elif time.monotonic() - came >= SAME_SIGNAL:
            os._exit(128 + signum)


def heed_signals(handler):
    """Have `handler` handle the signals; return what did before, {number: handler}.

    A SIGHUP that is ignored stays so, as nohup asked for that; SIGINT does not, as
    scripts start programs in the background with it ignored.
    """
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    if before[SIGNALS[-1]] is signal.SIG_IGN:
        del before[SIGNALS[-1]]
    for signum in before:
        signal.signal(signum, handler)
    return before


@contextlib.contextmanager
def handling_signals(handler):
    """Have `handler` handle the signals inside."""
    before = heed_signals(handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextlib.contextmanager
def noting_signals(workers):
    """Yield the Stop in which the first signal is noted."""
    stop = Stop(workers)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # there Python takes no signals
        return
    inbox, outbox = socket.socketpair()
    outbox.setblocking(False)
    watch = threading.Thread(target=watch_signals, args=(inbox, stop), daemon=True)
    watch.start()
    with handling_signals(stop.note):
        before = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        try:
            yield stop
        finally:
            signal.set_wakeup_fd(before)
            outbox.close()  # ends the watch
            watch.join()
            inbox.close()


# ------------------------------------------------------------------------- files

IMAGES = ".png", ".jpg", ".jpeg"
CORES = os.cpu_count()  # those of the machine, or the fewer that it is bound to
if hasattr(os, "sched_getaffinity"):
    CORES = len(os.sched_getaffinity(0))


@contextlib.contextmanager
def written(path, flush=False, alone=True):
    """Yield where to build the file or folder that replaces `path` at the end.

    With `flush` it is on the disk before that, so that a power cut leaves it. What an
    earlier program left half built goes first, but where others may write `path` at the
    same time: not `alone`, each builds its own.
    """
    part = path.with_name(f".part.{'' if alone else os.getpid()}{path.name}")
    if len(os.fsencode(part.name)) > 255:
        part = path.with_name(f".part.{zlib.crc32(os.fsencode(path.name)):08x}")

    def clear():
        remove_folder(part)
        part.unlink(missing_ok=True)  # what is no folder

    clear()
    try:
        yield part
        if part.is_dir() and path.is_dir():
            remove_folder(path)
        if flush:
            flush_file(part)
        os.replace(part, path)
    finally:
        clear()


def read_ahead(path):
    """Have the system read a file into its cache while the caller goes on."""

    def read():
        with contextlib.suppress(OSError):  # whoever opens it then says why
            shutil.copyfile(path, os.devnull)

    threading.Thread(target=read, daemon=True).start()


def flush_file(path):
    """See to it that a file is on the disk, where a power cut leaves it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def remove_folder(path):
    """Remove a folder of the program's own, or the link in its place."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path, wait=True):
    """Keep other programs off `path`; the system frees the lock with the process.

    Raises ProgramError where nothing can be written beside `path` and, without `wait`,
    where another program holds the lock.
    """
    name = _lock_name(path)
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(name, path, wait) if fcntl else contextlib.nullcontext()
    except OSError as error:
        file = isinstance(error, FileExistsError)
        reason = "a file or a broken link, not a folder" if file else error.strerror
        raise ProgramError(
            f"{path.parent}: {reason}: name a folder to write to"
        ) from error
    with lock:
        try:
            yield
        finally:
            if fcntl and _is_at(lock, name):
                name.unlink()


def is_locked(path):
    """Return whether a program keeps others off `path`, or may do so."""
    if not fcntl:
        return True
    try:
        with open(_lock_name(path)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:  # it is held, or cannot be looked at
        return True


def _lock_name(path):
    """Return the file whose lock keeps others off `path`."""
    return path.with_name(f".{path.name}.lock")


def _lock(name, path, wait):
    """Return the file `name`, open and locked, which keeps others off `path`."""
    for attempt in itertools.count():
        lock = open(name, "w")  # noqa: SIM115 (whoever closes it gives up the lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait:
                print(f"{path}: another program is making it, waiting for that one")
                fcntl.flock(lock, fcntl.LOCK_EX)
            elif attempt < 3:
                lock.close()
                time.sleep(0.1)  # for is_locked it is held for a moment
                continue
            else:
                raise ProgramError(
                    f"{path.parent}: another program works on this run: let it end"
                ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return lock  # Lustre may be mounted without locks
        if _is_at(lock, name):
            return lock
        lock.close()  # of a file that its holder has removed


def _is_at(lock, name):
    """Return whether the open file `lock` is still the one that `name` names."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(name))
    except FileNotFoundError:
        return False


def need_space(folder, size, what):
    """Raise ProgramError unless `folder`'s disk has `size` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ProgramError(
            f"{folder}: {what} takes {size / 1e6:,.0f} MB and "
            f"{free / 1e6:,.0f} MB are free: make room, or choose another folder"
        )


def need_quota(path, size):
    """Raise OSError unless the system lets a new file at `path` have `size` bytes."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:
            pass  # macOS and Windows do not tell
        except OSError as error:
            if error.errno in (*FULL, errno.EFBIG):
                raise  # any other: the file system does not tell


def save_image(pixels, path):
    """Write uint8 (H, W, 3) or (H, W) as PNG or JPEG, by the name; all or nothing."""
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    with written(path) as part:
        part.write_bytes(encoded(pixels, kind))


def encoded(pixels, kind="PNG"):
    """Return the bytes of uint8 (H, W, 3) or (H, W) as PNG or JPEG."""
    content = io.BytesIO()  # Pillow would not notice a disk that is full
    # of all levels and types these are the fastest for photographs, and the smallest
    settings = {"compress_level": 1, "compress_type": zlib.Z_RLE, "quality": 92}
    Image.fromarray(pixels).save(content, kind, **settings)
    return content.getvalue()


def ahead(task, items, depth=CORES + 2, workers=None):
    """Yield task(item) in order, done in threads up to `depth` items ahead."""
    pool, waiting = ThreadPoolExecutor(workers), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(task, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_parallel(task, items, title):
    """Do `task` for every item on all cores, behind a bar; the first error ends it."""
    if not items:
        return
    done = ahead(task, items)
    for _ in tqdm(done, title, len(items), unit="image", disable=None):
        pass


def image_files(folder):
    """Return the images in `folder` in name order: PNG and JPEG, none hidden.

    Raises ProgramError where the folder is there and cannot be read.
    """
    try:
        paths = sorted(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise ProgramError(f"{folder}: {error.strerror}: see who may read it") from None
    return [
        path
        for path in paths
        if path.suffix.lower() in IMAGES
        and not path.name.startswith(".")
        and path.is_file()
    ]


@contextlib.contextmanager
def decoration(what):
    """Go on without `what` where it fails: it only shows what a run does."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the run goes on)
        print(f"without {what}: {first_line(error)}")


# ----------------------------------------------------------------------- devices

# Without AutoGraph, which nothing here needs: at the first call it would read the
# source as it is by then, not as it was when the program began.
traced = functools.partial(tf.function, autograph=False)


@dataclasses.dataclass
class Device:
    """What computes: a CPU, a GPU, several, or those of several workers."""

    name: str = "CPU"
    precision: str = "float32"
    xla: bool = False
    workers: int = 1
    strategy: tf.distribute.Strategy = dataclasses.field(
        default_factory=tf.distribute.get_strategy
    )

    @property
    def replicas(self):
        """How many devices share a batch, over all workers."""
        return self.strategy.num_replicas_in_sync

    @property
    def chief(self):
        """Whether this worker is the one that writes."""
        return self.strategy.extended.should_checkpoint

    def facts(self):
        """Return what run.json says of it."""
        names = "name", "precision", "replicas", "workers", "xla"
        return {name: getattr(self, name) for name in names}

    def mean(self, value):
        """Return the mean of a number over all workers, which wait for each other."""
        mine = tf.constant(value, tf.float64)
        values = self.strategy.run(tf.identity, args=(mine,))
        return float(self.strategy.reduce("MEAN", values, axis=None))

    def agree(self, facts):
        """Raise ProgramError unless `facts` are the same on all workers."""
        mine = zlib.crc32(repr(facts).encode())
        if self.mean(mine) != mine:
            raise ProgramError(
                f"another worker has other settings or data than this one, {facts}: "
                "give all of them the same command, data, weights and, with --resume, "
                "run folder"
            )


# Of a batch for each GPU of one machine, at least: summing 0.5 GB of gradients over
# them takes as long as about 8 images of 160x576 (by arithmetic: none could be had).
PIXELS_PER_GPU = 8 * 160 * 576


def prepare_device(precision="auto", xla=False, deterministic=False, batch=(1, 1, 1)):
    """Return the Device, with the precision set for all that is built from here on.

    To be called before any use of a device. `precision` "auto" is bfloat16 on GPUs that
    compute with it, float32 elsewhere. On one machine as many GPUs work as a `batch`,
    (B, H, W), keeps busy. Speaks of one that TensorFlow cannot use.
    """
    with quietly():
        gpus = tf.config.list_physical_devices("GPU")
        if "TF_CONFIG" not in os.environ:
            busy = math.prod(batch) // PIXELS_PER_GPU
            gpus = gpus[: min(max(busy, 1), batch[0])]
            tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if not gpus:  # one convolution after the other, each on all cores
            tf.config.threading.set_inter_op_parallelism_threads(1)
        strategy, workers = choose_strategy()
        tf.config.list_logical_devices()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    there = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    if there and not gpus and not hidden:
        print("TensorFlow cannot use the NVIDIA GPU, so the CPU works. To mend it: pip")
        print("install -r requirements.txt in a new environment; nvidia-smi lists the")
        print("GPU, and TF_CPP_MIN_LOG_LEVEL=0 in front of the command says what lacks")
    if precision == "auto":
        precision = "bfloat16" if compute_capability() >= (8, 0) else "float32"
    mixed = "" if precision == "float32" else "mixed_"
    keras.config.set_dtype_policy(mixed + precision)
    if mixed and not gpus and hasattr(ctypes.pythonapi, "mallopt"):
        # oneDNN's convolutions for AMX read memory that nobody wrote, where NaN may
        # stand: have glibc get all from 128 KB on (M_MMAP_THRESHOLD) from the kernel,
        # which zeroes it.
        ctypes.pythonapi.mallopt(-3, 2**17)
    device = Device(precision=precision, workers=workers, strategy=strategy)
    device.name = f"CPU, {count_of(CORES, 'core')}"
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        device.name = details.get("device_name", gpus[0].name)
    able = device.replicas == 1 and compute_capability() < (10, 0)
    device.xla = xla and able and not deterministic
    shared = f", {device.replicas} replicas" if device.replicas > 1 else ""
    shared += f" on {workers} workers" if workers > 1 else ""
    print(device.name + shared, precision + (", XLA" if device.xla else ""), sep=", ")
    if compute_capability() >= (10, 0):  # for Blackwell it brings no compiled code
        print("its first start compiles TensorFlow's kernels: perhaps half an hour")
    for number in range(len(gpus)):  # said before: a library may end the program here
        check_gpu(number)
    if xla and not device.xla:
        print("XLA is off: not for several replicas, --deterministic or Blackwell GPUs")
    if deterministic:
        print("deterministic: the same bits on every run, at a lower speed on a GPU")
        tf.config.experimental.enable_op_determinism()
    return device


def check_gpu(number):
    """Raise ProgramError unless a GPU computes by cuDNN and by TensorFlow's kernels.

    That needs libraries that fit, and a driver that can compile the kernels; what does
    not fit would end a run that has begun.
    """
    try:
        with tf.device(f"GPU:{number}"):
            x = 2 * tf.cast(tf.ones((1, 8, 8, 4), tf.uint8), tf.float32)
            x = tf.nn.conv2d(x, tf.ones((3, 3, 4, 4)), 1, "SAME")
            x = tf.nn.max_pool2d(x, 2, 2, "SAME")
            x = tf.pow(x, 0.5)  # TensorFlow compiles this kernel at its first use
        x.numpy()
        reason = "" if "GPU" in x.device else "it does not know this kind"
    except tf.errors.OpError as error:
        reason = first_line(error)
    if reason:
        old = ""
        if compute_capability() < (7, 5):
            old = 'one older than Turing needs: pip install "nvidia-cudnn-cu12<9.11"; '
        raise ProgramError(
            f"TensorFlow cannot compute with GPU {number} ({reason}): see whether "
            "another program has it (nvidia-smi) and whether its driver is up to date; "
            f"{old}TF_CPP_MIN_LOG_LEVEL=0 in front of the command says more, "
            "CUDA_VISIBLE_DEVICES=0 takes the first GPU alone, -1 the CPU"
        )


def compute_capability():
    """Return the lowest compute capability of the GPUs, (0, 0) without one."""
    gpus = tf.config.get_visible_devices("GPU")
    details = map(tf.config.experimental.get_device_details, gpus)
    found = [each.get("compute_capability", (0, 0)) for each in details]
    return min(found, default=(0, 0))


def choose_strategy():
    """Return the strategy for this machine's GPUs and TF_CONFIG's, and its workers."""
    gpus = tf.config.get_visible_devices("GPU")
    if "TF_CONFIG" in os.environ:
        advice = "correct it, or unset it to train on this machine alone"
        with blaming("TF_CONFIG", "a cluster", advice):
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            jobs = resolver.cluster_spec().as_dict()
            workers = len(jobs.get("chief", [])) + len(jobs.get("worker", []))
            if workers > 1:
                print(f"waiting until all {workers} workers are there", flush=True)
                # "auto" goes through the hosts, between the GPUs of one machine too
                options = tf.distribute.experimental.CommunicationOptions(
                    implementation="nccl" if gpus else "auto"
                )
                with handling_signals(signal.SIG_DFL):  # it waits where no Python runs
                    strategy = tf.distribute.MultiWorkerMirroredStrategy(
                        communication_options=options
                    )
                return strategy, workers
    if len(gpus) > 1:
        return tf.distribute.MirroredStrategy(), 1
    return tf.distribute.get_strategy(), 1


def host():
    """Return the scope of this machine's CPU; a scope holds for its own thread only."""
    return tf.device(tf.config.list_logical_devices("CPU")[0].name)


def free_memory():
    """Return the bytes that the system can still give, infinity if none can tell."""
    limits = [np.inf]
    with contextlib.suppress(OSError, TypeError):  # where it does not say
        text = Path("/proc/meminfo").read_text()
        limits.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1]))
    group = Path("/sys/fs/cgroup")  # a container's; a batch job's is in there
    with contextlib.suppress(OSError, TypeError):
        text = Path("/proc/self/cgroup").read_text()
        group /= re.search("^0::/(.*)$", text, re.MULTILINE)[1]
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            used = int((folder / "memory.current").read_text())
            kinds = (folder / "memory.stat").read_text()
            cached = re.findall(r"^(?:in)?active_file (\d+)$", kinds, re.MULTILINE)
            limit = int((folder / "memory.max").read_text())
            limits.append(limit - used + sum(map(int, cached)))
    return min(limits)


# A step that needs more ends with a line; the system would end it without a word.
MEMORY = min(free_memory(), 2.0**50)  # bytes
os.environ["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = f"{MEMORY / 2**20:.0f}"  # read later


def free_for_tensors():
    """Return the bytes that tensors of this machine's CPU can still have."""
    free = free_memory()
    with contextlib.suppress(ValueError):  # where tensors came before this module
        memory = tf.config.experimental.get_memory_info("CPU:0")
        idle = memory["peak"] - memory["current"]
        free = min(free + idle, MEMORY - memory["current"])
    return free


def peak_memory():
    """Return the most bytes that this process, or its GPU's memory, has held."""
    if tf.config.list_logical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if not resource:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def largest_batch(model, image_shape, replicas):
    """Return the batch size that should fit into the memory that is free now.

    Beside weights and moments a step holds the gradient twice, for the clipping, and
    for each image 1.5 times what the layers put out, as measured on a CPU.
    """
    room = free_for_tensors()
    if tf.config.list_logical_devices("GPU"):  # what was had before it ran out
        memory = tf.config.experimental.get_memory_info("GPU:0")
        room = memory["peak"] - memory["current"]
    image = keras.KerasTensor((1, *image_shape, 3), "uint8")
    outputs = keras.Model(model.input, [layer.output for layer in model.layers])
    sizes = [np.prod(x.shape) * tf.as_dtype(x.dtype).size for x in outputs(image)]
    fits = (room - 8 * model.count_params()) / sum(sizes) / 1.5
    return int(np.clip(fits, 0, 10**6)) * replicas  # where nothing tells, inf is free


@contextlib.contextmanager
def naming_the_batch_that_fits(model, image_shape, batch_size, replicas):
    """Turn a lack of memory inside into a ProgramError that says what should fit."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        fits = min(largest_batch(model, image_shape, replicas), batch_size - 1)
        lower = "lower it," if batch_size > 1 else "lower"
        advice = f"{fits} should fit; set that, or lower" if fits else lower
        raise ProgramError(
            f"out of memory with --batch-size {batch_size}: {advice} --image-height or "
            "--image-width"
        ) from error


# ---------------------------------------------------------------------- download

VGG_FILE = "vgg16_weights_tf_dim_ordering_tf_kernels.h5"
VGG_URLS = (
    f"https://storage.googleapis.com/tensorflow/keras-applications/vgg16/{VGG_FILE}",
    f"https://github.com/fchollet/deep-learning-models/releases/download/v0.1/{VGG_FILE}",
)
VGG_SIZE = 553_467_096  # bytes
VGG_MD5 = "64373286793e3c8b2b4e3219cbf3544b"  # the sum that Keras itself pins
KITTI_URLS = (
    "https://s3.eu-central-1.amazonaws.com/avg-kitti/data_road.zip",
    "https://s3-us-west-1.amazonaws.com/udacity-selfdrivingcar/advanced_deep_learning/data_road.zip",
)
CONNECT_TIMEOUT = 1.5  # seconds for one address, of which a host may have eight
READ_TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 2, 4, 8, 16)  # seconds between tries that gain nothing
KITTI_PAGE = "https://www.cvlibs.net/datasets/kitti/eval_road.php"
MAX_FETCHED = 10**9  # bytes of a file of unknown size: KITTI Road's zip has 471 MB
MAX_UNPACKED = 4 * 10**9  # bytes, likewise
MAX_ENTRIES = 20_000  # files and folders, likewise: it has about 1600
SLOWEST = 4000  # bytes a second: slower is as bad as a stall
WINDOW = 120  # seconds over which this is measured


class SourceError(Exception):
    """Why a source does not deliver a file, however often it is asked."""


def _length(path):
    return path.stat().st_size if path.exists() else 0


def _receive(url, part, size):
    """Ask `url` once for what `part` still lacks, and append to it what comes.

    Raises SourceError where there is no use in another try, else RequestException,
    HTTPError, or, where a header makes no sense to requests, ValueError.
    """
    have, limit = _length(part), size or MAX_FETCHED
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    proxies = requests.utils.get_environ_proxies(url)  # these connect, then answer
    timeout = (READ_TIMEOUT if proxies else CONNECT_TIMEOUT, READ_TIMEOUT)
    with requests.get(url, headers=headers, timeout=timeout, stream=True) as response:
        status, given = response.status_code, response.headers
        span = given.get("Content-Range", "")
        if status == 416 and have and not size and span == f"bytes */{have}":
            return  # it is whole, as nothing else can tell
        response.raise_for_status()
        if "text/html" in given.get("Content-Type", "").lower():
            raise SourceError("a web page is there, not the file")
        if status not in (200, 206):
            raise SourceError(f"no file comes with the status {status}")
        if status == 200:  # Range ignored: from the start
            have = 0
        elif not span.startswith(f"bytes {have}-"):
            raise requests.RequestException("other bytes than those asked for")
        length = re.fullmatch("[0-9]{1,15}", given.get("Content-Length", ""))
        total = have + int(length[0]) if length else size
        if whole := re.fullmatch(r"bytes \d+-\d+/(\d{1,15})", span, re.ASCII):
            total = int(whole[1])  # of which a server may send a part
        if size and total != size:
            raise SourceError(f"{total:,} bytes long there, not {size:,}")
        if total and total > limit:
            raise SourceError(f"{total:,} bytes long there, more than {limit:,}")
        need_space(part.parent, (total or 0) - have, part.stem)
        bar = tqdm(
            desc=part.stem,
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        began, before = time.monotonic(), have
        with open(part, "ab" if have else "wb") as file, bar:
            # read1 gives what is there: a cut loses nothing
            while chunk := response.raw.read1(min(1 << 20, limit + 1 - have)):
                file.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
                if time.monotonic() > began + WINDOW:
                    if have - before < SLOWEST * WINDOW:
                        raise requests.Timeout(f"under {SLOWEST} bytes a second")
                    began, before = time.monotonic(), have
    if have > limit:
        part.unlink()
        raise SourceError(f"more than {limit:,} bytes come")
    if total and have < total:
        raise requests.RequestException(f"it ended after {have:,} bytes")


def _fetch(url, part, size):
    """Fill `part` from `url`, in as many requests as it takes."""
    connected, failures, reached = False, 0, _length(part)
    problems = requests.RequestException, urllib3.exceptions.HTTPError, ValueError
    while True:
        began = time.monotonic()
        try:
            return _receive(url, part, size)
        except problems as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if status == 416:  # more than there is
                part.unlink(missing_ok=True)
            gain = _length(part) - reached  # further than ever: no endless circle
            slow = gain < SLOWEST * (time.monotonic() - began)  # nor one of years
            reached += max(gain, 0)
            failures = failures + 1 if slow or gain <= 0 else 0
            connected = connected or not isinstance(error, requests.ConnectionError)
            refused = 400 <= status < 500 and status not in (408, 416, 429)
            hopeless = refused or isinstance(error, ValueError)
            if hopeless or failures > (len(PAUSES) if connected else 1):
                cause = error.args[0] if error.args else error
                cause = cause if isinstance(cause, Exception) else error
                cause = str(getattr(cause, "reason", cause)).rpartition(">: ")[2]
                raise SourceError(cause) from error
            time.sleep(PAUSES[max(failures - 1, 0)])
        except OSError as error:
            if error.errno is None:  # of requests, on certificates that are not there
                raise SourceError(error) from error
            raise


def download(urls, path, size=None, md5=None, source=None):
    """Fetch `path` from the first of `urls` that delivers it, unless it is there.

    Returns True if that is where it is from, and not from another program or a person.
    Bytes go to `path` + ".part", which a later call resumes, and become `path` once
    their number and sum are those of `size` (bytes) and `md5`, where given. Raises
    ProgramError with a line for each URL and its reason, and what to do: `source` says
    where a person gets the file, if not at the first URL.
    """
    if path.exists():
        return False
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns with tracebacks
    part = path.with_name(path.name + ".part")
    message = f"{path} could not be downloaded:"
    with locked(path):
        if path.exists():  # another program has fetched it
            return False
        for url in urls:
            print(f"downloading {url}")
            try:
                if not size or _length(part) != size:
                    _fetch(url, part, size)
                _check_sum(part, md5)
            except SourceError as error:
                message += f"\n  {url}: {first_line(error)}"
                if not md5 and url != urls[-1]:
                    part.unlink(missing_ok=True)  # nothing shows that the next fits on
                continue
            if path.exists():  # someone was faster by hand: theirs stays
                part.unlink()
                return False
            os.replace(part, path)
            return True
    raise ProgramError(message + _by_hand(path, source or urls[0]))


def _check_sum(part, md5):
    """See `part` onto the disk; raise SourceError, without it, if its sum is not `md5`."""
    flush_file(part)  # no power cut leaves half of it as whole
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise SourceError(f"a wrong file, removed: its md5 is {found}, not {md5}")


def _by_hand(path, source):
    return (
        f"\nput it there by hand: {path.absolute()}\nfrom {source}\n"
        "or try the program without it: python main.py --demo"
    )


def maybe_download_pretrained_vgg(data_dir):
    """Return the path of VGG-16's ImageNet weights, downloaded if missing."""
    path = data_dir / VGG_FILE
    source = f"{VGG_URLS[0]}\nor name a file that you have: --vgg FILE"
    download(VGG_URLS, path, VGG_SIZE, VGG_MD5, source)
    return path


def maybe_download_kitti_road(data_dir):
    """Make sure that `data_dir`/data_road holds KITTI Road, downloaded if missing."""
    folder, archive = data_dir / "data_road", data_dir / "data_road.zip"
    if not folder.exists():
        _check_data_dir(data_dir, folder, archive)
        print("KITTI Road: CC BY-NC-SA 3.0, for non-commercial use; cvlibs.net")
        with locked(folder):
            if not folder.exists():
                _unpack(archive, folder)


def _check_data_dir(data_dir, *paths):
    """Raise ProgramError where the data set cannot become `data_dir`/data_road."""
    here = Path(os.path.realpath(data_dir))
    if here.name == "data_road" or (here / "training" / "image_2").is_dir():
        name = "" if here.name == "data_road" else "call it data_road and "
        raise ProgramError(
            f"{data_dir} is the data set itself: {name}name its parent: "
            f"--data-dir {shlex.quote(str(here.parent))}"
        )
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ProgramError(
                f"{path} links to {os.readlink(path)}, which is "
                "not there: provide that, or remove the link"
            )


def _unpack(archive, folder):
    """Unpack KITTI Road from `archive` as `folder`, all or nothing.

    A missing `archive` is downloaded, and removed at the end or where it is damaged;
    one that was there, also of a program that was stopped, stays.
    """
    source = f'{KITTI_PAGE}, "Download base kit"'
    ours = download(KITTI_URLS, archive, source=source)
    advice = "replace it, or remove it and let the program download it"
    if ours:
        advice = "damaged and removed: start the program again to download it, or"
        advice += _by_hand(archive, source)
    try:
        with blaming(archive, "a zip of KITTI Road", advice):
            entries = _data_set(archive)
    except ProgramError:
        if ours:
            archive.unlink()
        raise
    unpacked = sum(entry.file_size for entry in entries)
    need_space(archive.parent, unpacked, f"unpacking {archive.name}")
    with written(folder) as part, zipfile.ZipFile(archive) as content:
        for entry in tqdm(entries, desc="unpacking", disable=None):
            content.extract(entry, part)
        files = [path for path in part.rglob("*") if path.is_file()]
        in_parallel(flush_file, files, "writing")  # on the disk before the zip goes
    if ours:
        archive.unlink()


def _data_set(archive):
    """Return the entries of a zip that are KITTI Road, named from its root.

    That is where training/image_2 is: at the top, or in one folder. All of the zip is
    read: what is wrong with it shows here, by an exception of any kind, and what fails
    later is the disk's fault. Names that lead elsewhere or steer a terminal, and links,
    are left out.
    """
    with zipfile.ZipFile(archive) as content:
        entries = content.infolist()
        size = sum(entry.file_size for entry in entries)
        if len(entries) > MAX_ENTRIES or size > MAX_UNPACKED:
            raise zipfile.BadZipFile(f"{len(entries):,} entries of {size:,} bytes")
        if damaged := content.testzip():
            raise zipfile.BadZipFile(f"bad CRC or header of {damaged}")
    found = {}
    for entry in entries:
        name, link = entry.filename, entry.external_attr >> 28 == 0xA  # of its mode
        plain = name.isprintable() and not {"", ".", ".."} & set(name.split("/"))
        if plain and not link and len(name.encode()) < 256:
            found[name] = entry
    marks = (re.match("([^/]+/)?training/image_2/[^/.][^/]*$", name) for name in found)
    roots = {m[1] or "" for m in marks if m and m[0].lower().endswith(IMAGES)}
    known = [name for name in ("data_road/", "") if name in roots]
    root = known[0] if known else "".join(roots)
    if root not in roots:
        raise zipfile.BadZipFile(f"{len(roots)} folders training/image_2 with images")
    parents = {parent.as_posix() for name in found for parent in Path(name).parents}
    if parents & found.keys():
        raise zipfile.BadZipFile("a file and a folder have one name")
    entries = [entry for name, entry in found.items() if name.startswith(root)]
    for entry in entries:
        entry.filename = entry.filename.removeprefix(root)
    return entries


# ------------------------------------------------------------------- drawn data

# A level camera 1.65 m above the road, with the focal length and centre of KITTI's:
# road coordinates (x right, z ahead, metres) -> u = f x/z + cx, v = f 1.65/z + cy.
DRAWN_CALIBRATION = """\
P2: 721.5377 0 609.5593 0 0 721.5377 172.854 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_cam_to_road: 1 0 0 0 0 1 0 -1.65 0 0 1 0
"""
DRAWN_SIZES = (1242, 375), (1226, 370), (1241, 376)  # (W, H) in pixels


def draw_scene(kind, rng):
    """Return an image, its road label and its lane label, as PIL images.

    A road of its kind (um marked, umm of several lanes, uu unmarked) bends away over
    grass; the paved strip beside it is void, and so is its far end.
    """
    size = DRAWN_SIZES[rng.integers(len(DRAWN_SIZES))]
    start, heading, bend = rng.uniform((-1, -0.04, -0.003), (1, 0.04, 0.003))
    lanes = {"um": 2, "umm": rng.integers(3, 5), "uu": 1}[kind]
    half = lanes * rng.uniform(1.6, 1.9) if kind != "uu" else rng.uniform(2.2, 3.2)
    z = np.geomspace(5.5, 70, 40)
    centre = start + heading * z + bend * z**2

    def strip(left, right, near=0, far=70):
        """Outline (pixels) of what lies `left` to `right` metres off the centre."""
        rows = (z >= near) & (z <= far)
        x = np.concatenate([(centre + left)[rows], (centre + right)[rows][::-1]])
        depth = np.concatenate([z[rows], z[rows][::-1]])
        u, v = 721.5377 * x / depth + 609.5593, 721.5377 * 1.65 / depth + 172.854
        return list(zip(u.tolist(), v.tolist()))

    def colour(low, high, grey=False):
        value = rng.integers(low, high, 3)
        return tuple(int(c) for c in (value[:1].repeat(3) if grey else value))

    image = Image.new("RGB", size, colour((150, 170, 200), (220, 230, 255)))
    road = Image.new("RGB", size, (255, 0, 0))
    lane = road.copy()
    draw, draw_road = ImageDraw.Draw(image), ImageDraw.Draw(road)
    draw.rectangle((0, 178, *size), colour((50, 90, 20), (90, 140, 50)))
    for left in range(-100, size[0], 90):  # houses and trees along the horizon
        top, width = rng.integers(60, 170), rng.integers(40, 130)
        draw.rectangle((left, top, left + width, 182), colour(90, 160))
    asphalt = rng.integers(90, 130)
    side = half + rng.uniform(1, 3)
    draw.polygon(strip(half, side), (int(asphalt + rng.integers(20, 50)),) * 3)
    draw.polygon(strip(-half, half), (int(asphalt),) * 3)
    draw_road.polygon(strip(half, side), (0, 0, 0))
    draw_road.polygon(strip(-half, half), (255, 0, 255))
    draw_road.polygon(strip(-half, half, near=55), (0, 0, 255))
    for line in range(lanes + 1) if kind != "uu" else ():
        offset = half * (2 * line / lanes - 1)
        outer = line in (0, lanes)
        offset -= np.sign(offset) * 0.15 * outer
        for near in (0,) if outer else range(6, 60, 9):
            far = 70 if outer else near + 5
            mark = strip(offset - 0.08, offset + 0.08, near, far)
            if len(mark) > 2:
                draw.polygon(mark, colour(200, 250, grey=True))
    ImageDraw.Draw(lane).polygon(strip(0, 2 * half / lanes), (255, 0, 255))
    noise = rng.normal(0, 7, (size[1], size[0], 1))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), road, lane


def draw_sample(folder, task):
    """Draw the image of `task`, (split, kind, number), with label and calibration."""
    split, kind, number = task
    rng = np.random.default_rng((split == "testing", *kind.encode(), number))
    image, road, lane = draw_scene(kind, rng)
    to, name = folder / split, f"{kind}_{number:06}"
    image.save(to / "image_2" / f"{name}.png", compress_level=1)
    (to / "calib" / f"{name}.txt").write_text(DRAWN_CALIBRATION)
    if split == "training":
        road.save(to / "gt_image_2" / f"{kind}_road_{number:06}.png")
        if kind == "um":
            lane.save(to / "gt_image_2" / f"um_lane_{number:06}.png")


def maybe_draw_kitti_road(data_dir, training=60, testing=6):
    """Draw a small data set in KITTI Road's layout into `data_dir`/data_road."""
    folder = data_dir / "data_road"
    if folder.exists():
        return
    tasks = [
        (split, kind, number)
        for split, count in (("training", training), ("testing", testing))
        for kind in ("um", "umm", "uu")
        for number in range(count // 3)
    ]
    with locked(folder):
        if folder.exists():
            return
        need_space(data_dir, 10**6 * (training + testing), "the drawn data")
        with written(folder) as part:
            for name in "image_2", "gt_image_2", "calib":
                (part / "training" / name).mkdir(parents=True)
            for name in "image_2", "calib":
                (part / "testing" / name).mkdir(parents=True)
            in_parallel(functools.partial(draw_sample, part), tasks, "drawing")


# -------------------------------------------------------------------------- data

VOID = 255  # the id of what is not judged
FULL_SET = 289, 290  # KITTI Road's training and test images


class Sample(NamedTuple):
    """A training image and its label, as paths."""

    image: Path
    label: Path


class Split(NamedTuple):
    """The images of a data set: to train on, held out for scoring, to segment."""

    training: list[Sample]
    holdout: list[Sample]
    test: list[Path]

    def counts(self):
        """Return how many there are, as run.json says."""
        return {name: len(images) for name, images in self._asdict().items()}

    def digests(self):
        """Return the Digests of the images and labels themselves, and of all names."""
        files = [path for sample in self.training + self.holdout for path in sample]
        names = "\n".join(path.name for path in [*files, *self.test])
        total = hashlib.sha256(names.encode(errors="surrogateescape"))
        digests = ahead(file_digest, files)
        bar = tqdm(digests, "checksums", len(files), unit="file", disable=None)
        digests = list(bar)
        total.update(b"".join(digests))
        images = [digest.hex()[:16] for digest in digests[::2]]
        trained = len(self.training)
        return Digests(total.hexdigest()[:16], images[:trained], images[trained:])


class Digests(NamedTuple):
    """What a data set is known by: as a whole, and each image of it.

    By the whole a resumed run, or another worker, knows its data; what the test images
    hold is left out.
    """

    whole: str
    training: list[str]
    holdout: list[str]


def file_digest(path):
    """Return the digest of what a file holds."""
    readable = blaming(path, "a readable image", "replace or remove it")
    with readable, open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_image(path):
    """Return the image at `path` as RGB uint8 (H, W, 3), upright, whatever its mode."""
    with (
        blaming(path, "a readable image", "replace or remove it"),
        Image.open(path) as image,
    ):
        image.load()  # what is damaged fails here, not unseen below
        with contextlib.suppress(Exception):  # a broken EXIF block of a good picture
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def read_label(path):
    """Return the ids (H, W) uint8 of a KITTI ground truth image.

    The benchmark's meaning: red is validity, blue is road. Blue without red is road
    outside the valid area, hence void. Raises ProgramError for any other colour.
    """
    pixels = read_image(path)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    known = ((red == 0) | (red == 255)) & (green == 0) & ((blue == 0) | (blue == 255))
    if not known.all():
        colour = tuple(pixels[~known][0].tolist())
        raise ProgramError(
            f"{path}: colour {colour} is none of a label: (255, 0, 255) is road, "
            "(255, 0, 0) is not, (0, 0, 0) and (0, 0, 255) are not judged; README's "
            '"Your own images" makes such a label from a mask'
        )
    return np.where(red > 0, blue > 0, VOID).astype(np.uint8)


def check_size(label_path, label, image):
    """Raise ProgramError unless a label has the size of its image."""
    if image.shape[:2] != label.shape:
        raise ProgramError(
            f"{label_path} is {label.shape[1]}x{label.shape[0]}, its image "
            f"{image.shape[1]}x{image.shape[0]}: replace the label"
        )


def need_both_classes(pixels, what):
    """Raise ProgramError unless `pixels`, (background, road) counts, are of both."""
    missing = [name for name, count in zip(("background", "road"), pixels) if not count]
    if missing:
        raise ProgramError(
            f"no {' and no '.join(missing)} in the labels of the {what}: (255, 0, 0) "
            "is background, (255, 0, 255) road: correct the labels, or change "
            "--holdout-fraction"
        )


def resize_image(images, image_shape):
    """Resize uint8 images (..., H, W, 3) to `image_shape`, uint8 again."""
    x = tf.image.resize(images, image_shape, antialias=True)
    return tf.saturate_cast(tf.round(x), tf.uint8)


def resize_label(label, image_shape):
    """Resize ids (H, W) to `image_shape` by nearest neighbour: ids do not blend."""
    return tf.image.resize(label[..., None], image_shape, method="nearest")[..., 0]


def category(path):
    """Return the category of an image: "um_000000.png" -> "um", without one "all"."""
    return path.stem.rpartition("_")[0] or "all"


def road_name(path):
    """Return the name of an image's labels and confidences: "um_road_000000.png"."""
    return "_road_".join(path.stem.rsplit("_", 1)) + ".png"


def find_images(data_dir, holdout_fraction=0.1667, submission=False):
    """Return the Split of the images in `data_dir`/data_road, in name order.

    Raises ProgramError for an image without label, for a broken test image or
    calibration, and, where a `submission` is asked for, for a test image without one.
    """
    training_dir = data_dir / "data_road" / "training"
    samples = []
    for image in image_files(training_dir / "image_2"):
        label = training_dir / "gt_image_2" / road_name(image)
        if not label.is_file():
            lane = label.with_name(label.name.replace("_road_", "_lane_"))
            other = f" ({lane.name} is another task)" if lane.exists() else ""
            raise ProgramError(f"{image} has no label {label}{other}: add the label")
        if category(image) == "urban":
            raise ProgramError(f"{image}: urban means all categories: rename it")
        samples.append(Sample(image, label))
    if not samples:
        raise ProgramError(
            f"no images in {training_dir / 'image_2'}: unpack data_road.zip into "
            f"{data_dir}, or name a folder without data_road to have it downloaded"
        )
    training, holdout = split_holdout(samples, holdout_fraction)
    tests = image_files(data_dir / "data_road" / "testing" / "image_2")
    check_stems([sample.image for sample in samples])  # they would share a label
    check_stems(tests)  # their overlays would meet
    full = ""
    if (len(samples), len(tests)) != FULL_SET:
        full = f"; the full set has {FULL_SET[0]} and {FULL_SET[1]}"
    print(
        f"{count_of(len(samples), 'labelled image')}, of which {len(holdout)} held "
        f"out, and {count_of(len(tests), 'test image')}{full}"
    )
    if not holdout:
        print("no hold-out: no scores")
    for sample in holdout:
        read_homography(sample.image)
    check_tests(tests, data_dir / "data_road" / "testing", submission)
    return Split(training, holdout, tests)


def check_stems(images):
    """Raise ProgramError for two images that differ by their suffix alone."""
    for first, second in itertools.pairwise(sorted(images, key=lambda path: path.stem)):
        if first.stem == second.stem:
            raise ProgramError(f"{first} and {second}: rename one of them")


def check_tests(tests, folder, submission):
    """Raise ProgramError for a test image that would fail after hours of training."""
    in_parallel(read_image, tests, "looking at the test images")
    if not submission:
        return
    if not tests:
        raise ProgramError(f"{folder} has no images: leave --submission out")
    missing = [path for path in tests if read_homography(path) is None]
    if missing:
        raise ProgramError(
            f"{folder} has no {missing[0].stem}.txt ({len(missing)} of {len(tests)} "
            "are missing): add them, or leave --submission out"
        )


def check_batch_size(batch_size, training, replicas):
    """Raise ProgramError where there are fewer training images than `batch_size`.

    Says so where some replicas or GPUs have nothing of it to do.
    """
    devices = max(replicas, len(tf.config.list_physical_devices("GPU")))
    idle = devices - min(replicas, batch_size)
    if idle:
        left = f"{count_of(idle, 'device')} of {devices} idle"
        print(f"--batch-size {batch_size} leaves {left}: a larger one uses more")
    if batch_size > len(training):
        raise ProgramError(
            f"--batch-size {batch_size} is more than the "
            f"{count_of(len(training), 'training image')}: lower it, or "
            "--holdout-fraction"
        )


def read_homography(image_path):
    """Return the map (3, 3) from the road plane to an image, None if not calibrated.

    It takes (x right, z ahead, 1), metres, to homogeneous pixels (u, v, 1), the first
    of which is 1: columns 0, 2 and 3 of P2 R0_rect inv(Tr_cam_to_road), as the plane
    is y = 0.
    """
    path = image_path.parent.parent / "calib" / f"{image_path.stem}.txt"
    if not path.exists():
        return None
    with blaming(path, "a calibration of KITTI Road", "replace or remove it"):
        if not path.is_file():  # a pipe would be waited for
            raise OSError("not a regular file")
        lines = (line.partition(":") for line in path.read_text().splitlines())
        numbers = {name: np.array(rest.split(), float) for name, _, rest in lines}
        rectification, to_road = np.eye(4), np.eye(4)
        rectification[:3, :3] = numbers["R0_rect"].reshape(3, 3)
        to_road[:3] = numbers["Tr_cam_to_road"].reshape(3, 4)
        camera = numbers["P2"].reshape(3, 4) @ rectification
        return np.asarray_chkfinite(camera @ np.linalg.inv(to_road))[:, [0, 2, 3]]


def split_holdout(samples, fraction):
    """Return (training, hold-out): the last `fraction` of each category in name order.

    With 1/6 of the full set these are the 48 images of KittiSeg's val3 list; and
    neighbouring frames, nearly equal, stay on one side.
    """
    groups = collections.defaultdict(list)
    for sample in samples:
        groups[category(sample.image)].append(sample)
    training, holdout = [], []
    for _, group in sorted(groups.items()):
        cut = len(group) - round(len(group) * fraction)
        training += group[:cut]
        holdout += group[cut:]
    return training, holdout


def batch_rows(step, count, batch_size, seed):
    """Return the rows (B,) that make up training step `step`: a function of the step.

    Every epoch goes through its own permutation of the `count` samples and drops the
    incomplete batch at its end.
    """
    steps_per_epoch = count // batch_size
    order = tf.random.experimental.stateless_shuffle(
        tf.range(count), seed=[seed, step // steps_per_epoch]
    )
    return order[step % steps_per_epoch * batch_size :][:batch_size]


def augment(images, labels, draws):
    """Flip half of the images, with their labels, and jitter contrast and brightness.

    Images (B, H, W, 3) uint8, labels (B, H, W) uint8; `draws` (3, B) in [0, 1).
    """
    flip, contrast, brightness = tf.unstack(draws[..., None, None, None])
    both = tf.concat([images, labels[..., None]], axis=-1)  # flipped as one
    both = tf.where(flip < 0.5, both[:, :, ::-1], both)
    x, labels = tf.cast(both[..., :3], tf.float32), both[..., 3]
    mean = tf.reduce_mean(x, (1, 2, 3), keepdims=True)
    x = (x - mean) * (0.8 + 0.4 * contrast) + mean + 50 * (brightness - 0.5)
    return tf.saturate_cast(tf.round(x), tf.uint8), labels


class Decoded:
    """Samples decoded and resized once, in memory: 4 bytes a pixel."""

    def __init__(self, samples, image_shape):
        """Decode `samples`; raise ProgramError for a set that does not fit."""
        count = len(samples)
        size, free = 4 * count * np.prod(image_shape, dtype=float), free_for_tensors()
        if size > free:
            raise ProgramError(
                f"{count_of(count, 'image')} of {image_shape[0]}x{image_shape[1]} take "
                f"{size / 1e6:,.0f} MB of memory and {free / 1e6:,.0f} MB are free: "
                "lower --image-height and --image-width, or use fewer images"
            )
        self.samples = samples
        self.pixels = np.zeros((count, 2), np.float32)  # of either class
        with host():  # variables: each dataset would copy a constant
            self.images = tf.Variable(tf.zeros((count, *image_shape, 3), tf.uint8))
            self.labels = tf.Variable(tf.zeros((count, *image_shape), tf.uint8))
        in_parallel(self.decode, range(count), "decoding")
        if count:
            which = f"{count_of(count, 'image')} from {samples[0].label} on"
            need_both_classes(self.pixels.sum(axis=0), which)

    def decode(self, row):
        """Fill a row with its sample."""
        sample, image_shape = self.samples[row], self.labels.shape[1:]
        image, label = read_image(sample.image), read_label(sample.label)
        check_size(sample.label, label, image)
        with host():
            label = resize_label(label, image_shape)
            image = resize_image(image, image_shape)
            self.images.scatter_update(tf.IndexedSlices(image[None], [row]))
            self.labels.scatter_update(tf.IndexedSlices(label[None], [row]))
        self.pixels[row] = [np.count_nonzero(label == each) for each in (0, 1)]


BATCHES_AHEAD = 8  # that are made before their step
LINGERING = []  # several replicas' iterator: its end may take minutes, and can wait


class Batches:
    """Decoded samples in batches of images, labels and weights.

    Images (B, H, W, 3) uint8, labels (B, H, W) uint8, weights (B,) float32: a valid
    pixel's share of the batch's loss. Each replica of the device gets an equal part of
    a batch, filled up with void images of weight 0. Its length is the steps of an
    epoch.
    """

    def __init__(self, decoded, batch_size, seed, device):
        self.decoded, self.seed, self.device = decoded, seed, device
        self.count = len(decoded.samples)
        self.batch_size = min(batch_size, max(self.count, 1))
        self.valid = decoded.pixels.sum(axis=1)  # pixels

    def __len__(self):
        return self.count // self.batch_size

    def files(self, step):
        """Return the names of a training step's images."""
        rows = batch_rows(step, self.count, self.batch_size, self.seed)
        return [self.decoded.samples[row].image.name for row in rows]

    def from_step(self, step):
        """Return an iterator of the training steps from `step` on, shuffled, augmented.

        It is endless: workers would have to agree on an end at every step.
        """
        steps = iter(
            self.on_workers(
                self.training_part,
                lambda local: tf.data.Dataset.counter(step * local),
            )
        )
        if self.device.replicas > 1:
            LINGERING[:] = [steps]
        return steps

    def in_order(self):
        """Return every sample once, as it is, in order."""
        batches = -(-self.count // self.batch_size)
        return self.on_workers(
            self.ordered_part, lambda local: tf.data.Dataset.range(batches * local)
        )

    def on_workers(self, part, indices):
        """Return what each worker's replicas get: part(step, replica), one by one.

        `indices` makes the indices of a worker, from how many replicas it has.
        """

        def on_worker(context):
            local = context.num_replicas_in_sync // context.num_input_pipelines
            first = local * context.input_pipeline_id

            @tf.autograph.experimental.do_not_convert
            def of_index(index):
                return part(index // local, first + index % local)

            parts = indices(local).map(of_index, num_parallel_calls=BATCHES_AHEAD)
            return self.prefetched(parts)

        return self.device.strategy.distribute_datasets_from_function(on_worker)

    def training_part(self, step, replica):
        """Return a replica's part of a training step."""
        rows = batch_rows(step, self.count, self.batch_size, self.seed)
        draws = tf.random.stateless_uniform((3, self.batch_size), [self.seed, step])
        return self.part(rows, replica, draws)

    def ordered_part(self, step, replica):
        """Return a replica's part of a batch of the samples in order."""
        rows = tf.range(self.count)[step * self.batch_size :][: self.batch_size]
        return self.part(rows, replica)

    def part(self, rows, replica, draws=None):
        """Return a replica's part of a batch of `rows`, augmented by `draws`.

        Where the batch does not divide, the last places repeat the first row, as void.
        """
        size = -(-self.batch_size // self.device.replicas)
        places = replica * size + tf.range(size, dtype=tf.int64)
        real = places < tf.size(rows, tf.int64)
        places = tf.where(real, places, 0)
        chosen = tf.gather(rows, places)
        images = tf.gather(self.decoded.images, chosen)
        labels = tf.gather(self.decoded.labels, chosen)
        if draws is not None:
            images, labels = augment(images, labels, tf.gather(draws, places, axis=1))
        labels = tf.where(real[:, None, None], labels, VOID)
        weight = tf.math.divide_no_nan(1.0, tf.reduce_sum(tf.gather(self.valid, rows)))
        return images, labels, tf.where(real, weight, 0)

    def prefetched(self, dataset):
        """Return `dataset` made ahead, on the GPU itself where it is one."""
        options = tf.data.Options()
        # A thread that tunes ends up to a minute after the last use, and the checkpoint
        # of a run that is stopped would wait for it. To those of several replicas
        # TensorFlow gives no options: see LINGERING.
        options.autotune.enabled = False
        dataset = dataset.with_options(options)
        gpus = tf.config.list_logical_devices("GPU")
        if self.device.replicas > 1 or not gpus:
            return dataset  # the CPU has it already; several replicas fetch their own
        fetch = tf.data.experimental.prefetch_to_device(gpus[0].name, buffer_size=2)
        return dataset.apply(fetch).with_options(options)


def gen_batch_function(samples, image_shape, seed=0, device=None):
    """Decode and resize `samples` once; return get_batches_fn(batch_size) -> Batches.

    The order and the augmentation of training steps are functions of `seed` and the
    step. Raises ProgramError for a set that does not fit into memory, for a label that
    is none, and for a set without background or road.
    """
    decoded = Decoded(samples, image_shape)
    return functools.partial(Batches, decoded, seed=seed, device=device or Device())


# --------------------------------------------------------------------- inference

ROAD = (255, 0, 255)  # no verge, sky or asphalt is magenta
IN_FLIGHT = 40_000_000  # pixels at once; each takes some 25 bytes: about a gigabyte
VIDEOS = ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts"
MP4_SIDE = 16_384  # pixels that its encoder takes
STATE_NOTHING = ".mpg", ".mpeg", ".ts"  # their length is what is in them
READABLE = f"{', '.join(IMAGES)} or a video ({', '.join(VIDEOS)})"


def need_two_classes(model, what):
    """Raise ProgramError unless `model` tells background and road: `what` is for two.

    Without this more classes would be scored or drawn as if the second were road.
    """
    classes = model.output_shape[-1]
    if classes != 2:
        raise ProgramError(
            f"{what} are for two classes, background and road, not {classes}: train "
            "more with train_nn, and use the logits"
        )


class Predictor:
    """A model that segments images of any size; the network sees them at one.

    An image is shrunk, goes through the network, as it is and mirrored, and its
    probabilities grow back. Each of these steps has one trace for all batches and
    sizes: traces for certain sizes round differently, and which there are would depend
    on what was segmented before.
    """

    def __init__(self, model, image_shape, batch_size=5):
        need_two_classes(model, "overlays and confidences")
        self.model, self.image_shape = model, tuple(image_shape)
        self.batch_size = batch_size
        images = tf.TensorSpec((None, None, None, 3), tf.uint8)
        small = tf.TensorSpec((None, *image_shape, 3), tf.uint8)
        roads = tf.TensorSpec((None, None, None), tf.float32)
        size = tf.TensorSpec((2,), tf.int32)
        self.shrink = traced(self._shrink, input_signature=[images])
        self.network = traced(self._network, input_signature=[small])
        self.grow = traced(self._grow, input_signature=[roads, size])
        self.serve = traced(self._serve, input_signature=[images])

    def _shrink(self, images):
        with host():  # it has no GPU kernel; and less goes over
            return resize_image(images, self.image_shape)

    def _network(self, images):
        # the mean with the mirror image's: in 18 runs 0.04 to 1.3 points of MaxF more
        both = tf.concat([images, images[:, :, ::-1]], axis=0)
        roads = tf.nn.softmax(self.model(both, training=False))[..., 1]
        roads, mirrored = tf.split(roads, 2)
        return (roads + mirrored[:, :, ::-1]) / 2

    def _grow(self, roads, size):
        return tf.squeeze(tf.image.resize(roads[..., None], size), -1)

    def _serve(self, images):
        size = tf.shape(images)[1:3]
        return {"road": self.grow(self.network(self.shrink(images)), size)}

    def shrunk(self, image):
        """Return an image (H, W, 3) uint8 as the network sees it, on the host."""
        with host():
            return self.shrink(tf.constant(image[None])).numpy()[0]

    def grown(self, road, image):
        """Return a probability (h, w) float32 at the size of its image, on the host."""
        with host():
            return self.grow(tf.constant(road[None]), image.shape[:2]).numpy()[0]


def batched(items, count):
    """Yield lists of `count` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, count)):
        yield batch


def segment(predictor, samples, depth):
    """Yield (name, image, road probability (h, w)) of (name, image), in order.

    Shrinking and the network go on while the caller works on what came before, each at
    most `depth` images ahead. Images of any size share a batch.
    """

    def shrink(sample):
        return *sample, predictor.shrunk(sample[1])

    def network(batch):
        roads = predictor.network(np.stack([small for *_, small in batch])).numpy()
        return [(name, image, road) for (name, image, _), road in zip(batch, roads)]

    count = max(min(predictor.batch_size, depth), 1)
    batches = batched(ahead(shrink, samples, depth), count)
    segmented = ahead(network, batches, min(depth, 1), workers=1)
    return itertools.chain.from_iterable(segmented)


def count_pixels(path):
    """Return the pixels of an image as its header states."""
    readable = blaming(path, "a readable image", "replace or remove it")
    with readable, Image.open(path) as image:
        return image.width * image.height


def stage_depth(pixels):
    """Return how many images of so many pixels each stage may hold; 0: alone."""
    return min(IN_FLIGHT // 4 // pixels, CORES + 2)


def gen_test_output(predictor, image_paths, depth):
    """Yield (path, image (H, W, 3) uint8, road probability (h, w) float32).

    The probability is at the network's size; predictor.grown brings it to the image's.
    Reading, shrinking and the network are at most `depth` images ahead.
    """
    samples = ahead(lambda path: (path, read_image(path)), image_paths, depth)
    return segment(predictor, samples, depth)


def inner(mask):
    """Return bool (H, W) `mask` without its outermost pixel; the frame is no end."""
    x = mask.copy()
    x[1:] &= mask[:-1]
    x[:-1] &= mask[1:]
    y = x.copy()
    y[:, 1:] &= x[:, :-1]
    y[:, :-1] &= x[:, 1:]
    return y


def overlay(image, road):
    """Tint uint8 `image` (H, W, 3) where the probability (H, W) is at least 0.5.

    The outline, two pixels inside, is opaque; the rest lets lane marks and shadows
    through.
    """
    found = road >= 0.5
    opacity = np.where(found, np.uint8(255), np.uint8(0))
    opacity[inner(inner(found))] = 90
    picture = Image.fromarray(image)
    picture.paste(ROAD, mask=Image.fromarray(opacity))  # a fifth of NumPy's time
    return np.asarray(picture)


def thumbnail(pixels):
    """Return uint8 `pixels` (H, W, 3) as small as the report shows test images."""
    image = Image.fromarray(pixels)
    image.thumbnail((480, image.height), reducing_gap=None)
    return np.asarray(image)


def save_sample(run_dir, predictor, submission, sample):
    """Write the overlay of (path, image, road), and its thumbnail.

    With `submission` returns the confidences from above, as a PNG's bytes.
    """
    path, image, road = sample
    road = predictor.grown(road, image)
    tinted = overlay(image, road)
    save_image(tinted, run_dir / f"{path.stem}.png")
    save_image(thumbnail(tinted), run_dir / "thumbnails" / f"{path.stem}.jpg")
    if submission:
        cells = seen_cells(read_homography(path), road.shape)
        return encoded(birds_eye(to_confidence(road).numpy(), cells, outside=0))


def save_inference_samples(run_dir, predictor, image_paths, submission=False):
    """Write the overlays of all `image_paths` into `run_dir`, each whole or not at all.

    With `submission` also submission.zip, for KITTI Road's server: the confidences
    from above, which needs a calibration of each image.
    """
    if not image_paths:
        return
    (run_dir / "thumbnails").mkdir(parents=True, exist_ok=True)
    depth = stage_depth(max(map(count_pixels, image_paths)))
    save = functools.partial(save_sample, run_dir, predictor, submission)
    saved = ahead(save, gen_test_output(predictor, image_paths, depth), depth)
    bar = tqdm(saved, "overlays", len(image_paths), unit="image", disable=None)
    views = dict(zip(image_paths, bar, strict=True))  # to the bar's end
    if submission:
        with (
            written(run_dir / "submission.zip") as part,
            zipfile.ZipFile(part, "w") as archive,
        ):
            for path, view in views.items():
                archive.writestr(road_name(path), view)


def find_inputs(paths):
    """Return the images and videos of `paths`, and what cannot be used, as text.

    `paths` are files and folders; folders in folders and hidden files are left alone.
    Raises ProgramError where nothing can be used.
    """
    found = {}  # as an ordered set
    problems = []
    for path in paths:
        files = [path]
        if os.path.isdir(path):
            try:
                files = [f for f in sorted(path.iterdir()) if f.name[0] != "."]
            except OSError as error:
                problems.append(f"{path}: not a readable folder ({error.strerror})")
                continue
            known = [f for f in files if f.suffix.lower() in IMAGES + VIDEOS]
            if not known:
                problems.append(f"{path}: no {READABLE} in it")
            elif len(known) < len(files):
                left = count_of(len(files) - len(known), "other file")
                print(f"{left} in {path} left alone")
            files = known
        for file in files:
            if not os.path.exists(file):
                problems.append(f"{file}: no such file or folder")
            elif not os.path.isfile(file):
                problems.append(f"{file}: not a regular file")
            elif file.suffix.lower() not in IMAGES + VIDEOS:
                problems.append(f"{file}: not {READABLE}")
            else:
                found[file] = None
    if not found:
        raise ProgramError("; ".join(problems))
    return list(found), problems


def name_outputs(files):
    """Return {file: name of its overlay}, no two of which write to one file.

    An image keeps its name, a video becomes an mp4; the second of a stem gets a number,
    as confidences are all PNGs: a.png, a-2.jpg. Upper and lower case are the same here,
    as on some disks.
    """
    names, taken = {}, set()
    for file in files:
        suffix = file.suffix if file.suffix.lower() in IMAGES else ".mp4"
        for number in itertools.count(1):
            stem = file.stem if number == 1 else f"{file.stem}-{number}"
            if stem.lower() not in taken:
                break
        taken.add(stem.lower())
        names[file] = stem + suffix
    return names


def predict(files, problems, predictor, runs_dir, name):
    """Write overlays of the images and videos `files`.

    All go into a new folder in `runs_dir`: images under their own names, beside them
    confidence/, their road confidence in 8 bits; a video as mp4 of its size (in square
    pixels), rate and number of frames. Raises ProgramError at the end for `problems`
    and for what else could not be used.
    """
    names = name_outputs(files)
    folder = new_folder(runs_dir, name, "-predict")
    prediction = Prediction(folder, predictor, names, problems)
    start = time.perf_counter()
    try:
        done = prediction.of_images([f for f in names if f.suffix.lower() in IMAGES])
        for file in names:
            if file.suffix.lower() in VIDEOS:
                with prediction.noting(file):
                    done += prediction.of_video(file)
    finally:
        for emptied in folder / "confidence", folder:  # where nothing came into it
            with contextlib.suppress(OSError):
                emptied.rmdir()
    if done:
        rate = f"{done / (time.perf_counter() - start):.1f} a second"
        print(f"{count_of(done, 'overlay')} in {folder}: {rate}")
    if problems:
        rest = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ProgramError(f"left out: {'; '.join(problems[:20])}{rest}")


class Prediction:
    """The overlays of one --predict: the folder, {file: name in it}, the problems.

    What is wrong with one file is noted as text, and the others go on; a full disk ends
    it, but for a video's.
    """

    def __init__(self, folder, predictor, names, problems):
        self.folder, self.predictor = folder, predictor
        self.names, self.problems = names, problems

    def of_images(self, files):
        """Write the overlays and confidences of images; return how many."""
        pixels = {file: self.count_pixels(file) for file in files}
        readable = [file for file in files if pixels[file]]
        if not readable:
            return 0
        (self.folder / "confidence").mkdir()
        depth = stage_depth(max(pixels.values()))
        samples = filter(None, ahead(self.read, readable, depth))
        saved = ahead(self.save, segment(self.predictor, samples, depth), depth)
        return sum(tqdm(saved, "overlays", len(readable), unit="image", disable=None))

    @contextlib.contextmanager
    def noting(self, file):
        """Note what is wrong with `file`; a full disk ends it, but for a video's."""
        try:
            yield
        except ProgramError as error:
            self.problems.append(str(error))
        except OSError as error:
            if error.errno in FULL:
                raise
            reason = error.strerror or first_line(error)
            self.problems.append(f"{file}: cannot be written ({reason})")

    def count_pixels(self, file):
        """Return the pixels of an image as its header states, 0 if it is none."""
        with self.noting(file):
            return count_pixels(file)
        return 0

    def read(self, file):
        """Return the file and its image, None if it cannot be read."""
        with self.noting(file):
            return file, read_image(file)

    def save(self, sample):
        """Write overlay and confidence of (file, image, road); return whether."""
        file, image, road = sample
        target = self.folder / self.names[file]
        with self.noting(file):
            road = self.predictor.grown(road, image)
            save_image(overlay(image, road), target)
            confidence = to_confidence(road).numpy()
            save_image(confidence, self.folder / "confidence" / f"{target.stem}.png")
            return True
        return False

    def of_video(self, path):
        """Write the overlay of a video; return the number of its frames.

        What came before it broke off is kept. Raises ProgramError where nothing can be
        read, or written.
        """
        with blaming(path, "a readable video", "replace it, or leave it out"):
            source = str(path.absolute())  # a colon would be a protocol
            packets, measured, seconds, end = read_packets(source)
            # the same stream; no varying rate is evened out; and square pixels
            which = ["-map", "0:V:0", "-fps_mode", "passthrough"]
            # mp4's colours want an even width, which NTSC's would not have
            which += ["-vf", "scale='if(eq(sar,1),iw,2*round(iw*sar/2))':ih"]
            frames = imageio_ffmpeg.read_frames(source, output_params=which)
            facts = next(frames)
            first = next(frames)
            stated = facts["fps"]
            if stated and abs(measured / stated - 2) < 0.01 and are_fields(source):
                packets, measured = packets // 2, measured / 2
        hidden = facts["codec"].startswith("vp8")  # some packets show nothing
        rate = measured or stated or 25
        if stated and abs(rate / stated - 1) < (0.25 if hidden else 0.01):
            rate = stated  # where it is far off it is a bound, or a guess
        lost = seconds_lost(source, facts["duration"], end)
        cut = lost > 0.5 + 1 / rate
        expected = round((seconds + lost) * rate) if cut else packets
        width, height = facts["size"]

        def images():
            try:
                for frame in itertools.chain([first], frames):
                    pixels = np.frombuffer(frame, np.uint8)
                    yield path, pixels.reshape(height, width, 3)
            except RuntimeError:  # of imageio_ffmpeg
                self.problems.append(f"{path}: it breaks off in the middle of a frame")

        with contextlib.closing(frames):
            if max(width, height) > MP4_SIDE:
                raise ProgramError(
                    f"{path}: {width}x{height}: mp4 takes {MP4_SIDE:,} pixels a side: "
                    "shrink it"
                )
            target = self.folder / self.names[path]
            depth = stage_depth(width * height)
            segmented = segment(self.predictor, images(), depth)
            tinted = ahead(self.tint, segmented, depth)
            bar = tqdm(tinted, path.name, expected, unit="frame", disable=None)
            done = write_video(target, bar, facts["size"], rate)
            if hidden and not cut:
                expected = done  # none can be missed
            if done < expected:
                missing = f"{expected - done} of {expected} frames are missing"
                self.problems.append(f"{path}: {missing}: it is damaged or cut off")
            return done

    def tint(self, sample):
        """Return the overlay of (path, image, road)."""
        _, image, road = sample
        return overlay(image, self.predictor.grown(road, image))


def framecrc(*options):
    """Run ffmpeg with `options`; its output has a line for each packet or frame."""
    return subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-nostats", *options, "-f", "framecrc", "-"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
        text=True,
        errors="replace",
    )


def read_packets(path, *others):
    """Return a video's frames, decodable or not; their rate, seconds and end.

    The rate is the mean, 0 for a single frame. The end, in seconds, is the last of the
    video's and of `others`, streams as ffmpeg names them. What was cut off without
    encoding anew is still in the file, marked as discarded. Raises ValueError for a
    file without frames.
    """
    streams = [word for stream in ("0:V:0", *others) for word in ("-map", stream)]
    done = framecrc("-i", path, *streams, "-c", "copy")
    units = re.findall(r"#tb (\d+): (\d+)/(\d+)", done.stdout)
    units = {stream: int(above) / int(below) for stream, above, below in units}
    starts, ends, last = [], [], 0.0
    decoded = set()  # when: unlike `starts` in even steps where a part was cut off
    row = r"^(\d+), *(-?\d+), *(-?\d+), *(\d+),.*?(?:F=0x([0-9A-F]+)|$)"
    for found in re.finditer(row, done.stdout, re.MULTILINE):
        stream, dts, pts, length, flags = found.groups()
        if stream == "0":
            decoded.add(int(dts))
        if int(flags or "0", 16) & 4:  # AV_PKT_FLAG_DISCARD
            continue
        start = int(pts) if int(pts) > -(2**62) else int(dts)  # it may have none
        last = max(last, (start + int(length)) * units[stream])
        if stream == "0":
            starts.append(start)
            ends.append(start + int(length))
    if not starts:
        said = done.stderr.strip().splitlines()[-1] if done.returncode else "no frames"
        raise ValueError(said)
    # Matroska states when it ends, all others how long they are
    start = re.search(r"Duration: .*, start: (-?[\d.]+)", done.stderr)
    if start and "Input #0, matroska" in done.stderr:
        last += float(start[1])
    span = (max(decoded) - min(decoded)) * units["0"]
    rate = (len(decoded) - 1) / span if span else 0
    return len(starts), rate, (max(ends) - min(starts)) * units["0"], last


def are_fields(path):
    """Return whether two packets of a video make a frame, as two seconds of it tell.

    In H.264 each field of an interlaced frame may be a packet of its own.
    """
    streams = ["-map", "0:V:0", "-map", "0:V:0", "-c:v:0", "copy"]
    done = framecrc("-t", "2", "-i", path, *streams, "-fps_mode", "passthrough")
    packets = len(re.findall("^0,", done.stdout, re.MULTILINE))
    frames = len(re.findall("^1,", done.stdout, re.MULTILINE))
    return packets > 1.5 * frames


def seconds_lost(path, stated, end):
    """Return how many of the seconds that a video file states are not in it.

    `end` is when its picture ends, in seconds.
    """
    if Path(path).suffix.lower() in STATE_NOTHING or stated - end < 0.5:
        return 0
    with contextlib.suppress(ValueError):  # of a stream that ffmpeg cannot copy
        *_, end = read_packets(path, "0:V?", "0:a?", "0:s?")  # which may be longer
    return stated - end


def write_video(path, frames, size, rate):
    """Write frames of `size` (W, H) as mp4, all or nothing; return their number."""
    odd = size[0] % 2 or size[1] % 2  # which colours at half the size cannot have
    count = 0
    with written(path) as part:
        video = imageio_ffmpeg.write_frames(
            str(part.absolute()),
            size,
            pix_fmt_out="yuv444p" if odd else "yuv420p",
            fps=rate,
            quality=None,
            codec="libx264",
            macro_block_size=1,
            ffmpeg_log_level="quiet",
            # the default preset takes 2.3 times as long, for as many bytes; and what
            # does not say its colours is taken for bt709
            output_params=["-preset", "veryfast", "-crf", "21", "-f", "mp4"]
            + ["-vf", "scale=out_color_matrix=bt709:out_range=tv"],
        )
        try:
            with contextlib.closing(video):
                video.send(None)
                for frame in frames:
                    video.send(frame)
                    count += 1
        except OSError as error:
            raise ProgramError(
                f"{path}: ffmpeg gave up at frame {count}: make room, or set --runs-dir"
            ) from error
        check_video(part, path, count)
    return count


def check_video(part, path, count):
    """Raise ProgramError unless `part` has all frames: ffmpeg's exit is not told."""
    try:
        found, *_ = read_packets(str(part.absolute()))
    except ValueError:
        found = 0
    if found != count:
        raise ProgramError(
            f"{path}: ffmpeg wrote {found} of {count} frames: make room, or set "
            "--runs-dir"
        )


def check_export(folder):
    """Raise ProgramError where no SavedModel can be."""
    if folder.exists():
        raise ProgramError(f"{folder}: exists: name a new folder with --export")
    if re.search(r"[\[\ud800-\udfff]", str(folder)):
        raise ProgramError(
            f"{folder}: has a [ or is not UTF-8, so that TensorFlow could not load it: "
            "name another folder with --export"
        )


def export(predictor, folder):
    """Write a SavedModel: images (B, H, W, 3) uint8 to road (B, H, W)."""
    check_export(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = 5 * predictor.model.count_params() + 10**6
    need_space(folder.parent, size, "the SavedModel")

    module = tf.Module()
    module.model, module.serve = predictor.model, predictor.serve
    with written(folder) as part:
        try:
            tf.saved_model.save(module, part, signatures=module.serve)
        except tf.errors.OpError as error:
            raise ProgramError(
                f"{folder}: {error.message}: make room, or see who may write"
            ) from error
    print(f"{folder} is a SavedModel: tf.saved_model.load(...).serve(images)")


# ------------------------------------------------------------------------ scores

PLANES = {"image": "image plane", "bev": "bird's-eye view"}
BEV_X, BEV_Z, BEV_CELL = (-10, 10), (6, 46), 0.05  # metres: 800 x 400 cells
MISSED, FALSE = (230, 60, 0), (0, 110, 255)  # colours of errors
TRUTH = (255, 225, 0)  # outline of the ground truth
ERRORS_WIDTH = 576  # pixels of the pictures of errors


def seen_cells(homography, image_shape):
    """Return the cells of KITTI Road's bird's-eye view that an image (H, W) shows.

    A mask (800, 400), the far cells on top, and the rows and columns of the pixels
    that the centres of the masked cells fall into. Cells are 5 cm wide.
    """
    x = np.arange(*BEV_X, BEV_CELL) + BEV_CELL / 2
    z = np.arange(*BEV_Z, BEV_CELL)[::-1] + BEV_CELL / 2
    plane = np.stack(np.broadcast_arrays(x, z[:, None], 1.0))
    u, v, w = np.tensordot(homography, plane, axes=1)
    u, v = u / w, v / w
    height, width = image_shape
    seen = (w > 0) & (1 <= u) & (u <= width) & (1 <= v) & (v <= height)
    return seen, v[seen].astype(int) - 1, u[seen].astype(int) - 1


def birds_eye(pixels, cells, outside):
    """Return `pixels` (H, W) uint8 as seen from above, (800, 400) uint8.

    `cells` are those of seen_cells; the others are `outside`.
    """
    seen, rows, columns = cells
    view = np.full(seen.shape, outside, np.uint8)
    view[seen] = pixels[rows, columns]
    return view


def to_confidence(road):
    """Return the road probability in 8 bits: all that is scored, and submitted."""
    return tf.cast(tf.round(road * 255), tf.uint8)


def confidence_histogram(confidence, labels):
    """Count the valid pixels by class and 8-bit confidence, (2, 256) int32.

    Both uint8, of one shape; every score derives from this. The bins are int64, as
    TensorFlow computes with int32 on the host, whatever the device.
    """
    valid = labels != VOID
    bins = tf.cast(labels, tf.int64) * 256 + tf.cast(confidence, tf.int64)
    counts = tf.math.unsorted_segment_sum(
        tf.cast(valid, tf.int32), tf.where(valid, bins, 0), 512
    )
    return tf.reshape(counts, (2, 256))


def at_thresholds(histogram):
    """Return precision, recall, false positives and true positives, (256,) each.

    At threshold k/255 road is what has that confidence or more.
    """
    histogram = np.asarray(histogram, np.float64)
    fp, tp = np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1]
    precision = tp / (tp + fp + 1e-10)
    return precision, tp / max(histogram[1].sum(), 1), fp, tp


def scores(histogram):
    """Return KITTI Road's pixel measures in percent, from a confidence histogram.

    Fritsch et al., "A New Performance Measure and Evaluation Benchmark for Road
    Detection Algorithms", ITSC 2013: road is confidence >= k/255 for 256 thresholds
    k; MaxF is the largest F1, PRE, REC, FPR and FNR are those of its `threshold`; AP
    is the mean, over recall 0, 0.1 ... 1, of the largest precision at that recall or
    more. IoU is that of `threshold`, IoU50 and accuracy are those of 0.5.
    """
    precision, recall, fp, tp = at_thresholds(histogram)
    negatives, positives = np.sum(histogram, axis=1, dtype=np.float64)
    tiny = 1e-10
    f1 = 2 * precision * recall / (precision + recall + tiny)
    iou = tp / (positives + fp + tiny)
    best, half = int(np.argmax(f1)), 128
    levels = [precision[recall >= k / 10] for k in range(11)]
    measures = {
        "MaxF": f1[best],
        "AP": np.mean([level.max(initial=0) for level in levels]),
        "PRE": precision[best],
        "REC": recall[best],
        "FPR": fp[best] / max(negatives, 1),
        "FNR": 1 - recall[best],
        "threshold": best / 255,
        "IoU": iou[best],
        "IoU50": iou[half],
        "accuracy": (tp[half] + negatives - fp[half]) / max(negatives + positives, 1),
    }
    return {name: 100 * float(value) for name, value in measures.items()}


def error_picture(image, found, label):
    """Show in uint8 `image` (H, W, 3) where road `found` (H, W) bool is wrong.

    Missed and false road get their colours, void is hatched, and the road of `label`,
    ids (H, W), has an outline; what is right is left as it is.
    """
    picture, truth = image.copy(), label == 1
    rows, columns = (np.arange(side, dtype=np.uint16) for side in label.shape)
    stripes = (rows[:, None] + columns) % 8 < 3
    picture[label == VOID] = picture[label == VOID] // 4 + 96
    picture[(label == VOID) & stripes] = 60
    picture[truth & ~found] = MISSED
    picture[(label == 0) & found] = FALSE
    picture[truth & ~inner(truth)] = TRUTH
    return picture


def write_errors(path, image, found, label):
    """Write the overlay and the errors of `found` (H, W), small, for the report."""
    width = min(ERRORS_WIDTH, label.shape[1])
    size = max(round(label.shape[0] * width / label.shape[1]), 1), width
    small = resize_image(image, size).numpy()
    found = resize_label(found.astype(np.uint8), size).numpy()
    label = resize_label(label, size).numpy()
    save_image(overlay(small, found), path.with_name(f"{path.name}.jpg"))
    errors = error_picture(small, found == 1, label)
    save_image(errors, path.with_name(f"{path.name}_errors.jpg"))


def score_image(predictor, holdout_dir, errors_dir, task):
    """Write the confidence and the errors of a hold-out image; return its counts.

    `task` is its sample, and its (path, image, road) of gen_test_output. The counts are
    {plane: confidence histogram (2, 256)}, "bev" where it has a calibration.
    """
    sample, (_, image, road) = task
    road = predictor.grown(road, image)
    confidence, label = to_confidence(road).numpy(), read_label(sample.label)
    check_size(sample.label, label, image)
    save_image(confidence, holdout_dir / road_name(sample.image))
    write_errors(errors_dir / sample.image.stem, image, road >= 0.5, label)
    counts = {"image": confidence_histogram(confidence, label).numpy()}
    homography = read_homography(sample.image)
    if homography is not None:
        cells = seen_cells(homography, label.shape)
        view, truth = birds_eye(confidence, cells, 0), birds_eye(label, cells, VOID)
        counts["bev"] = confidence_histogram(view, truth).numpy()
    return counts


def score_holdout(run_dir, predictor, holdout):
    """Score the samples at their own size; write their confidences and errors.

    Returns what run.json has: `scores`, {"image": {category: measures}, "bev": {...}},
    over the categories and all of them, "urban", "bev", the bird's-eye view, over the
    calibrated images; `curves`, {category: [(recall, precision) at each threshold]}
    of the image plane; `holdout`, each image's measures. All in percent. `run_dir`
    gets holdout/, the 8-bit values that are scored, and errors/.
    """
    kinds = sorted({category(sample.image) for sample in holdout})
    pooled = {plane: {kind: [] for kind in (*kinds, "urban")} for plane in PLANES}
    each = {}
    with (
        written(run_dir / "holdout") as holdout_dir,
        written(run_dir / "errors") as errors_dir,
    ):
        holdout_dir.mkdir()
        errors_dir.mkdir()
        score = functools.partial(score_image, predictor, holdout_dir, errors_dir)
        paths = [sample.image for sample in holdout]
        depth = stage_depth(max(map(count_pixels, paths)))
        segmented = gen_test_output(predictor, paths, depth)
        counted = ahead(score, zip(holdout, segmented), depth)
        bar = tqdm(counted, "scoring", len(holdout), unit="image", disable=None)
        for sample, counts in zip(holdout, bar, strict=True):  # to the bar's end
            kind = category(sample.image)
            for plane, histogram in counts.items():
                pooled[plane][kind].append(histogram)
                pooled[plane]["urban"].append(histogram)
            each[sample.image.stem] = {"category": kind, **at_half(counts["image"])}
    sums = {
        plane: {kind: np.sum(found, axis=0) for kind, found in groups.items() if found}
        for plane, groups in pooled.items()
    }
    need_both_classes(sums["image"]["urban"].sum(axis=1), "hold-out")
    if not sums["bev"]:
        print("no hold-out image has a calibration: no scores in the bird's-eye view")
    for plane, groups in sums.items():
        for kind, histogram in list(groups.items()):
            if not histogram.sum(axis=1).all():
                print(f"{kind}, {PLANES[plane]}: one class only, no score of its own")
                del groups[kind]
    measured = {
        plane: {
            kind: {"images": len(pooled[plane][kind]), **scores(histogram)}
            for kind, histogram in groups.items()
        }
        for plane, groups in sums.items()
    }
    curves = {
        kind: precision_recall(histogram) for kind, histogram in sums["image"].items()
    }
    return {"scores": measured, "curves": curves, "holdout": each}


def at_half(histogram):
    """Return an image's IoU and shares of missed and false road at 0.5, in percent.

    Where there is no road none is missed, and to find none is right.
    """
    background, road = np.sum(histogram, axis=1)
    found = np.sum(histogram[:, 128:], axis=1)
    if not road:
        found_right = {"IoU50": 0.0 if found[0] else 100.0, "missed": 0.0}
    else:
        missed = 100 * float(1 - found[1] / road)
        found_right = {"IoU50": scores(histogram)["IoU50"], "missed": missed}
    return found_right | {"false": 100 * float(found[0] / max(background, 1))}


def precision_recall(histogram):
    """Return (recall, precision) at each of the 256 thresholds, in percent."""
    precision, recall, _, _ = at_thresholds(histogram)
    return np.round(100 * np.stack([recall, precision], axis=1), 3).tolist()


def print_scores(planes):
    """Print the scores of score_holdout, in at most 100 columns."""
    short = {"threshold": "thresh.", "accuracy": "acc."}
    for plane, kinds in planes.items():
        if not kinds:
            continue
        names = [short.get(name, name) for name in next(iter(kinds.values()))]
        print(PLANES[plane])
        print(f"{'percent':10}" + "".join(f"{name:>8}" for name in names))
        for kind, measures in kinds.items():
            images, *values = measures.values()
            cells = "".join(f"{value:8.2f}" for value in values)
            print(f"{kind[:10]:10}{images:>8}{cells}")


# --------------------------------------------------------------------------- run

WEIGHTS = "fcn8s.weights.h5"  # of a run's folder
CHECKPOINTS = "checkpoint"  # likewise
FRAMES = "frames"  # in there: of progress.gif
NOT_RECORDED = "resume", "predict", "export"  # settings that are none of a run
STATES = "running", "stopped", "failed", "finished"
FACTS = "fcn8s"  # the attribute of a weight file that says what it is
SEEN = "seen"  # the data set in it that says what images it was trained on


def read_run(run_dir):
    """Return what run.json in `run_dir` holds, for going on with that run.

    Raises ProgramError that names what is missing or of another kind.
    """
    path = run_dir / "run.json"
    with blaming(path, "the record of a run of this version", "name another folder"):
        record = json.loads(path.read_text())
        kinds = {
            bool: ("trained",),
            str: ("state", "started", "images"),
            (int, float): ("seconds", "peak_memory"),
            dict: ("config", "defaults", "device", "data"),
            list: ("history", "resumed", "seen_before"),
        }
        for kind, names in kinds.items():
            for name in names:
                if not isinstance(record.get(name), kind):
                    raise TypeError(f"{name} is {record.get(name)!r}")
        if record["state"] not in STATES:
            raise ValueError(f"state is {record['state']!r}")
        for number, epoch in enumerate(record["history"], start=1):
            check_epoch(epoch, number)
        for name, kind in ("resumed", int), ("seen_before", str):
            if not all(type(item) is kind for item in record[name]):
                raise ValueError(f"{name} is {record[name]!r}")
        for name in "seconds", "peak_memory":
            if not 0 <= record[name] < 1e13:
                raise ValueError(f"{name} is {record[name]!r}")
        json.dumps(record, allow_nan=False)  # or it could not be written again
        return record


def check_epoch(record, number):
    """Raise ValueError unless `record` is that of the epoch with that number."""
    if not isinstance(record, dict) or record.get("epoch") != number:
        raise ValueError(f"history has no epoch {number} in its place")
    for name, value in record.items():
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise ValueError(f"history: {name} of epoch {number} is {value!r}")


def check_network(facts, network):
    """Raise ValueError unless `facts`, of weights or a run, are of this network."""
    found = facts.get("network") or {}
    for name, expected in network.items():
        if found.get(name) != expected:
            raise ValueError(f"its {name} are {found.get(name)}, not {expected}")


def has_weights(run_dir, record):
    """Return whether weights of this very run are there to go on from."""
    return record["trained"] or bool(find_checkpoints(run_dir))


def leave_if_finished(run_dir):
    """Return whether the run needs no resuming; say so, and remove what a kill left."""
    record = read_run(run_dir)
    finished = record["state"] == "finished"
    if finished:
        remove_folder(run_dir / CHECKPOINTS)
        print(f"{run_dir} is finished; its weights are {run_dir / WEIGHTS}")
        print(f"to train on from them: {train_on(run_dir, record)}")
    return finished


def command(flag, path):
    """Return a command line of this program, ready to be typed."""
    return f"python main.py {flag} {shlex.quote(str(path))}"


def train_on(run_dir, record):
    """Return the command line that trains on from a run's weights, on its data."""
    config, line = record["config"], command("--weights", run_dir)
    if config.get("demo"):
        line += " --demo"
    data_dir = Path(config.get("data_dir", "data"))
    if data_dir.absolute() != Path("data").absolute():
        line += f" --data-dir {shlex.quote(str(data_dir))}"
    return line


def flattery(record):
    """Return a remark on scores of images that were trained on; "" if none was."""
    if not record["seen_holdout"]:
        return ""
    seen, total = record["seen_holdout"], record["data"]["holdout"]
    return f"{seen} of the {total} images were trained on too: the scores flatter"


def named(run_dir):
    """Return the path of a run's folder with its name, which "." and ".." lack."""
    return run_dir.resolve() if run_dir.name in ("", "..") else run_dir


def check_name(name):
    """Raise ProgramError for a --name that is none; index.html is the overview's."""
    if not name:
        return
    plain = name == Path(name).name and name[0] != "." and name != "index.html"
    if not plain or len(os.fsencode(name)) > 200:  # a number may follow
        raise ProgramError(
            f"--name {name}: not the plain name of a folder, of at most 200 bytes"
        )


def check_place(config):
    """Raise where no run can be, before anything is downloaded for it."""
    check_name(config.name)
    path = config.resume or config.runs_dir / (config.name or "")
    if re.search(r"[*?[\ud800-\udfff]", str(path)):
        other = "rename it" if config.resume else "name another --runs-dir or --name"
        raise ProgramError(
            f"{path}: TensorFlow finds no checkpoint where * ? or [ is in the path, or "
            f"what is not UTF-8: {other}"
        )
    if not config.resume:
        try:
            config.runs_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.runs_dir):
                pass  # whoever may write this may write a run
        except OSError as error:
            raise ProgramError(
                f"{config.runs_dir}: nothing may be written there ({error.strerror}): "
                "set --runs-dir"
            ) from error


def new_folder(runs_dir, name, suffix=""):
    """Make a folder in `runs_dir`: `name`, or the time; numbered if taken."""
    name = name or time.strftime("%Y%m%d-%H%M%S") + suffix
    runs_dir.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = runs_dir / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def is_followed(epoch, epochs):
    """Return whether progress.gif has a frame of an epoch: at most 62 of them have."""
    return epoch % -(-epochs // 60) == 0 or epoch in (1, epochs)


def followed_frame(image, predictor, epoch):
    """Return what the network makes of `image` (h, w, 3) after an epoch, named."""
    road = predictor.network(image[None]).numpy()[0]
    frame = Image.fromarray(overlay(image, road))
    size = max(frame.height // 10, 10)
    draw = ImageDraw.Draw(frame)
    draw.text(
        (6, 2), f"epoch {epoch}", font_size=size, stroke_width=2, stroke_fill="black"
    )
    return np.asarray(frame)


def write_progress(run_dir):
    """Make progress.gif of the frames that were kept, 62 of them at most."""
    paths = find_frames(run_dir)
    if not paths:
        return
    every = -(-len(paths) // 62)
    paths = paths[::-every][::-1]  # with the last
    with written(run_dir / "progress.gif") as part:
        frames = [Image.open(path).convert("RGB") for path in paths]
        durations = [400] * (len(frames) - 1) + [2500]  # ms
        rest = {"save_all": True, "append_images": frames[1:], "loop": 0}
        frames[0].save(part, duration=durations, **rest)


@contextlib.contextmanager
def open_run(config, network, split, device):
    """Make a run's folder, or take up config.resume's; yield the Run.

    It counts as finished, and the checkpoints go, only once the caller is through; if
    it fails before there is anything to show, a new folder goes again. Of several
    workers only the chief writes. Raises ProgramError while another program is at work
    there.
    """
    # before there is a folder: these may be stopped, or fail
    digests = split.digests()
    seen = [] if config.resume or not config.weights else read_seen(config.weights)
    if not device.chief:
        path = config.resume or config.runs_dir
        yield Run(path, config, network, split, digests, seen, device)
        return
    path = config.resume or new_folder(config.runs_dir, config.name)
    with locked(path / CHECKPOINTS / "run", wait=False):
        run = Run(path, config, network, split, digests, seen, device)
        try:
            if not config.resume:  # there the checkpoint has to be accepted first
                run.write()
            yield run
            run.finish()
        except BaseException as error:
            run.fail(error)
            raise
    remove_folder(path / CHECKPOINTS)


class Run:
    """A run: its folder and record, its state, weights, checkpoints and pictures."""

    def __init__(self, path, config, network, split, digests, seen, device):
        self.path, self.config, self.network = path, config, network
        self.split, self.digests, self.device = split, digests, device
        self.record = {
            "trained": False,
            "seconds": 0.0,
            "peak_memory": 0,  # bytes
            "resumed": [],
            "history": [],
            "seen_before": seen,
        }
        if config.resume:
            self.take_up()
        self.record |= self.facts() | {"scores": {}, "curves": {}, "holdout": {}}
        self.start = time.monotonic() - self.record["seconds"]
        self.may_write = not config.resume  # whether the record may be changed
        self.saved_time = time.monotonic()  # when a checkpoint was written
        self.saved_progress = None  # its (step, epoch)
        self.checkpoint_number = 0
        self.state = self.predictor = self.stop = None  # until begin and training
        self.writer = ThreadPoolExecutor(1)  # of run.json and the pages
        self.writing = None  # what it is at

    @property
    def to_train(self):
        """Whether anything is left to train."""
        return not self.record["trained"] and self.config.epochs > 0

    @property
    def has_weights(self):
        """Whether weights of this very run are there to go on from."""
        return has_weights(self.path, self.record)

    def take_up(self):
        """Take over the record of the run that is resumed."""
        record = read_run(self.path)
        self.record |= record
        if record["state"] == "finished":  # while this program looked at the data
            raise ProgramError(f"{self.path} is finished: nothing to go on with")
        with blaming(self.path, "a run of this network", "begin a new one"):
            check_network(record, self.network)
        counts = self.split.counts()
        same = (record["data"], record["images"]) == (counts, self.digests.whole)
        if self.has_weights and not same:  # else it begins anew
            other = " of other names or content" if record["data"] == counts else ""
            raise ProgramError(
                f"{self.path} was begun with {record['data']} images, here are "
                f"{counts}{other}: undo the change, or name its data set with "
                "--data-dir"
            )
        epochs = record["config"].get("epochs")
        if record["trained"] and epochs != self.config.epochs:
            raise ProgramError(
                f"{self.path} has been trained for all its {epochs} epochs: leave "
                f"--epochs out, or train on: {train_on(self.path, record)}"
            )

    def facts(self):
        """Return what run.json says of settings, network, device and data."""
        config = dataclasses.asdict(self.config)
        defaults = {each.name: each.default for each in dataclasses.fields(self.config)}
        for settings in config, defaults:
            for name, value in settings.items():
                if isinstance(value, Path):
                    settings[name] = value.absolute()  # good in any folder
        for name in NOT_RECORDED:
            del config[name]
        if self.config.resume:  # what was asked for, not what it came to
            config["precision"] = self.record["config"].get("precision", "auto")
        packages = tf, keras, np, PIL, imageio_ffmpeg
        seen = self.seen()
        return {
            "state": "running",
            "started": self.record.get("started", now()),
            "command": shlex.join(["python", *sys.argv]),
            "config": config,
            "defaults": defaults,
            "network": self.network,
            "data": self.split.counts(),
            "images": self.digests.whole,
            "seen_holdout": sum(digest in seen for digest in self.digests.holdout),
            "versions": {each.__name__: each.__version__ for each in packages},
        }

    def seen(self):
        """Return the digests of all images that the weights were trained on."""
        training = self.digests.training if self.config.epochs else ()
        return {*self.record["seen_before"], *training}

    def begin(self, state, predictor, total_steps):
        """Take up `state`; where the run is resumed, as it was left."""
        self.state, self.predictor = state, predictor
        if self.device.chief:
            remove_old_checkpoints(self.path)
            self.make_room()
        if self.record["trained"]:
            load_weights(state.model, self.path)
            state.step.assign(total_steps)
            state.epoch.assign(self.config.epochs)
        elif self.has_weights:
            self.checkpoint_number = restore(state, self.path)
        step = int(state.step.numpy())
        if step > total_steps:
            raise ProgramError(
                f"{self.path} is at step {step} of --epochs' {total_steps}: raise "
                "--epochs"
            )
        if self.device.workers > 1:
            self.device.agree(self.shared_facts(step))
        if self.config.resume:
            print(f"resumed at step {step} of {total_steps}")
        if self.device.chief:
            if self.config.resume:
                self.note_resuming(step)
            if flattering := flattery(self.record):
                print(f"hold-out: {flattering}")
            print(f"the run is in {self.path}; watch index.html there")

    def make_room(self):
        """Raise ProgramError where the disk is too small for the run."""
        to_come = 3 - len(find_checkpoints(self.path))  # two stay, while one is written
        checkpoints = 12 * to_come if self.to_train else 0
        parameters = self.state.model.count_params()
        size = (8 + checkpoints) * parameters + 10**6 * len(self.split.test)
        need_space(self.path, size, "a run")

    def shared_facts(self, step):
        """Return what must be the same on all workers."""
        config = self.record["config"]
        shared = {k: v for k, v in config.items() if not isinstance(v, Path)}
        shared |= {"vgg": config["vgg"] == "random", "checkpoint_minutes": None}
        shared |= self.device.facts() | {"name": None} | self.split.counts()
        shared |= {"images": self.digests.whole}
        variables = self.state.model.trainable_variables
        weights = sum(zlib.crc32(w.numpy()) for w in variables)
        return shared | {"weights": weights, "step": step}

    def note_resuming(self, step):
        """Put into the record at which step the run goes on, and what is over."""
        epoch = int(self.state.epoch)
        self.may_write, self.saved_progress = True, (step, epoch)
        self.record["resumed"].append(step)
        self.record["history"] = self.record["history"][:epoch]
        for frame in find_frames(self.path):
            if int(frame.stem) > epoch:
                frame.unlink()
        self.write()

    @contextlib.contextmanager
    def training(self):
        """Yield the Stop of training; then keep what it came to, or end the program."""
        fitting = naming_the_batch_that_fits(
            self.state.model,
            self.predictor.image_shape,
            self.config.batch_size,
            self.device.replicas,
        )
        with noting_signals(self.device.workers) as self.stop, fitting:
            yield self.stop
            if self.device.chief and int(self.state.epoch) < self.config.epochs:
                self.save()
            elif self.device.chief:  # no checkpoint: the weights will do
                with decoration("progress.gif"):
                    write_progress(self.path)
                self.wait_for_writer()
                self.write_weights()
                self.record["trained"] = True
                self.write()
        if self.stop.signum is not None:
            raise Stopped(self.stop.signum)

    def end_epoch(self, score, epoch_record):
        """Add the hold-out's scores to the record of an epoch, and keep the epoch."""
        epoch_record |= score()
        epoch_record["learning_rate"] = float(self.state.optimizer.learning_rate)
        if self.device.chief:
            self.keep(epoch_record)
        stops = self.stop.signum is not None
        if self.device.workers > 1 and self.device.mean(stops):  # all stop, or none
            self.stop.signum = self.stop.signum or signal.SIGTERM
            self.stop.set()

    def keep(self, epoch_record):
        """Record an epoch, then print it; write a checkpoint where one is due."""
        self.wait_for_writer()
        epoch = epoch_record["epoch"]
        epochs = self.config.epochs
        self.record["history"].append(epoch_record)
        with decoration("a frame of progress.gif"):
            self.keep_frame(epoch)
        self.writing = self.writer.submit(write_run, self.path, self.as_text())
        print(epoch_line(epoch_record, epochs))
        due = time.monotonic() - self.saved_time >= 60 * self.config.checkpoint_minutes
        if due and epoch < epochs:
            self.save()

    def save(self):
        """Write weights and a checkpoint, unless it is there."""
        self.wait_for_writer()  # a checkpoint may know no epoch that run.json does not
        progress = int(self.state.step.numpy()), int(self.state.epoch)
        if progress == self.saved_progress:
            return
        self.write_weights()
        with decoration("progress.gif"):
            write_progress(self.path)
        self.checkpoint_number += 1
        write_checkpoint(self.state, self.path, self.checkpoint_number)
        self.saved_time, self.saved_progress = time.monotonic(), progress
        self.write()

    def keep_frame(self, epoch):
        """Keep what the network makes of the first image, if the epoch is followed."""
        if not is_followed(epoch, self.config.epochs):
            return
        frame = followed_frame(self.followed, self.predictor, epoch)
        folder = self.path / CHECKPOINTS / FRAMES
        folder.mkdir(exist_ok=True)
        save_image(frame, folder / f"{epoch:09}.png")

    @functools.cached_property
    def followed(self):
        """The image that progress.gif follows, at the network's size."""
        images = [sample.image for sample in self.split.holdout] + self.split.test
        images += [sample.image for sample in self.split.training]
        return resize_image(read_image(images[0]), self.predictor.image_shape).numpy()

    def write_weights(self):
        """Write the weights as they are now, with what they are of."""
        facts = {
            "run": named(self.path).name,
            "step": int(self.state.step.numpy()),
            "network": self.network,
            "config": self.record["config"],
            "versions": self.record["versions"],
        }
        write_weights(self.state.model, self.path / WEIGHTS, facts, self.seen())

    def score(self):
        """Score the hold-out, and record and print its scores."""
        if self.split.holdout:
            self.record |= score_holdout(self.path, self.predictor, self.split.holdout)
            print_scores(self.record["scores"])
            self.write()

    def finish(self):
        """Record that the run is finished; say what came of it."""
        self.record["state"] = "finished"
        self.write()
        if self.record["scores"]:
            measures = self.record["scores"]["image"]["urban"]
            line = f"hold-out: MaxF {measures['MaxF']:.2f}, IoU {measures['IoU']:.2f}"
            print("; ".join(filter(None, [line, flattery(self.record)])))
        if self.config.submission:
            print(f"for the benchmark's server: {self.path / 'submission.zip'}")
        images = count_of(len(self.split.test), "segmented test image")
        print(f"{images} and the weights are in {self.path}")
        print(f"look at {self.path / 'index.html'}")
        print(f"your own: {command('--weights', self.path)} --predict PATH ...")
        print(f"train on: {train_on(self.path, self.record)}")

    def fail(self, error):
        """Record how the run ended; remove its folder where nothing came of it."""
        with contextlib.suppress(Exception):
            self.wait_for_writer()
        weights = (self.path / WEIGHTS).exists()
        there = self.has_weights
        if not (self.config.resume or weights or there or self.record["history"]):
            shutil.rmtree(self.path, ignore_errors=True)
            write_overview(self.path.parent)
            return
        stopped = isinstance(error, KeyboardInterrupt)
        if self.may_write:
            self.record["state"] = "stopped" if stopped else "failed"
            with contextlib.suppress(OSError):
                self.write()
        elif not stopped:  # the resumed run is as it was, and the error says what to do
            return
        how = "go on with this run" if there else "begin this run again"
        print(f"to {how}: {command('--resume', self.path)}")
        if weights and not stopped:
            print(f"with other settings: {train_on(self.path, self.record)}")

    def write(self):
        """Write run.json and the pages."""
        write_run(self.path, self.as_text())

    def as_text(self):
        """Return the record as it is now, as JSON."""
        self.record["updated"] = now()
        self.record["device"] = self.device.facts()  # XLA may have failed
        self.record["seconds"] = time.monotonic() - self.start
        self.record["peak_memory"] = max(self.record["peak_memory"], peak_memory())
        return json.dumps(self.record, indent=1, allow_nan=False, default=str)

    def wait_for_writer(self):
        """Wait until the record of the epoch before is on the disk."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()


def now():
    """Return the time as run.json has it: "2026-11-22 14:15:00"."""
    return datetime.datetime.now().isoformat(" ", "seconds")


def write_run(run_dir, text):
    """Write the record `text` as run.json, and the pages on it and on all runs."""
    run_dir = named(run_dir)
    with written(run_dir / "run.json", flush=True) as part:
        part.write_text(text)
    with decoration("index.html"), written(run_dir / "index.html") as part:
        part.write_text(report(run_dir, json.loads(text)), "utf-8")
    write_overview(run_dir.parent)


def write_overview(runs_dir):
    """Write the page on all runs."""
    path = runs_dir / "index.html"
    with decoration(path):
        found = path.read_bytes() if path.exists() else b""
        # a power cut may leave nothing of it, or zeros; all else is the user's own
        if found.strip(b"\0") and b"<title>Runs</title>" not in found:
            return
        with written(path, alone=False) as part:
            part.write_text(overview(runs_dir), "utf-8")


def epoch_line(record, epochs):
    """Return the line of an epoch; the rest of its record is in run.json."""
    line = f"epoch {record['epoch']}/{epochs}  loss {record['loss']:.4f}"
    if "MaxF" in record:
        line += f"  hold-out {record['holdout_loss']:.4f}  MaxF {record['MaxF']:.2f}"
        line += f"  IoU {record['IoU']:.2f}"
    return line + f"  {record['seconds']:.0f} s"


def check_finite(model):
    """Raise ValueError unless all weights are finite."""
    for weights in model.weights:
        if not np.isfinite(weights.numpy()).all():
            raise ValueError(f"{weights.path} is not finite")


def write_weights(model, path, facts, seen):
    """Write the weights of `model`, all or nothing.

    With them go `facts`, what they are of, and the digests of the images `seen`.
    """
    size = 4 * model.count_params() + 10**6
    need_space(path.parent, size, "saving the weights")  # HDF5 may crash on a full disk
    print(f"writing {path.name}: {size / 1e6:,.0f} MB")
    with written(path, flush=True) as part:
        try:
            need_quota(part, size)  # likewise
            model.save_weights(part)
            with h5py.File(part, "r+") as file:
                file.attrs[FACTS] = json.dumps(facts, default=str)
                file[SEEN] = np.array(sorted(seen), "S16")
        except OSError as error:  # h5py's has two lines
            reason = " ".join(str(error.strerror or error).split())
            raise ProgramError(
                f"{path}: {reason}: make room, or see who may write"
            ) from error


def find_weights(path):
    """Return the weight file that --weights names: a file, or a run's folder."""
    found = path / WEIGHTS if path.is_dir() else path
    if not found.is_file():
        raise ProgramError(
            f"{found}: no such file: name a run's folder or its {WEIGHTS}"
        )
    if not found.name.endswith(".weights.h5"):
        raise ProgramError(
            f"{found}: not a .weights.h5 file: name a run's folder or its {WEIGHTS}; "
            "VGG-16 goes with --vgg"
        )
    return found


@contextlib.contextmanager
def open_weights(path):
    """Yield the weight file that --weights names; raise ProgramError for a wrong one."""
    path = find_weights(path)
    advice = f"name the {WEIGHTS} of a run of this version, or train one"
    with blaming(path, "weights of this FCN-8s", advice), h5py.File(path) as file:
        yield file


def read_weights_settings(path, network):
    """Return what the weights at `path` were trained with, as settings.

    That is the input size and the hold-out fraction. Raises ProgramError for a file
    that does not say them, or of another network.
    """
    with open_weights(path) as file:
        if FACTS not in file.attrs:
            raise ValueError("it does not say its input size and network")
        facts = json.loads(file.attrs[FACTS])
        check_network(facts, network)
        config = facts["config"]
        shape = config["image_height"], config["image_width"]
        if not all(type(side) is int and side > 0 and side % 32 == 0 for side in shape):
            raise ValueError(f"its input size is {shape}")
        fraction = config["holdout_fraction"]
        if type(fraction) not in (int, float) or not 0 <= fraction < 1:
            raise ValueError(f"its hold-out fraction is {fraction}")
        settings = {"image_height": shape[0], "image_width": shape[1]}
        return settings | {"holdout_fraction": fraction}


def read_seen(path):
    """Return the digests of the images that the weights at `path` were trained on."""
    with open_weights(path) as file:
        if SEEN not in file:
            raise ValueError("it does not say which images it was trained on")
        return file[SEEN].asstr()[()].tolist()


def load_weights(model, path):
    """Load a run's weights; raise ProgramError if they are not of this network."""
    path = find_weights(path)
    print(f"reading {path}")
    with blaming(path, "weights of this FCN-8s", f"name a run's {WEIGHTS}"):
        model.load_weights(path)
        check_finite(model)


def find_checkpoints(run_dir):
    """Return the paths of a run's checkpoints, without suffix, the newest last.

    There is no list of them that could be damaged: the files count.
    """
    found = (run_dir / CHECKPOINTS).glob("ckpt-*.index")
    paths = [path.with_suffix("") for path in found]
    numbered = [path for path in paths if re.fullmatch(r"ckpt-\d+", path.name)]
    return sorted(numbered, key=checkpoint_number)


def checkpoint_number(path):
    """Return the number of a checkpoint: "ckpt-12" -> 12."""
    return int(path.name.rpartition("-")[2])


def find_frames(run_dir):
    """Return the frames of progress.gif, in the order of their epochs."""
    found = (run_dir / CHECKPOINTS / FRAMES).glob("*.png")
    return sorted(path for path in found if re.fullmatch(r"\d{9}", path.stem))


def remove_old_checkpoints(run_dir):
    """Remove all but the newest two, with what a kill left half written."""
    kept = [path.name for path in find_checkpoints(run_dir)[-2:]]
    for path in (run_dir / CHECKPOINTS).glob("ckpt-*"):
        name = re.match(r"ckpt-\d+(?=[._])", path.name)
        if name and (name[0] not in kept or path.name.endswith("_temp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def restore(state, run_dir):
    """Restore `state` from the newest checkpoint that is whole; return its number."""
    found = find_checkpoints(run_dir)
    for path in reversed(found):
        print(f"reading {CHECKPOINTS}/{path.name}")
        try:
            with blaming(path, "a whole checkpoint", "the one before it counts"):
                state.read(str(path)).assert_consumed()
            return checkpoint_number(path)
        except ProgramError as error:
            print(error)
    raise ProgramError(
        f"{run_dir / CHECKPOINTS}: no checkpoint can be restored: begin a new run"
        + f", from its weights with --weights {run_dir}" * (run_dir / WEIGHTS).exists()
    )


def write_checkpoint(state, run_dir, number):
    """Write `state`, from which a run goes on to the same bits; keep the newest two."""
    folder = run_dir / CHECKPOINTS
    path = folder / f"ckpt-{number}"
    size = 12 * state.model.count_params() + 10**6  # with Adam's two moments
    need_space(folder, size, "a checkpoint")
    print(f"writing {CHECKPOINTS}/{path.name}: {size / 1e6:,.0f} MB")
    try:
        state.write(str(path))
    except tf.errors.OpError as error:
        path.with_suffix(".index").unlink(missing_ok=True)  # it may be half written
        raise ProgramError(
            f"{path}: {error.message}: the checkpoint before it is kept; make room, "
            "or see who may write, then resume"
        ) from error
    for file in folder.glob(f"{path.name}.*"):
        flush_file(file)
    remove_old_checkpoints(run_dir)


# ------------------------------------------------------------------------ report

MEASURES = {  # as scores() has them
    "images": "number of hold-out images",
    "MaxF": "largest F1, the harmonic mean of PRE and REC, over all thresholds",
    "AP": "average precision: mean of the precision at recall 0, 10 ... 100 %",
    "PRE": "precision: share of the found road that is road",
    "REC": "recall: share of the road that is found",
    "FPR": "false positive rate: share of the rest that is taken for road",
    "FNR": "false negative rate: share of the road that is missed",
    "threshold": "road probability from which MaxF, PRE, REC, FPR, FNR, IoU take road",
    "IoU": "intersection over union of the found and the true road",
    "IoU50": "the same where road begins at a probability of 50 %",
    "accuracy": "share of the pixels that are right, likewise at 50 %",
}
PLANE_NOTES = {
    "image": "All pixels of the photograph that are not void; urban is all categories.",
    "bev": "The road from above, 20 m wide and 6 to 46 m ahead, in cells of 5 cm: the "
    "view of the benchmark's table, where far road counts as much as near road.",
}
RELOAD = 30  # seconds, while a run is running
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">{head}<style>
:root {{ color-scheme: light dark; --dim: color-mix(in srgb, CanvasText 66%, Canvas);
  --faint: color-mix(in srgb, CanvasText 14%, Canvas);
  --c0: #0067b8; --c1: #c8500a; --c2: #1b7a3d; --c3: #a12a8a }}
@media (prefers-color-scheme: dark) {{ :root {{ --c0: #5db2ff; --c1: #ff9a57;
  --c2: #5fd08a; --c3: #f08bdc }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto;
  padding: 1rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.6rem; margin: .5rem 0 }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .5rem }}
p {{ margin: .4rem 0; max-width: 48rem }} small, .dim {{ color: var(--dim) }}
small {{ font-size: .85rem; line-height: 1.35 }} dl, dd, figure {{ margin: 0 }}
.state {{ font-size: 1rem; font-weight: 600; color: #fff; padding: .1rem .7rem;
  border-radius: 1rem; white-space: nowrap; vertical-align: middle }}
.running {{ background: #0067b8 }} .stopped {{ background: #8a5a00 }}
.failed {{ background: #b3261e }} .finished {{ background: #1b7a3d }}
.cards, .facts, .pictures, .charts {{ display: grid; gap: 1rem }}
.cards {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr));
  margin: 1rem 0 }}
.cards div {{ border: 1px solid var(--faint); border-radius: .5rem;
  padding: .6rem .9rem }}
.cards dd {{ font-size: 1.6rem; font-weight: 600; line-height: 1.3 }}
.cards small {{ display: block; font-weight: 400 }}
.facts {{ gap: .15rem 2rem; grid-template-columns:
  repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }}
.facts div {{ display: flex; gap: .7rem }} .facts dt {{ white-space: nowrap }}
.facts dt, .cards dt {{ color: var(--dim) }} .facts .all {{ grid-column: 1 / -1 }}
code {{ font-size: .9rem; background: var(--faint); padding: .1rem .4rem;
  border-radius: .3rem; white-space: pre-wrap }}
.charts {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }}
.charts figure {{ max-width: 40rem }}
.charts figure > svg {{ width: 100%; height: auto }}
.pictures {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }}
.errors figure {{ margin: 1rem 0 1.5rem }} .pair {{ display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }}
img {{ width: 100%; height: auto; display: block; border-radius: .3rem;
  background: var(--faint) }}
figcaption {{ font-size: .9rem }}
.key {{ display: inline-block; margin-right: 1rem }} .key i {{ display: inline-block;
  width: 1rem; height: .8rem; margin-right: .35rem; border: 1px solid var(--dim) }}
table {{ border-collapse: collapse; font-size: .95rem }}
th, td {{ text-align: right; padding: .2rem .5rem; vertical-align: top;
  border-bottom: 1px solid var(--faint); font-variant-numeric: tabular-nums }}
th {{ font-weight: 600 }} th:first-child, .left {{ text-align: left }}
.damaged td {{ color: var(--dim); background: #8883 }}
.wide {{ overflow-x: auto; overflow-wrap: normal }}
.hint {{ display: none }}
.runs th, .runs td {{ white-space: nowrap; text-align: left }}
.runs td:last-child {{ white-space: normal; min-width: 11rem }}
@media (max-width: 70rem) {{ .hint {{ display: block }} }}
svg text {{ font-size: 13px; fill: currentColor }} .end {{ text-anchor: end }}
.middle {{ text-anchor: middle }} .grid {{ stroke: var(--faint) }}
polyline {{ fill: none; stroke-width: 2; stroke-linejoin: round }}
circle {{ stroke: Canvas; stroke-width: 1.5 }}
.c0 {{ --c: var(--c0) }} .c1 {{ --c: var(--c1) }} .c2 {{ --c: var(--c2) }}
.c3 {{ --c: var(--c3) }} .c4 {{ --c: CanvasText }} polyline {{ stroke: var(--c) }}
circle {{ fill: var(--c) }} .key.c i {{ background: var(--c); height: .25rem; border: 0;
  vertical-align: .25rem }}
</style></head><body>
{body}
</body></html>
"""


def page(title, body, head=""):
    """Return an HTML page; bytes of a name that are no UTF-8 become question marks."""
    text = PAGE.format(title=html.escape(title), head=head, body="\n".join(body))
    return text.encode("utf-8", "replace").decode("utf-8")


def shown(value):
    """Return a value of run.json as text for HTML."""
    words = {None: "none", True: "yes", False: "no"}
    known = value is None or isinstance(value, bool)
    return html.escape(words[value] if known else str(value))


def fact(name, value, kind=""):
    """Return a line of a list of facts, in HTML."""
    kind = f' class="{kind}"' if kind else ""
    return f"<div{kind}><dt>{name}</dt><dd>{value}</dd></div>"


def link(path, folder):
    """Return the address of `path` on a page in `folder`."""
    name = os.fsencode(path.relative_to(folder).as_posix())
    return urllib.parse.quote(name)


def clock(seconds):
    """Return seconds as "2:03:04" or "1 day, 2:03:04"."""
    return str(datetime.timedelta(seconds=round(seconds)))


def latest_measures(record):
    """Return MaxF and IoU in percent, and how they were measured; or {} and why not."""
    if measures := record["scores"].get("image", {}).get("urban"):
        source = "hold-out at its own size"
    elif record["history"] and "MaxF" in record["history"][-1]:
        source = "hold-out at the network's size, not yet scored at its own"
        measures = record["history"][-1]
    else:
        return {}, "no hold-out image is scored"
    return measures, "; ".join(filter(None, [source, flattery(record)]))


def differing(record):
    """Return the names of the settings that are not the defaults."""
    defaults = record["defaults"]
    return [
        name
        for name, value in record["config"].items()
        if str(value) != str(defaults[name])  # paths are text
    ]


class Axis(NamedTuple):
    """Where values stand on one side of a chart."""

    ticks: list
    low: float
    high: float
    log: bool = False

    def place(self, values, start, end):
        """Return the coordinates of `values` between those of the axis' ends."""
        values, ends = np.array(values, float), (self.low, self.high)
        if self.log:
            values, ends = np.log10(np.maximum(values, self.low)), np.log10(ends)
        return start + (end - start) * (values - ends[0]) / (ends[1] - ends[0])

    def labels(self):
        """Return the ticks as text, with digits enough to tell them apart."""
        if self.log:
            return [f"{tick:g}" for tick in self.ticks]
        step = min(np.diff(self.ticks), default=1)
        digits = max(-math.floor(math.log10(step) + 1e-6), 0)
        return [f"{tick:.{digits}f}" for tick in self.ticks]


ROUND = [digit * 10.0**power for power in range(-12, 60) for digit in (1, 2, 5)]


def value_axis(values, log=False):
    """Return the Axis of two to eight round ticks that encloses `values`."""
    low, high = min(values), max(values)
    if log:
        low = max(low, 1e-9)
        first = np.searchsorted(ROUND, low, "right") - 1
        last = max(np.searchsorted(ROUND, high), first + 1)
        every = 1
        if last - first > 7:  # whole decades
            first, every = first - first % 3, 3 * -(-(last - first) // 18)
        ticks = ROUND[first : last + every : every]
    else:
        span = high - low or abs(high) or 1
        step = next(step for step in ROUND if step >= 0.999 * span / 5)
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
        ticks = [step * k for k in range(first, max(last, first + 1) + 1)]
    return Axis(ticks, ticks[0], ticks[-1], log)


def plot(title, lines, label, across, up, marks):
    """Return a figure of {name: [(x, y), ...]} on two axes; `label` is for x.

    `marks` are dots (x, y, name, words to hover). What leaves the axes is cut off.
    """
    left, top, right, bottom = 62, 26, 464, 220
    text = '<text x="{:.0f}" y="{:.0f}" class="{}">{}</text>'.format
    colours = {name: f"c{index % 5}" for index, name in enumerate(lines)}
    parts = []
    for y, tick in zip(up.place(up.ticks, bottom, top), up.labels()):
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(text(left - 7, y + 4, "end", tick))
    for x, tick in zip(across.place(across.ticks, left, right), across.labels()):
        parts.append(text(x, bottom + 18, "middle", tick))
    parts.append(text(right, bottom + 38, "end", label))
    width, height = right - left, bottom - top
    inside = f'x="{left}" y="{top}" width="{width}" height="{height}"'
    parts.append(f'<svg {inside} viewBox="{left} {top} {width} {height}">')
    for name, line in lines.items():
        x, y = np.reshape(line, (-1, 2)).T
        x, y = across.place(x, left, right), up.place(y, bottom, top)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        parts.append(f'<polyline class="{colours[name]}" points="{points}"/>')
    parts.append("</svg>")
    for x, y, name, words in marks:
        x, y = across.place(x, left, right), up.place(y, bottom, top)
        dot = f'<circle class="{colours[name]}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
        parts.append(f"{dot}<title>{html.escape(words)}</title></circle>")
    keys = [
        f'<span class="key c {colours[name]}"><i></i>{html.escape(name)}</span>'
        for name in lines
    ]
    return (
        f"<figure><figcaption><b>{title}</b> {''.join(keys)}</figcaption>"
        f'<svg viewBox="0 0 480 264" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg></figure>"
    )


def chart(title, lines, log):
    """Return a figure of {name: [(epoch, value), ...]}, few points with dots."""
    last = max(epoch for line in lines.values() for epoch, _ in line)
    step = next(int(step) for step in ROUND if step >= max(last / 8, 1))
    ticks = sorted({1, *range(step, last + 1, step)})
    across = Axis(ticks, 0.5, last + 0.5)
    up = value_axis([value for line in lines.values() for _, value in line], log)
    marks = [
        (epoch, value, name, f"epoch {epoch}, {name}: {value:.4g}")
        for name, line in lines.items()
        for epoch, value in line
        if len(line) <= 25
    ]
    return plot(title, lines, "epoch", across, up, marks)


def recall_chart(curves, kinds):
    """Return the figure of precision over recall, near the marks of MaxF.

    `curves` {category: [[recall, precision], ...]} in percent, `kinds` {category:
    measures}; where nothing is found there is no precision, hence no point.
    """
    lines, marks = {}, []
    for kind, measures in kinds.items():
        name = f"{kind}, dot at {measures['threshold']:.1f} %"
        lines[name] = [point for point in curves[kind] if point[0] > 0]
        marks.append((measures["REC"], measures["PRE"], name, name))
    worst = min(min(recall, precision) for recall, precision, *_ in marks)
    low = max(100 - 3 * max(100 - worst, 1), 0)  # the marks in the middle
    axis = value_axis((low, 100))
    title = "Precision (up) and recall, percent"
    return plot(title, lines, "recall, percent", axis, axis, marks)


def cards(record):
    """Return the largest figures of a run: [(name, value, explanation), ...]."""
    measures, source = latest_measures(record)
    done, epochs = len(record["history"]), record["config"]["epochs"]
    maxf = f"{measures['MaxF']:.2f} %" if measures else "–"
    iou = f"{measures['IoU']:.2f} %" if measures else "–"
    memory = f"{record['peak_memory'] / 1e9:.2f} GB"
    return [
        ("MaxF", maxf, f"{MEASURES['MaxF']}; {source}"),
        ("IoU", iou, f"{MEASURES['IoU']}, at MaxF's threshold"),
        ("Epochs", f"{done} of {epochs}", "passes over the training images"),
        ("Duration", clock(record["seconds"]), "hours, all sessions"),
        ("Peak memory", memory, "of the GPU, else of the program"),
    ]


def headline(run_dir, record):
    """Return what one wants to know first, as a list of HTML."""
    state, device = record["state"], record["device"]
    several = [n for n in ("replicas", "workers") if device[n] != 1]
    counts = [f"{count} {name}" for name, count in record["data"].items()]
    facts = {
        "Started": record["started"],
        "Updated": record["updated"],
        "Device": ", ".join([device["name"], *(f"{device[n]} {n}" for n in several)]),
        "Images": ", ".join(counts).replace("holdout", "hold-out"),
        "Resumed at step": ", ".join(map(str, record["resumed"])),
        "Command": record["command"],
    }
    name = shown(run_dir.name)
    body = [f'<h1>{name} <span class="state {state}">{state}</span></h1>']
    body.append("<p>FCN-8s on VGG-16 for road segmentation.")
    if (run_dir.parent / "index.html").exists():
        body.append('<a href="../index.html">All runs</a>')
    again = html.escape(command("--resume", run_dir))
    if state == "running":
        killed = f"after a kill or a power cut go on with <code>{again}</code>"
        body.append(f"<small>Reloads itself every {RELOAD} s; {killed}</small>")
    body.append("</p>")
    if state in ("stopped", "failed"):
        body.append(f"<p>To go on with it: <code>{again}</code></p>")
    body.append('<dl class="cards">')
    for name, value, why in cards(record):
        body.append(fact(name, f"{shown(value)}<small>{html.escape(why)}</small>"))
    body.append('</dl><dl class="facts">')
    for name, value in facts.items():
        if value:
            kind = "all" if name == "Command" else ""  # as wide as the page
            body.append(fact(name, shown(value), kind))
    return [*body, "</dl>"]


def score_section(record):
    """Return the hold-out's measures, explained, and its precision-recall curve."""
    planes = {plane: kinds for plane, kinds in record["scores"].items() if kinds}
    body = []
    for plane, kinds in planes.items():
        body.append(f"<h2>Hold-out scores, {PLANES[plane]}</h2>")
        body.append(f"<p>{PLANE_NOTES[plane]} In percent.</p>")
        heads = "".join(f"<th>{shown(kind)}</th>" for kind in kinds)
        body.append('<div class="wide"><table class="scores">')
        body.append(f"<tr><th></th>{heads}</tr>")
        for name in next(iter(kinds.values())):
            digits = 0 if name == "images" else 2
            values = [measures[name] for measures in kinds.values()]
            cells = "".join(f"<td>{value:.{digits}f}</td>" for value in values)
            if plane == "image":  # explained once
                cells += f'<td class="left dim">{MEASURES.get(name, "")}</td>'
            body.append(f"<tr><th>{shown(name)}</th>{cells}</tr>")
        body.append("</table></div>")
    curves, kinds = record["curves"], planes.get("image", {})
    if curves.keys() & kinds.keys():
        body.append(
            "<h2>Precision and recall, image plane</h2><p>Each point is a threshold: a "
            "lower one finds more road, and more that is none. The dot is MaxF's.</p>"
        )
        body.append(f'<div class="charts">{recall_chart(curves, kinds)}</div>')
    return body


CHARTS = (  # title, {line: what it shows of an epoch's record}, whether up is log
    ("Loss, nats a pixel, log", {"training": "loss", "hold-out": "holdout_loss"}, True),
    ("Hold-out, percent", {"MaxF": "MaxF", "IoU": "IoU"}, False),
    ("Learning rate after each epoch", {"decoder": "learning_rate"}, False),
    ("Gradient norm, log", {"before clipping": "gradient_norm"}, True),
)


def training_section(record):
    """Return the curves over the epochs."""
    charts = []
    for title, fields, log in CHARTS:
        lines = {}
        for name, field in fields.items():
            known = [epoch for epoch in record["history"] if field in epoch]
            if known:
                lines[name] = [(epoch["epoch"], epoch[field]) for epoch in known]
        if lines:
            charts.append(chart(title, lines, log))
    head = '<h2>Training</h2><p class="dim">The hold-out is measured at the network\'s'
    head += " size here, without the mirror image.</p>"
    return [head, '<div class="charts">', *charts, "</div>"]


def picture(path, run_dir, target=None):
    """Return the HTML of an image, loaded once it is looked at; "" if there is none."""
    with contextlib.suppress(OSError), Image.open(path) as image:
        width, height = image.size
        size = f'width="{width}" height="{height}" loading="lazy"'
        source, alt = link(path, run_dir), html.escape(path.stem)
        return (
            f'<a href="{link(target or path, run_dir)}">'
            f'<img src="{source}" alt="{alt}" {size}></a>'
        )
    return ""


def error_section(run_dir, record):
    """Return the hold-out's images, the worst first, each beside its errors."""
    body = ["<h2>Hold-out, from worst to best</h2><p>"]
    stripes = "repeating-linear-gradient(135deg, #333 0 3px, #999 3px 6px)"
    for words, background in (
        ("missed road", f"rgb{MISSED}"),
        ("false road", f"rgb{FALSE}"),
        ("outline of the true road", f"rgb{TRUTH}"),
        ("void: not scored", stripes),
        ("road that was found (left picture)", f"rgb{ROAD}"),
    ):
        swatch = f'<i style="background: {background}"></i>'
        body.append(f'<span class="key">{swatch}{words}</span>')
    body.append("</p><p>Road is found where its probability is at least 50 %.")
    body.append(f"IoU: {MEASURES['IoU']}.</p>")
    body.append('<div class="errors">')
    holdout = record["holdout"].items()
    for name, errors in sorted(holdout, key=lambda item: item[1]["IoU50"]):
        paths = [run_dir / "errors" / f"{name}{end}.jpg" for end in ("", "_errors")]
        words = (
            f"{name}: category {errors['category']}, IoU {errors['IoU50']:.2f} %; "
            f"{errors['missed']:.2f} % of the road missed, {errors['false']:.2f} % of "
            "the rest taken for road"
        )
        body.append('<figure><div class="pair">')
        body += [picture(path, run_dir) for path in paths]
        body.append(f"</div><figcaption>{html.escape(words)}</figcaption></figure>")
    return [*body, "</div>"]


def sample_section(run_dir, paths):
    """Return the test images' overlays, small, each a link to its PNG."""
    body = [f"<h2>Test images</h2><p>{len(paths)}, each a link to its full size.</p>"]
    body.append('<div class="pictures">')
    for path in paths:
        small = run_dir / "thumbnails" / f"{path.stem}.jpg"
        image = picture(small, run_dir, path) or picture(path, run_dir)
        caption = f"<figcaption>{html.escape(path.stem)}</figcaption>"
        body.append(f"<figure>{image}{caption}</figure>")
    return [*body, "</div>"]


def settings_section(record):
    """Return the settings, those that are not the defaults first, and the versions."""
    body, changed = ["<h2>Settings</h2>"], differing(record)
    config, defaults = record["config"], record["defaults"]
    body.append("<p>What differs from the defaults comes first.</p>")
    body.append('<dl class="facts">')
    for name in sorted(config, key=lambda name: name not in changed):
        value = shown(config[name])
        if name in ("precision", "xla") and record["device"][name] != config[name]:
            value += f", here {shown(record['device'][name])}"
        if name in changed:
            value = f"<b>{value}</b> <small>default {shown(defaults[name])}</small>"
        kind = "" if name in changed else "dim"
        body.append(fact(shown(name), value, kind))
    body.append('</dl><h2>Versions</h2><dl class="facts">')
    for name, value in record["versions"].items():
        body.append(fact(shown(name), shown(value), "dim"))
    return [*body, "</dl>"]


def report(run_dir, record):
    """Return the page on a run: one HTML file, with what there is so far."""
    body = headline(run_dir, record)
    body += score_section(record)
    if record["history"]:
        body += training_section(record)
    if progress := picture(run_dir / "progress.gif", run_dir):
        body.append("<h2>One image through the epochs</h2>")
        body.append(f'<div style="max-width: 36rem">{progress}</div>')
    if record["holdout"]:
        body += error_section(run_dir, record)
    if overlays := sorted(run_dir.glob("[!.]*.png")):
        body += sample_section(run_dir, overlays)
    body += settings_section(record)
    running = record["state"] == "running"
    head = f'<meta http-equiv="refresh" content="{RELOAD}">' if running else ""
    return page(f"Run {run_dir.name}: {record['state']}", body, head)


COLUMNS = (  # of the overview
    *("Run", "State", "Started", "MaxF", "IoU", "Epochs", "Batch", "Input", "Start"),
    *("Duration", "Other settings"),
)
NO_REMARK = {"epochs", "batch_size", "image_height", "image_width", "vgg", "weights"}
NO_REMARK |= {"data_dir", "runs_dir", "name"}  # where, not how


def overview_row(path):
    """Return when a run started and its cells; raises whatever a damage leads to."""
    at_work = is_locked(path / CHECKPOINTS / "run")  # first: the lock goes last
    record = read_run(path)
    config, state = record["config"], record["state"]
    if state == "running" and not at_work:
        state = "stopped"  # by a kill or a power cut, which its record cannot know
    measures, _ = latest_measures(record)
    unsure = "" if "AP" in measures else "~"
    done = len(record["history"])
    start = config.get("weights") or config["vgg"]
    changed = [name for name in differing(record) if name not in NO_REMARK]
    changed = [f"{shown(name)} {shown(config[name])}" for name in changed]
    if measures and flattery(record):
        changed.append("scores flatter")
    cells = [
        f'<a href="{link(path / "index.html", path.parent)}">{shown(path.name)}</a>',
        f'<span class="state {state}">{state}</span>',
        shown(record["started"][:16]),
        f"{unsure}{measures['MaxF']:.2f}" if measures else "",
        f"{unsure}{measures['IoU']:.2f}" if measures else "",
        shown(done if done == config["epochs"] else f"{done} of {config['epochs']}"),
        shown(config["batch_size"]),
        shown(f"{config['image_height']}x{config['image_width']}"),
        shown("VGG-16" if start == "downloaded" else start),
        clock(record["seconds"]),
        ", ".join(changed),
    ]
    return record["started"], cells


def overview(runs_dir):
    """Return the page on all runs of a folder, the newest first, to compare them."""
    rows = []
    for path in runs_dir.glob("[!.]*"):
        if not os.path.lexists(path / "run.json"):
            continue  # of --predict, or no run at all
        try:
            with blaming(path / "run.json", "the record of a run", "remove it"):
                started, cells = overview_row(path)
        except ProgramError:
            started, cells = "", [shown(path.name), "damaged"]
            cells += [""] * (len(COLUMNS) - len(cells))
        # a folder is named for its second, unless somebody renamed it
        when = re.sub(r"\D", "", started or path.name)[:14]
        rows.append((when, path.name, cells))
    rows.sort(reverse=True)
    body = [f"<h1>{count_of(len(rows), 'run')}</h1>"]
    body.append("<p>Scores of the hold-out over all categories, in percent; with ~ as")
    body.append("they were in training, at the network's size and without the mirror")
    body.append("image, until the run scores them as they are used.")
    for name in "MaxF", "IoU":
        body.append(f"<br><b>{name}</b>: {MEASURES[name]}.")
    body.append('</p><p class="hint">The table scrolls sideways.</p>')
    body.append('<div class="wide"><table class="runs"><tr>')
    body += [f"<th>{name}</th>" for name in COLUMNS]
    for _, _, cells in rows:
        body.append(f'</tr><tr class="{"damaged" if "damaged" in cells else ""}">')
        body += [f"<td>{cell}</td>" for cell in cells]
    body.append("</tr></table></div>")
    return page("Runs", body)
