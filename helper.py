"""Everything around the network: download, data, inference, scores, the run folder.

Images are RGB uint8 (H, W, 3); labels are uint8 ids (H, W): 0 background, 1 road,
255 void. Only this module writes to the disk.
"""

import collections
import contextlib
import functools
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import os
import re
import shlex
import shutil
import time
import urllib.parse
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg  # comes with imageio[ffmpeg]
import numpy as np
import requests  # comes with tensorflow
import tensorflow as tf
import urllib3  # comes with requests
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two programs off one file
    fcntl = None

VOID = 255
IMAGES = ".png", ".jpg", ".jpeg"
WEIGHTS = "best.weights.h5"  # of a run folder
CHECKPOINTS = "checkpoint"  # likewise
FRAMES = "frames"  # in there: of progress.gif
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
KITTI_COUNTS = (289, 289, 290)  # training images, road labels, test images
CONNECT_TIMEOUT = 1.5  # seconds for one address, of which a host may have eight
READ_TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 2, 4, 8, 16)  # seconds between tries that gain nothing
BAR = {"unit_scale": True, "disable": None}  # of tqdm: none where there is no terminal


class ProgramError(Exception):
    """What the user can mend: the program prints it as one line and exits with 1."""


@contextlib.contextmanager
def blaming(path, what, advice):
    """Turn whatever goes wrong inside into a ProgramError: `path` is not `what`."""
    try:
        yield
    except (MemoryError, tf.errors.ResourceExhaustedError, ProgramError):
        raise
    except (tf.errors.UnavailableError, tf.errors.AbortedError):  # another worker's end
        raise
    except Exception as error:  # decoders raise what they like
        reason = first_line(error)
        raise ProgramError(f"{path}: not {what} ({reason}): {advice}") from error


def first_line(error):
    """Return the first line of an error's message, not too long."""
    return str(error).strip().partition("\n")[0][:200]


@contextlib.contextmanager
def beside(path):
    """Yield where to build the file or folder `path`, for the caller to rename.

    What an earlier run left there goes first, what this one leaves goes at the end.
    """
    part = path.with_name(f".part.{path.name}")

    def clear():
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)

    clear()
    try:
        yield part
    finally:
        clear()


def flush(path):
    """See to it that a file is on the disk, where a power cut leaves it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def written(path):
    """Yield where to build the file or folder that replaces `path` at the end."""
    with beside(path) as part:
        yield part
        if part.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            flush(part)
        os.replace(part, path)


def save_image(pixels, path):
    """Write uint8 (H, W, 3) or (H, W) as PNG or JPEG, by the name; all or nothing."""
    content = io.BytesIO()  # Pillow would not notice a disk that is full
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(pixels).save(content, kind, compress_level=3, quality=92)
    with written(path) as part:
        part.write_bytes(content.getvalue())


def ahead(task, items):
    """Yield task(item) in order, done on all cores, a few items ahead."""
    with ThreadPoolExecutor() as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(task, item))
            if len(waiting) > os.cpu_count() + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_parallel(task, items, title, total=None):
    """Do `task` for every item on all cores, behind a bar; the first error ends it."""
    total = len(items) if total is None else total
    for _ in tqdm(ahead(task, items), title, total, unit="image", disable=None):
        pass


# ---------------------------------------------------------------------- download


@contextlib.contextmanager
def locked(path, wait=True):
    """Keep other programs off `path`; the system frees the lock with the process.

    Without `wait` raises ProgramError where another program holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise ProgramError(
                        f"{path.parent}: another program works on this run: let it end"
                    ) from None
                print(f"{path}: another program is fetching it, waiting for that one")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def need_space(folder, size, what):
    """Raise ProgramError unless `folder`'s disk has `size` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ProgramError(
            f"{folder}: {what} takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB "
            "are free: make room, or choose another folder"
        )


def _length(path):
    return path.stat().st_size if path.exists() else 0


def _receive(url, part, size):
    """Ask `url` once for what `part` still lacks, and append to it what comes."""
    have = _length(part)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
    with requests.get(url, headers=headers, timeout=timeout, stream=True) as response:
        response.raise_for_status()
        if "text/html" in response.headers.get("Content-Type", ""):
            raise ProgramError("a web page is there, not the file")
        if response.status_code != 206:  # Range ignored: from the start
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise requests.RequestException("other bytes than those asked for")
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        if size and total and total != size:
            raise ProgramError(f"{total:,} bytes long there, not {size:,}")
        need_space(part.parent, (total or size or 0) - have, part.stem)
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", **BAR)
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := response.raw.read1(1 << 20):  # what is there: a cut
                file.write(chunk)  # loses nothing
                bar.update(len(chunk))


def _fetch(url, part, size):
    """Fill `part` from `url`, in as many requests as it takes."""
    connected, failures, reached = False, 0, _length(part)
    while True:
        try:
            return _receive(url, part, size)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            response = getattr(error, "response", None)
            status = 0 if response is None else response.status_code
            if status == 416:  # all of it is here, or more than there is
                part.unlink(missing_ok=True)
            gained = _length(part) > reached  # further than ever: no endless circle
            reached = max(reached, _length(part))
            failures = 0 if gained else failures + 1
            connected = connected or not isinstance(error, requests.ConnectionError)
            hopeless = 400 <= status < 500 and status not in (408, 416, 429)
            if hopeless or failures > (len(PAUSES) if connected else 1):
                cause = error.args[0] if error.args else error
                cause = str(getattr(cause, "reason", cause))
                raise ProgramError(cause.rpartition(">: ")[2]) from error
            time.sleep(PAUSES[max(failures - 1, 0)])


def download(urls, path, size=None, md5=None):
    """Fetch `path` from the first of `urls` that delivers it, unless it is there.

    Bytes go to `path` + ".part", which a later call resumes, and become `path` once
    their number and sum are those of `size` (bytes) and `md5`, where given. Raises
    ProgramError with every URL and its reason.
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    reasons = []
    with locked(path):
        for url in () if path.exists() else urls:
            print(f"downloading {url}")
            try:
                if not size or _length(part) != size:
                    _fetch(url, part, size)
                with open(part, "rb") as file:
                    found = hashlib.file_digest(file, "md5").hexdigest() if md5 else md5
                if _length(part) == (size or _length(part)) and found == md5:
                    return os.replace(part, path)
                wrong = f"{_length(part)} bytes with md5 {found}, not {size} with {md5}"
                part.unlink()
                raise ProgramError(f"a wrong file, removed: {wrong}")
            except ProgramError as error:
                reasons.append(f"{url}: {error}")
                if not md5 and url != urls[-1]:
                    part.unlink(missing_ok=True)  # nothing shows that the next fits on
    if reasons:
        raise ProgramError(
            f"{path} could not be downloaded ({'; '.join(reasons)}): put the file "
            "there by hand, or try the program without it: python main.py --demo"
        )


def maybe_download_pretrained_vgg(data_dir):
    """Return the path of VGG-16's ImageNet weights, downloaded if missing."""
    path = data_dir / VGG_FILE
    download(VGG_URLS, path, VGG_SIZE, VGG_MD5)
    return path


def maybe_download_kitti_road(data_dir):
    """Make sure that `data_dir`/data_road holds KITTI Road, downloaded if missing."""
    folder, archive = data_dir / "data_road", data_dir / "data_road.zip"
    if not folder.exists():
        print("KITTI Road: CC BY-NC-SA 3.0, for non-commercial use; cvlibs.net")
        with locked(folder):
            if not folder.exists():
                download(KITTI_URLS, archive)
                _unpack(archive, folder)
    images, labels = "image_2/[!.]*.png", "gt_image_2/[!.]*_road_*.png"
    patterns = f"training/{images}", f"training/{labels}", f"testing/{images}"
    counts = tuple(len(list(folder.glob(pattern))) for pattern in patterns)
    if counts != KITTI_COUNTS:
        words = "{} training images, {} road labels, {} test images"
        full = words.format(*KITTI_COUNTS)
        print(f"{folder}: {words.format(*counts)}; the full set: {full}")


def _unpack(archive, folder):
    """Unpack `archive` beside `folder`, rename its data_road to `folder`, remove it."""
    try:
        with beside(folder) as part, zipfile.ZipFile(archive) as content:
            unpacked = sum(entry.file_size for entry in content.infolist())
            need_space(archive.parent, unpacked, f"unpacking {archive.name}")
            for entry in tqdm(content.infolist(), desc="unpacking", disable=None):
                content.extract(entry, part)  # checks the CRC, stays inside
            if not (part / "data_road" / "training" / "image_2").is_dir():
                raise zipfile.BadZipFile("no data_road/training/image_2 in it")
            os.replace(part / "data_road", folder)
    except (OSError, ProgramError, MemoryError):
        raise
    except Exception as error:  # zipfile and its decoders raise what they like
        archive.unlink()
        raise ProgramError(
            f"{archive} was damaged ({error}) and is removed: start the program "
            f"again to download it, or unpack KITTI Road into {folder} by hand"
        ) from error
    archive.unlink()


# -------------------------------------------------------------------------- data


def read_image(path):
    """Return the image at `path` as RGB uint8 (H, W, 3), upright, whatever its mode."""
    with (
        blaming(path, "a readable image", "replace or remove it"),
        Image.open(path) as image,
    ):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def read_label(path):
    """Return the ids (H, W) uint8 of a KITTI ground truth image.

    The benchmark's meaning: red is validity, blue is road. Blue without red is road
    outside the valid area, hence void.
    """
    red, _, blue = np.moveaxis(read_image(path), -1, 0)
    return np.where(red > 0, blue > 0, VOID).astype(np.uint8)


def check_size(label_path, label, image):
    """Raise ProgramError unless a label has the size of its image."""
    if image.shape[:2] != label.shape:
        raise ProgramError(
            f"{label_path} is {label.shape[1]}x{label.shape[0]}, its image "
            f"{image.shape[1]}x{image.shape[0]}: replace the label"
        )


def resize_image(images, image_shape):
    """Resize uint8 images (..., H, W, 3) to `image_shape`, uint8 again."""
    x = tf.image.resize(images, image_shape, antialias=True)
    return tf.saturate_cast(tf.round(x), tf.uint8)


def resize_label(label, image_shape):
    """Resize ids (H, W) to `image_shape` by nearest neighbour: ids do not blend."""
    return tf.image.resize(label[..., None], image_shape, method="nearest")[..., 0]


def category(path):
    """Return the category of a KITTI file: "um_000000.png" -> "um"."""
    return path.stem.rpartition("_")[0]


def road_name(path):
    """Return the name of an image's labels and confidences: "um_road_000000.png"."""
    return "_road_".join(path.name.rsplit("_", 1))


def find_images(data_dir, holdout_fraction, batch_size, submission=False):
    """Return the training and hold-out images with their labels, and the test images.

    All of them paths in name order. Raises ProgramError for an image without label,
    for fewer training images than `batch_size`, for a broken calibration, and, where a
    `submission` is asked for, for a test image without one.
    """
    folder = data_dir / "data_road" / "training"
    samples = []
    for image in sorted((folder / "image_2").glob("[!.]*.png")):
        label = folder / "gt_image_2" / road_name(image)
        if not label.exists():
            lane = label.with_name(label.name.replace("_road_", "_lane_"))
            other = f" ({lane.name} is another task)" if lane.exists() else ""
            raise ProgramError(f"{image} has no label {label}{other}: add the label")
        samples.append((image, label))
    if not samples:
        raise ProgramError(
            f"no images in {folder / 'image_2'}: unpack data_road.zip into {data_dir}, "
            f"or remove {data_dir / 'data_road'} and let the program download it"
        )
    training, holdout = split_holdout(samples, holdout_fraction)
    if batch_size > len(training):
        raise ProgramError(
            f"--batch-size {batch_size} is more than the {len(training)} training "
            f"images of {data_dir}: lower it, or --holdout-fraction"
        )
    if not holdout:
        print("no hold-out: no scores, and the last weights count as the best")
    tests = sorted((data_dir / "data_road/testing/image_2").glob("[!.]*.png"))
    for path in tests:  # now, not after hours of training
        unreadable = blaming(path, "a readable image", "replace or remove it")
        with unreadable, Image.open(path) as image:
            image.verify()
    for image, _ in holdout:
        read_homography(image)
    missing = [path for path in tests if submission and read_homography(path) is None]
    if missing or submission and not tests:
        first = f"{missing[0].stem}.txt" if missing else "test images"
        raise ProgramError(
            f"{data_dir / 'data_road/testing'} has no {first} ({len(missing)} of "
            f"{len(tests)} are missing): add them, or leave --submission out"
        )
    return training, holdout, tests


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
    training, holdout = [], []
    by_category = sorted(samples, key=lambda sample: category(sample[0]))
    for _, group in itertools.groupby(by_category, lambda sample: category(sample[0])):
        group = list(group)
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


def free_memory():
    """Return the bytes of memory that can still be had, infinity if none can tell."""
    limits = [np.inf]
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        limits.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1]))
    group = Path("/sys/fs/cgroup")  # of a container; "max" is no limit
    with contextlib.suppress(OSError, ValueError):
        used = int((group / "memory.current").read_text())
        cached = re.search(
            r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE
        )
        free = int((group / "memory.max").read_text()) - used + int(cached[1])
        limits.append(free)
    return min(limits)


def gen_batch_function(samples, image_shape, strategy, seed=0):
    """Decode and resize `samples` once; return get_batches_fn and names over them.

    names(batch_size, step) lists a training step's files. get_batches_fn(batch_size,
    steps) is a dataset of images (B, H, W, 3) uint8, labels (B, H, W) uint8 and weights
    (B,) float32: a valid pixel's share of the batch's loss. With `steps`, a range, it
    gives those training steps, over and over, shuffled and augmented; without, every
    sample once, as it is, in order. Each replica of `strategy` gets an equal part of a
    batch, filled up with void images of weight 0. Raises ProgramError for a set that
    does not fit into memory.
    """
    count = len(samples)
    size, free = 4 * count * np.prod(image_shape, dtype=float), free_memory()
    if size > free:
        raise ProgramError(
            f"{count} images of {image_shape[1]}x{image_shape[0]} take "
            f"{size / 1e6:,.0f} MB of memory and {free / 1e6:,.0f} MB are free: lower "
            "--image-height and --image-width, or use fewer images"
        )
    with tf.device("CPU"):  # variables: each dataset would copy a constant
        images = tf.Variable(tf.zeros((count, *image_shape, 3), tf.uint8))
        labels = tf.Variable(tf.zeros((count, *image_shape), tf.uint8))
    valid = np.zeros(count, np.float32)  # pixels

    def decode(row):
        image, label = read_image(samples[row][0]), read_label(samples[row][1])
        check_size(samples[row][1], label, image)
        with tf.device("CPU"):  # a scope holds for its own thread only
            label = resize_label(label, image_shape)
            image = resize_image(image, image_shape)
            images.scatter_update(tf.IndexedSlices(image[None], [row]))
            labels.scatter_update(tf.IndexedSlices(label[None], [row]))
        valid[row] = np.count_nonzero(label != VOID)

    in_parallel(decode, range(count), "decoding")

    def get_batches_fn(batch_size, steps=None):
        training = steps is not None
        if not training:
            batch_size = min(batch_size, max(count, 1))
            steps = range(-(-count // batch_size))

        def shares(context):
            """Return the dataset of a worker: what its replicas get, one by one."""
            replicas = context.num_replicas_in_sync
            local = replicas // context.num_input_pipelines
            first = local * context.input_pipeline_id
            size = -(-batch_size // replicas)

            def share(index):
                step, replica = index // local, first + index % local
                if training:
                    rows = batch_rows(step, count, batch_size, seed)
                else:
                    rows = tf.range(count)[step * batch_size :][:batch_size]
                pixels = tf.reduce_sum(tf.gather(valid, rows))
                weight = tf.math.divide_no_nan(1.0, pixels)
                places = replica * size + tf.range(size, dtype=tf.int64)
                real = places < tf.size(rows, tf.int64)
                places = tf.where(real, places, 0)
                rows = tf.gather(rows, places)
                x, y = tf.gather(images, rows), tf.gather(labels, rows)
                if training:
                    draws = tf.random.stateless_uniform((3, batch_size), [seed, step])
                    x, y = augment(x, y, tf.gather(draws, places, axis=1))
                y = tf.where(real[:, None, None], y, VOID)
                return x, y, tf.where(real, weight, 0)

            dataset = tf.data.Dataset.range(steps.start * local, steps.stop * local)
            if training:  # workers would have to agree on an end at every step
                dataset = dataset.repeat()
            dataset = dataset.map(share, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
            if replicas == 1:  # several fetch to their devices themselves
                gpus, cpus = map(tf.config.list_logical_devices, ("GPU", "CPU"))
                device = [*gpus, *cpus][0].name
                dataset = dataset.apply(tf.data.experimental.prefetch_to_device(device))
            return dataset

        return strategy.distribute_datasets_from_function(shares)

    def names(batch_size, step):
        rows = batch_rows(step, count, batch_size, seed)
        return [samples[row][0].name for row in rows]

    return get_batches_fn, names


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
        ahead = np.concatenate([z[rows], z[rows][::-1]])
        u, v = 721.5377 * x / ahead + 609.5593, 721.5377 * 1.65 / ahead + 172.854
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


def maybe_draw_kitti_road(data_dir, training=60, testing=6):
    """Draw a small data set in KITTI Road's layout into `data_dir`/data_road."""
    folder = data_dir / "data_road"
    if folder.exists():
        return

    def draw(task):
        split, kind, number = task
        rng = np.random.default_rng((split == "testing", *kind.encode(), number))
        image, road, lane = draw_scene(kind, rng)
        to, name = part / split, f"{kind}_{number:06}"
        image.save(to / "image_2" / f"{name}.png", compress_level=1)
        (to / "calib" / f"{name}.txt").write_text(DRAWN_CALIBRATION)
        if split == "training":
            road.save(to / "gt_image_2" / f"{kind}_road_{number:06}.png")
            if kind == "um":
                lane.save(to / "gt_image_2" / f"um_lane_{number:06}.png")

    with locked(folder), beside(folder) as part:
        if folder.exists():
            return
        need_space(data_dir, 10**6 * (training + testing), "the drawn data")
        for name in "image_2", "gt_image_2", "calib":
            (part / "training" / name).mkdir(parents=True)
        for name in "image_2", "calib":
            (part / "testing" / name).mkdir(parents=True)
        tasks = [
            (split, kind, number)
            for split, count in (("training", training), ("testing", testing))
            for kind in ("um", "umm", "uu")
            for number in range(count // 3)
        ]
        in_parallel(draw, tasks, "drawing")
        os.replace(part, folder)


# --------------------------------------------------------------------- inference


@functools.lru_cache(maxsize=1)
def predictor(model, image_shape):
    """Return the tf.function of predict_road: one trace for all batches and sizes.

    A trace for certain sizes rounds differently, and which ones there are would depend
    on what was segmented before.
    """

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)])
    def predict(images):
        x = resize_image(images, image_shape)
        road = tf.nn.softmax(model(x, training=False))[..., 1:]
        size = tf.shape(images)[1:3]
        return {"road": tf.image.resize(road, size, antialias=True)[..., 0]}

    return predict


def predict_road(model, images, image_shape):
    """Return the road probability (B, H, W) float32 of images (B, H, W, 3) uint8.

    The network sees them at `image_shape`; H and W are free.
    """
    return predictor(model, image_shape)(tf.constant(images))["road"]


def overlay(image, road):
    """Tint uint8 `image` (H, W, 3) green where the probability is at least 0.5."""
    green = (image.astype(np.uint16) + (0, 255, 0)) // 2
    return np.where(road[..., None] >= 0.5, green, image).astype(np.uint8)


def segment(model, images, image_shape, batch_size, seconds=None):
    """Yield (name, image, road probability (H, W) float32) of (name, image) pairs.

    Neighbours of one size share a batch. What the network takes is added to `seconds`.
    """
    for shape, group in itertools.groupby(images, key=lambda pair: pair[1].shape):
        count = min(batch_size, max(2**25 // (shape[0] * shape[1]), 1))  # photographs
        while batch := list(itertools.islice(group, count)):
            start = time.perf_counter()
            stack = np.stack([image for _, image in batch])
            roads = predict_road(model, stack, image_shape).numpy()
            if seconds is not None:
                seconds.append(time.perf_counter() - start)
            for (name, image), road in zip(batch, roads):
                yield name, image, road


def gen_test_output(model, image_paths, image_shape, batch_size):
    """Yield (path, image (H, W, 3) uint8, road probability (H, W) float32)."""
    images = ahead(lambda path: (path, read_image(path)), image_paths)
    return segment(model, images, image_shape, batch_size)


def save_inference_samples(
    run_dir, model, image_paths, image_shape, batch_size, submission=False
):
    """Write the overlays of all `image_paths` into `run_dir`: all of them, or none.

    With `submission` also submission.zip, for KITTI Road's server: the confidences
    from above, which needs a calibration of each image.
    """

    def save(sample):
        path, image, road = sample
        save_image(overlay(image, road), part / path.name)
        if submission:
            view = birds_eye(to_confidence(road).numpy(), read_homography(path), 0)
            save_image(view, views / road_name(path))

    with beside(run_dir / "overlays") as part, beside(run_dir / "submission") as views:
        part.mkdir()
        views.mkdir()
        samples = gen_test_output(model, image_paths, image_shape, batch_size)
        in_parallel(save, samples, "overlays", len(image_paths))
        if submission:
            shutil.make_archive(part / "submission", "zip", views)
        for path in part.iterdir():
            os.replace(path, run_dir / path.name)


def predict(run_dir, model, path, image_shape, batch_size):
    """Write overlays of an image, of a folder's images or of a video into `run_dir`.

    Images keep their names and formats; a video becomes an mp4 of its size, rate and
    number of frames. Raises ProgramError at the end for images that cannot be read.
    """
    broken, seconds, start = [], [], time.perf_counter()

    def read(path):
        try:
            return path, read_image(path)
        except ProgramError as error:
            broken.append(str(error))

    def save(sample):
        path, image, road = sample
        save_image(overlay(image, road), run_dir / path.name)

    inference = image_shape, batch_size, seconds
    if path.is_dir() or path.suffix.lower() in IMAGES:
        files = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
        paths = [path for path in files if path.suffix.lower() in IMAGES]
        count = len(paths)
        if not paths:
            raise ProgramError(f"{path}: no {', '.join(IMAGES)} in it: name another")
        if len(files) > count:
            print(f"{len(files) - count} other files in {path} are left alone")
        images = filter(None, ahead(read, paths))
        in_parallel(save, segment(model, images, *inference), "overlays", count)
        done = count - len(broken)
    else:
        every = ["-fps_mode", "passthrough"]  # or a varying rate would be evened out
        with blaming(path, "a readable video", "name another, or an image"):
            reader = imageio.get_reader(path, format="FFMPEG", output_params=every)
            count, length = imageio_ffmpeg.count_frames_and_secs(str(path))
            rate = reader.get_meta_data()["fps"] or 25
            if length > 1 and not 0.8 < count / length / rate < 1.25:
                rate = count / length  # what the file states is a bound
            height, width, _ = next(iter(reader)).shape
        sized = {"macro_block_size": 2, "pixelformat": "yuv420p"}
        if height % 2 or width % 2:  # which colours at half the size cannot have
            sized = {"macro_block_size": 1, "pixelformat": "yuv444p"}
        done, target = 0, run_dir / f"{path.stem}.mp4"
        options = {"format": "FFMPEG", "fps": rate, "ffmpeg_log_level": "quiet"}
        frames = segment(model, ((path, frame) for frame in reader), *inference)
        with written(target) as part:
            try:
                with imageio.get_writer(part, **options, **sized) as video:
                    for _, image, road in tqdm(frames, "frames", count, disable=None):
                        video.append_data(overlay(image, road))
                        done += 1
            except OSError as error:
                raise ProgramError(
                    f"{target}: ffmpeg gave up at frame {done}: make room, or set "
                    "--runs-dir"
                ) from error
        if done < count:
            broken.append(f"{path} ends after frame {done}")
    total = time.perf_counter() - start
    if done:
        print(
            f"{done} overlays in {run_dir}: {done / total:.1f} a second, of which the "
            f"network took {100 * sum(seconds) / total:.0f} % of the time"
        )
    if broken:
        raise ProgramError(f"{count - done} of {count} left out: {'; '.join(broken)}")


def export(model, folder, image_shape):
    """Write `model` as a SavedModel: images (B, H, W, 3) uint8 to road (B, H, W)."""
    if folder.exists():
        raise ProgramError(f"{folder}: exists: name a new folder with --export")
    folder.parent.mkdir(parents=True, exist_ok=True)
    need_space(folder.parent, 5 * model.count_params() + 10**6, "the SavedModel")

    module = tf.Module()
    module.model, module.serve = model, predictor(model, image_shape)
    with written(folder) as part:
        try:
            tf.saved_model.save(module, part, signatures=module.serve)
        except tf.errors.OpError as error:
            raise ProgramError(f"{folder}: {error.message}: make room") from error


# ------------------------------------------------------------------------ scores


PLANES = {"image": "image plane", "bev": "bird's-eye view"}
MISSED, FALSE = (230, 60, 0), (0, 110, 255)  # colours of errors in the report
BEV_X, BEV_Z, BEV_CELL = (-10, 10), (6, 46), 0.05  # metres: 800 x 400 cells


def birds_eye(pixels, homography, outside):
    """Return `pixels` (H, W) uint8 of an image as seen from above, (800, 400) uint8.

    KITTI Road's bird's-eye view: cells of 5 cm, the far ones on top; each takes the
    pixel that its centre falls into, and `outside` where that is not in the image.
    """
    x = np.arange(*BEV_X, BEV_CELL) + BEV_CELL / 2
    z = np.arange(*BEV_Z, BEV_CELL)[::-1] + BEV_CELL / 2
    plane = np.stack(np.broadcast_arrays(x, z[:, None], 1.0))
    u, v, w = np.tensordot(homography, plane, axes=1)
    u, v = u / w, v / w
    height, width = pixels.shape
    seen = (w > 0) & (1 <= u) & (u <= width) & (1 <= v) & (v <= height)
    view = np.full(seen.shape, outside, np.uint8)
    view[seen] = pixels[v[seen].astype(int) - 1, u[seen].astype(int) - 1]
    return view


def to_confidence(road):
    """Return the road probability in 8 bits: all that is scored, and submitted."""
    return tf.cast(tf.round(road * 255), tf.uint8)


def confidence_histogram(confidence, labels):
    """Count the valid pixels by class and 8-bit confidence, (2, 256) int32.

    Both uint8, of one shape; every score derives from this.
    """
    bins = tf.cast(labels, tf.int32) * 256 + tf.cast(confidence, tf.int32)
    bins = tf.where(labels == VOID, -1, bins)  # negative segments are left out
    counts = tf.math.unsorted_segment_sum(tf.ones_like(bins), bins, 512)
    return tf.reshape(counts, (2, 256))


def scores(histogram):
    """Return KITTI Road's pixel measures in percent, from a confidence histogram.

    Fritsch et al., "A New Performance Measure and Evaluation Benchmark for Road
    Detection Algorithms", ITSC 2013: road is confidence >= k/255 for 256 thresholds
    k; MaxF is the largest F1, PRE, REC, FPR and FNR are those of its `threshold`; AP
    is the mean, over recall 0, 0.1 ... 1, of the largest precision at that recall or
    more. IoU is that of `threshold`, IoU50 and accuracy are those of 0.5.
    """
    histogram = np.asarray(histogram, np.float64)
    # row k: pixels of either class with confidence k/255 or more
    fp, tp = np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1]
    negatives, positives = histogram.sum(axis=1)
    tiny = 1e-10
    precision, recall = tp / (tp + fp + tiny), tp / max(positives, 1)
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
        "accuracy": (tp[half] + negatives - fp[half]) / max(histogram.sum(), 1),
    }
    return {name: 100 * float(value) for name, value in measures.items()}


def score_holdout(run_dir, model, holdout, image_shape, batch_size):
    """Score (image, label) paths at their own size; write their confidences as PNGs.

    Returns {"image": {category: measures}, "bev": {...}}, over the categories and all
    of them, "urban"; "bev", the bird's-eye view, over the calibrated images; and each
    image's IoU at 0.5. `run_dir`/holdout gets the 8-bit values that are scored, under
    the labels' names, errors/ the overlays and errors at `image_shape`.
    """
    each = {}
    kinds = sorted({category(image) for image, _ in holdout})
    counts = {
        plane: {kind: [] for kind in (*kinds, "urban")} for plane in ("image", "bev")
    }
    images = [image for image, _ in holdout]
    samples = gen_test_output(model, images, image_shape, batch_size)
    samples = tqdm(samples, "scoring", len(images), unit="image", disable=None)
    with written(run_dir / "holdout") as part, written(run_dir / "errors") as errors:
        part.mkdir()
        errors.mkdir()
        for (image, pixels, road), (_, label_path) in zip(samples, holdout):
            confidence, label = to_confidence(road).numpy(), read_label(label_path)
            check_size(label_path, label, pixels)
            save_image(confidence, part / label_path.name)
            small = resize_image(pixels, image_shape).numpy()
            found, truth = (
                resize_label(ids, image_shape).numpy()
                for ids in ((road >= 0.5).astype(np.uint8), label)
            )
            save_image(overlay(small, found), errors / f"{image.stem}.jpg")
            small[(truth == 1) & (found == 0)] = MISSED
            small[(truth == 0) & (found == 1)] = FALSE
            save_image(small, errors / f"{image.stem}_errors.jpg")
            pairs = {"image": (confidence, label)}
            if (homography := read_homography(image)) is not None:
                sides = (confidence, 0), (label, VOID)
                pairs["bev"] = [birds_eye(x, homography, out) for x, out in sides]
            for plane, pair in pairs.items():
                for kind in category(image), "urban":
                    counts[plane][kind].append(confidence_histogram(*pair).numpy())
            each[image.stem] = scores(counts["image"]["urban"][-1])["IoU50"]
    pooled = {
        plane: {
            kind: {"images": len(parts), **scores(np.sum(parts, axis=0))}
            for kind, parts in groups.items()
            if parts
        }
        for plane, groups in counts.items()
    }
    return pooled, each


def score_rows(kinds):
    """Return the rows of a table of {category: measures}, as text, in percent."""
    head = [["percent", *measures] for measures in kinds.values()][:1]
    return head + [
        [kind, str(measures["images"])]
        + [f"{value:.2f}" for name, value in measures.items() if name != "images"]
        for kind, measures in kinds.items()
    ]


def print_scores(scores):
    """Print what score_holdout returned."""
    for plane, kinds in scores.items():
        print(
            PLANES[plane] + ("" if kinds else ": no hold-out image has a calibration")
        )
        for first, *cells in score_rows(kinds):
            print(f"{first:8}" + "".join(f"{cell:>10}" for cell in cells))


# -------------------------------------------------------------------- run folder


def read_run(run_dir):
    """Return what run.json in `run_dir` holds."""
    with blaming(run_dir / "run.json", "the record of a run", "name another folder"):
        record = json.loads((run_dir / "run.json").read_text())
        kinds = {"config": dict, "data": dict, "history": list, "resumed": list}
        if not all(isinstance(record[name], kind) for name, kind in kinds.items()):
            raise ValueError("damaged")
        int(record["config"]["image_height"]), int(record["config"]["image_width"])
        return record


def is_finished(run_dir):
    """Say so if the run in `run_dir` needs no resuming."""
    if not read_run(run_dir)["finished"]:
        return False
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)  # if a kill left it
    print(f"{run_dir} is finished; its weights are {run_dir / WEIGHTS}")
    return True


def new_folder(runs_dir):
    """Make a folder in `runs_dir`, named for the second, with a suffix if taken."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (runs_dir / (name + suffix)).mkdir()
            return runs_dir / (name + suffix)


@contextlib.contextmanager
def run_folder(runs_dir, resume, facts, chief=True):
    """Make a run's folder, or take up `resume`; yield it and what run.json holds.

    `facts` are the run's settings, device and data. `finished` is written, and the
    checkpoints go, only once the caller is through; if it fails before there is
    anything to show, a new folder goes again. Of several workers only the `chief`
    writes. Raises ProgramError while another program is at work there.
    """
    if not chief:
        yield resume or runs_dir, {}
        return
    run_dir = resume or new_folder(runs_dir)
    packages = ("tensorflow", "keras", "numpy", "imageio", "pillow")
    facts["versions"] = {name: importlib.metadata.version(name) for name in packages}
    record = {"finished": False, "resumed": [], "history": [], "best_epoch": None}
    with locked(run_dir / CHECKPOINTS / "run", wait=False):
        if resume:
            record = read_run(run_dir)
            if record["finished"]:  # while this program looked at the data
                raise ProgramError(f"{run_dir} is finished: nothing to go on with")
            if record["data"] != facts["data"]:
                raise ProgramError(
                    f"{run_dir} was begun with {record['data']} images, here are "
                    f"{facts['data']}: name its data set with --data-dir"
                )
        record = record | facts | {"scores": {}, "holdout": {}}
        try:
            if not resume:  # there it waits until the checkpoint is accepted
                write_run(run_dir, record)
            yield run_dir, record
            write_run(run_dir, record | {"finished": True})
        except BaseException:
            if resume or (run_dir / WEIGHTS).exists() or find_checkpoints(run_dir):
                folder = shlex.quote(str(run_dir))
                print(f"to go on with this run: python main.py --resume {folder}")
            else:
                shutil.rmtree(run_dir)
            raise
    shutil.rmtree(run_dir / CHECKPOINTS)


def write_run(run_dir, record):
    """Write `record` as run.json, and the report on it."""
    text = json.dumps(record, indent=1, allow_nan=False, default=str)
    for name, content in ("run.json", text), ("index.html", report(run_dir, record)):
        with written(run_dir / name) as part:
            part.write_text(content, "utf-8", "replace")


def write_epoch(run_dir, record, epoch, state):
    """Add `epoch` to the record; where it is the best, keep its weights in memory."""
    record["history"].append(epoch)
    record["best_epoch"] = best_epoch(record["history"])
    if record["best_epoch"] == epoch["epoch"]:
        copy_weights(state.best, state.model.trainable_variables)
    write_run(run_dir, record)


def best_epoch(history):
    """Return the epoch of the highest MaxF; without a hold-out the last, or None."""
    keys = [(epoch.get("MaxF", epoch["epoch"]), -epoch["epoch"]) for epoch in history]
    return -max(keys)[1] if keys else None


def copy_weights(variables, values):
    """Assign `values` to `variables`, one by one."""
    for variable, value in zip(variables, values):
        variable.assign(value)


def write_weights(run_dir, state):
    """Write the best weights, through the model: beside, then renamed."""
    # HDF5 may crash on a full disk
    need_space(run_dir, 4 * state.model.count_params() + 10**6, "saving the weights")
    variables = state.model.trainable_variables
    current = [variable.numpy() for variable in variables]
    with written(run_dir / WEIGHTS) as part:
        try:
            copy_weights(variables, state.best)
            state.model.save_weights(part)
        finally:
            copy_weights(variables, current)


def find_checkpoints(run_dir):
    """Return the paths of a run's checkpoints, without suffix, the newest last."""
    found = (run_dir / CHECKPOINTS).glob("ckpt-*[0-9].index")
    return sorted((path.with_suffix("") for path in found), key=number)


def number(path):
    """Return the number of a checkpoint: "ckpt-12" -> 12."""
    return int(path.name.rpartition("-")[2])


class Checkpoints:
    """The checkpoints of a run, from which it goes on to the same bits.

    `state` is that of main.optimize. It holds the best weights too, so that weights,
    history and step belong together, whichever file a power cut left as the last.
    There is no list of them: the files count, as a list can be damaged.
    """

    def __init__(self, run_dir, record, state, chief=True):
        self.run_dir, self.record, self.state = run_dir, record, state
        self.chief = chief  # of several workers only this one writes
        self.folder = run_dir / CHECKPOINTS
        self.saved_at, self.saved, self.last = time.monotonic(), None, 0
        self.best = None  # the epoch of best.weights.h5
        if set("*?[") & set(str(run_dir)):
            raise ProgramError(
                f"{run_dir}: TensorFlow finds no checkpoint where * ? or [ is in the "
                "path: name another --runs-dir"
            )
        if chief:
            self.clean()

    def clean(self):
        """Remove all but the newest two, with what a kill left half written."""
        kept = [path.name for path in find_checkpoints(self.run_dir)[-2:]]
        for path in self.folder.glob("ckpt-*"):
            if path.name.partition(".")[0] not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_best(self):
        """Write the best weights, unless it is they that are there."""
        if self.best != self.record["best_epoch"]:
            write_weights(self.run_dir, self.state)
            self.best = self.record["best_epoch"]

    def restore(self, steps):
        """Restore the newest checkpoint that is whole, for a run of `steps` steps."""
        found = find_checkpoints(self.run_dir)
        for path in reversed(found):
            try:
                with blaming(path, "a whole checkpoint", "the one before it counts"):
                    self.state.read(str(path)).assert_consumed()
                self.last = number(path)
                break
            except ProgramError as error:
                print(error)
        else:
            if found:
                raise ProgramError(
                    f"{self.folder}: no checkpoint can be restored: remove this folder "
                    "and the run starts at step 0 again"
                )
        self.saved = step, epoch = int(self.state.step.numpy()), int(self.state.epoch)
        if step > steps:
            raise ProgramError(
                f"{self.run_dir} is at step {step} of --epochs' {steps}: raise --epochs"
            )
        print(f"resumed at step {step} of {steps}")
        if not self.chief:
            return
        self.record["resumed"].append(step)
        self.record["history"] = self.record["history"][:epoch]
        self.record["best_epoch"] = best_epoch(self.record["history"])
        for frame in (self.folder / FRAMES).glob("*.png"):
            if int(frame.stem) > epoch:
                frame.unlink()
        self.write_best()
        write_run(self.run_dir, self.record)

    def save(self, seconds=0):
        """Write the best weights and a checkpoint, if the last is `seconds` old."""
        progress = int(self.state.step.numpy()), int(self.state.epoch)
        if not self.chief or progress == self.saved:
            return
        if time.monotonic() - self.saved_at < seconds:
            return
        self.write_best()
        write_progress(self.run_dir)
        size = 16 * self.state.model.count_params()
        need_space(self.folder, size + 10**6, "a checkpoint")
        path = self.folder / f"ckpt-{self.last + 1}"
        try:
            self.state.write(str(path))
        except tf.errors.OpError as error:
            raise ProgramError(
                f"{path}: {error.message}: the checkpoint before it is kept; make "
                "room, then resume"
            ) from error
        for file in self.folder.glob(f"{path.name}.*"):
            flush(file)
        self.saved_at, self.saved, self.last = time.monotonic(), progress, self.last + 1
        self.clean()
        write_run(self.run_dir, self.record)


# ------------------------------------------------------------------------ report


def keep_frame(run_dir, model, path, image_shape, epoch, epochs):
    """Keep what the network makes of the image at `path`, for at most 60 epochs."""
    if path is None or epoch % -(-epochs // 60) and epoch not in (1, epochs):
        return
    image = resize_image(read_image(path), image_shape).numpy()
    road = predict_road(model, image[None], image_shape)[0].numpy()
    frame = Image.fromarray(overlay(image, road))
    size = max(frame.height // 10, 10)
    style = {"font_size": size, "stroke_width": 2, "stroke_fill": "black"}
    ImageDraw.Draw(frame).text((6, 2), f"epoch {epoch}", **style)
    folder = run_dir / CHECKPOINTS / FRAMES
    folder.mkdir(exist_ok=True)
    save_image(np.asarray(frame), folder / f"{epoch:09}.png")


def write_progress(run_dir):
    """Make progress.gif of the frames that were kept, 60 of them at most."""
    paths = sorted((run_dir / CHECKPOINTS / FRAMES).glob("*.png"))
    every = -(-len(paths) // 60) or 1
    paths = paths[::-1][::every][::-1]  # with the last
    if paths:
        with written(run_dir / "progress.gif") as part:
            frames = [Image.open(path).convert("RGB") for path in paths]
            durations = [400] * (len(frames) - 1) + [2500]  # ms
            rest = {"save_all": True, "append_images": frames[1:], "loop": 0}
            frames[0].save(part, duration=durations, **rest)


def chart(title, lines, best, log=False):
    """Return an SVG of {name: [(epoch, value), ...]} with `best`, an epoch, marked."""
    epochs, values = np.array([point for line in lines.values() for point in line]).T
    low, high, last = values.min(), values.max(), max(int(epochs.max()), 2)
    nice = [m * 10.0**k for k in range(-7, 39) for m in (1, 2, 5)]
    if log:
        low, high = np.clip((low, high), nice[0], nice[-2])
    else:
        step = next(tick for tick in nice if tick >= (high - low) / 5)
        nice = step * np.arange(np.floor(low / step), np.ceil(high / step) + 2)
    ticks = [max(tick for tick in nice if tick <= low)]
    while ticks[-1] < high or len(ticks) < 2:
        ticks.append(min(tick for tick in nice if tick > ticks[-1]))
    scale = np.log10 if log else np.asarray

    def x(epoch):
        return round(52 + 416 * (epoch - 1) / (last - 1), 1)

    def y(value):
        value = np.clip(value, ticks[0], ticks[-1])
        return round(
            np.interp(scale(value), scale((ticks[0], ticks[-1])), (232, 40)), 1
        )

    def text(x, y, kind, words):
        return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'

    parts = [text(52, 14, "title", title), text(468, 266, "end", "epoch")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M52 {y(tick)}H468"/>')
        parts.append(text(46, y(tick) + 4, "end", f"{tick:.4g}"))
    ticks_x = range(1, last + 1, -(-last // 10))
    parts += [text(x(epoch), 248, "middle", epoch) for epoch in ticks_x]
    parts.append(f'<path class="best" d="M{x(best)} 40V232"/>')
    parts.append(text(468, 31, "end", f"best: {best}"))
    for index, (name, line) in enumerate(lines.items()):
        points = [f"{x(epoch)},{y(value)}" for epoch, value in line]
        points = " ".join(points if len(points) > 1 else 2 * points)  # one is a dot
        parts.append(f'<polyline class="line{index}" points="{points}"/>')
        parts.append(text(52 + 130 * index, 31, f"name{index}", name))
    head = f'<svg viewBox="0 0 480 270" role="img" aria-label="{title}">'
    return head + "".join(parts) + "</svg>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; --line0: #0a6; --line1: #d60 }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto;
  padding: 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.2rem; margin-top: 2rem }}
img, svg {{ max-width: 100%; height: auto; display: block }}
.grid > img, svg {{ width: 100% }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: .9rem }}
td {{ text-align: right; padding: .15rem .6rem; border-bottom: 1px solid #8886 }}
td:first-child {{ text-align: left }} figure {{ margin: 0 0 1rem }}
figcaption {{ font-size: .9rem; overflow-wrap: anywhere }}
div.grid {{ display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }}
svg text {{ font-size: 12px; fill: currentColor }} svg .title {{ font-weight: bold }}
.end {{ text-anchor: end }} .middle {{ text-anchor: middle }}
path.grid {{ stroke: #8885 }}
.best {{ stroke: currentColor; stroke-dasharray: 4 3 }}
polyline {{ fill: none; stroke-width: 2; stroke-linecap: round }}
.line0 {{ stroke: var(--line0) }} .line1 {{ stroke: var(--line1) }}
svg .name0 {{ fill: var(--line0) }} svg .name1 {{ fill: var(--line1) }}
mark {{ padding: 0 .4rem; color: #fff }}
</style></head><body>
{body}
</body></html>
"""


def report(run_dir, record):
    """Return a page on a run: settings, scores, curves, pictures, of what there is."""
    history, body = record["history"], []

    def table(rows):
        cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in row] for row in rows]
        body.append('<div class="wide"><table><tr>')
        body.append("<tr>".join("".join(row) for row in cells) + "</table></div>")

    def figure(caption, *paths):
        body.append('<figure><div class="grid">')
        for path in paths:
            with contextlib.suppress(OSError), Image.open(path) as image:
                name = os.fsencode(path.relative_to(run_dir).as_posix())
                source = urllib.parse.quote(name)
                size = "width={} height={}".format(*image.size)
                alt = html.escape(path.stem)
                body.append(f'<img src="{source}" alt="{alt}" loading="lazy" {size}>')
        body.append(f"</div><figcaption>{html.escape(caption)}</figcaption></figure>")

    title = html.escape(f"Run {run_dir.name}")
    state = "finished" if record["finished"] else "not finished"
    data = ", ".join(f"{count} {name}" for name, count in record["data"].items())
    data = data.replace("holdout", "hold-out")
    name = html.escape(record["device"]["name"])
    body.append(f"<h1>{title}: {state}</h1><p>FCN-8s on VGG-16 for road segmentation.")
    body.append(f"{len(history)} of {record['config']['epochs']} epochs on {name}; ")
    body.append(f"images: {data}.</p>")
    for plane, kinds in record["scores"].items():
        if kinds:
            body.append(f"<h2>Hold-out scores, {PLANES[plane]}</h2>")
            table(score_rows(kinds))
    if history:
        losses = {"training": "loss", "hold-out": "holdout_loss"}
        shares = {"MaxF": "MaxF", "IoU at 0.5": "IoU"}
        body.append('<h2>Training</h2><div class="grid">')
        for name, fields, log in (
            ("Loss: cross entropy, nats a pixel, log scale", losses, True),
            ("Hold-out at the network's size, percent", shares, False),
        ):
            lines = {
                line: [(epoch["epoch"], epoch[field]) for epoch in history]
                for line, field in fields.items()
                if field in history[0]
            }
            if lines:
                body.append(chart(name, lines, record["best_epoch"], log))
        body.append("</div>")
    if (run_dir / "progress.gif").exists():
        body.append("<h2>One image through the epochs</h2>")
        body.append('<div style="max-width: 36rem">')
        figure("", run_dir / "progress.gif")
        body.append("</div>")
    if record["holdout"]:
        body.append("<h2>Hold-out, from worst to best</h2><p>IoU at 0.5, at own size.")
        for words, colour in ("missed road", MISSED), ("false road", FALSE):
            body.append(f'<mark style="background: rgb{colour}">{words}</mark>')
        body.append("</p>")
    for name, iou in sorted(record["holdout"].items(), key=lambda item: item[1]):
        paths = (run_dir / "errors" / f"{name}{end}.jpg" for end in ("", "_errors"))
        figure(f"{name}: IoU {iou:.2f}", *paths)
    if overlays := sorted(run_dir.glob("[!.]*.png")):
        body.append('<h2>Test images</h2><div class="grid">')
        for path in overlays:
            figure(path.stem, path)
        body.append("</div>")
    body.append("<h2>Settings</h2>")
    table(
        item
        for part in ("config", "device", "versions")
        for item in record[part].items()
    )
    return PAGE.format(title=title, body="\n".join(body))
