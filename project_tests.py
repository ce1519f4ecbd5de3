"""Check every stage of main.py and helper.py, in the order in which they run.

    python project_tests.py             all of it, on all cores, at most 16
    python project_tests.py LoadVgg     one stage
    python project_tests.py --benchmark [--benchmark-steps N] [settings of main.py]
    python project_tests.py --benchmark-job     what a run costs beside its steps

No network but 127.0.0.1, nothing written outside temporary folders; a GPU is used by
the benchmarks alone.
"""

import argparse
import atexit
import base64
import collections
import contextlib
import copy
import errno
import fcntl
import functools
import gc
import hashlib
import html.parser
import http.server
import inspect
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import urllib.parse
import warnings
import weakref
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

ENVIRONMENT = os.environ.copy()  # as the user has it
if "--benchmark" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["NO_PROXY"] = "127.0.0.1"
asked_to_speak = "TF_CPP_MIN_LOG_LEVEL" in os.environ

import helper  # first: it brings TensorFlow up without its remarks

if not asked_to_speak:
    del os.environ["TF_CPP_MIN_LOG_LEVEL"]  # for the processes that are started here

# isort: split
import h5py
import imageio_ffmpeg
import keras
import numpy as np
import requests
import tensorflow as tf
from PIL import Image
from tensorflow.python.autograph.impl import api as autograph
from tensorflow.python.framework import kernels

import main
from helper import VOID, ProgramError

CPU = tf.config.list_physical_devices("CPU")[0]
if "--benchmark" not in sys.argv:  # a process a core, and two devices in place of one
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    pair = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(CPU, pair)
ONE = tf.distribute.get_strategy()
TIMEOUT = 600  # seconds, of a process
tf.get_logger().setLevel("ERROR")  # each test traces anew, and TensorFlow remarks on it


class Case(unittest.TestCase):
    """A test with a temporary folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.patch(os, "fsync", mock.Mock())  # which takes most of the time of a write

    def patch(self, target, name, value):
        patcher = mock.patch.object(target, name, value)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def files(self, folder=None):
        """Return the visible files and folders below `folder`, as sorted text."""
        found = (folder or self.folder).rglob("[!.]*")
        return sorted(str(path.relative_to(folder or self.folder)) for path in found)


def bound(function, args, kwargs):
    """Return the arguments of a call by their names."""
    return inspect.signature(function).bind(*args, **kwargs).arguments


# ------------------------------------------------------------ kept for several tests


@functools.cache
def kept_folder():
    """Return the folder of what several tests use: one for all processes."""
    if "PROJECT_TESTS_FOLDER" in os.environ:
        return Path(os.environ["PROJECT_TESTS_FOLDER"])
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def kept(name, make):
    """Return the folder that make(folder) fills for whoever comes first: copy it."""
    folder = kept_folder() / name
    with open(kept_folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = kept_folder() / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)  # of one that failed
            make(part)
            part.rename(folder)
    return folder


def draw(data_dir, training=18, testing=3):
    """Draw images of KITTI's size."""
    helper.maybe_draw_kitti_road(data_dir, training=training, testing=testing)


def draw_calibrated(data_dir):
    """Draw images of a third of KITTI's size, calibrated likewise."""
    shutil.copytree(kept("drawn", draw), data_dir)
    for path in data_dir.rglob("*.png"):
        with Image.open(path) as image:
            small = image.resize([side // 3 for side in image.size], Image.NEAREST)
        small.save(path, compress_level=1)
    for path in data_dir.rglob("calib/*.txt"):
        camera, *rest = path.read_text().splitlines()
        name, *numbers = camera.split()
        scaled = [float(x) / 3 for x in numbers[:8]] + numbers[8:]  # rows of u and v
        path.write_text("\n".join([" ".join([name, *map(str, scaled)]), *rest]))


def draw_small(data_dir):
    """Draw the same without calibrations, where scoring takes most of its time."""
    uncalibrated = shutil.ignore_patterns("calib")
    shutil.copytree(kept("calibrated", draw_calibrated), data_dir, ignore=uncalibrated)


# ------------------------------------------------- stages, each called in one place


def find_images(data_dir):
    """Return the training images with their labels, and the test images."""
    split = helper.find_images(data_dir, holdout_fraction=0)
    return split.training, split.test


def get_batches(samples, batch_size, steps=None, shape=(32, 64), strategy=ONE, seed=0):
    """Return the batches of `steps`, a range, of training; without, the hold-out's."""
    device = helper.Device(strategy=strategy)
    get_batches_fn = helper.gen_batch_function(samples, shape, seed, device)
    batches = get_batches_fn(batch_size)
    if steps is None:
        return batches.in_order()
    return itertools.islice(batches.from_step(steps.start), len(steps))


def batch_names(samples, batch_size, step, seed=0):
    """Return the names of the images of a training step."""
    get_batches_fn = helper.gen_batch_function(samples, (32, 64), seed)
    return get_batches_fn(batch_size).files(step)


def optimize(model, rate=0.001, vgg_rate=0.0001, epochs=3, steps=4, seed=0, **device):
    """Return train_step and the state, with the program's schedule."""
    return main.optimize(
        model,
        main.warm_up_and_cosine(rate, epochs, steps),
        vgg_factor=vgg_rate / rate,
        seed=seed,
        device=helper.Device(**device),
    )


def evaluate(model, batches):
    """Return the loss and scores of `batches`."""
    return main.evaluate(model, batches)


@functools.lru_cache(maxsize=4)  # its traces are most of what it costs
def predictor_of(model, image_shape=(32, 96), batch_size=5):
    """Return the Predictor of a model, which follows the model's weights."""
    return helper.Predictor(model, image_shape, batch_size)


def predict_road(model, images, image_shape=(32, 96)):
    """Return the road probability of images (B, H, W, 3)."""
    images = tf.constant(images)
    return predictor_of(model, image_shape).serve(images)["road"].numpy()


def save_overlays(folder, model, paths, batch_size):
    """Write the overlays of `paths`, which the network sees at 32x64."""
    predictor = predictor_of(model, (32, 64), batch_size)
    helper.save_inference_samples(folder, predictor, paths)


def birds_eye(pixels, homography, outside):
    """Return `pixels` (H, W) from above."""
    cells = helper.seen_cells(homography, pixels.shape)
    return helper.birds_eye(pixels, cells, outside)


# ---------------------------------------------------------------------- download


class Server:
    """A server on 127.0.0.1 that treats each request as its plan says.

    The plan is a list of functions of (handler, start), taken one a request, the last
    one for all that follow; `ranges` is the first byte that each request asked for.
    """

    def __init__(self, *plan):
        self.ranges = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler):
                start = re.match(r"bytes=(\d+)-", handler.headers.get("Range", ""))
                self.ranges.append(int(start[1]) if start else 0)
                index = min(len(self.ranges), len(plan)) - 1
                with contextlib.suppress(ConnectionError):
                    plan[index](handler, self.ranges[-1])
                handler.close_connection = True

            def log_message(handler, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=[0.01]).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def answer(content, sent=None, stated=None, resume=True, stall=0, status=None, at=0):
    """Return a plan's step: send `content`, up to `sent` bytes, and `stall` seconds."""

    def step(handler, start):
        if resume and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        body = content[start if resume else 0 :]
        handler.send_response(status or (206 if resume else 200))
        if resume:
            end = f"{len(content) - 1}/{len(content)}"
            handler.send_header("Content-Range", f"bytes {start + at}-{end}")
        if content.startswith(b"<html>"):
            handler.send_header("Content-Type", "text/html; charset=utf-8")
        handler.send_header("Content-Length", str(stated or len(body)))
        handler.end_headers()
        handler.wfile.write(body[:sent])
        handler.wfile.flush()
        time.sleep(stall)

    return step


def raw(head, *bodies, status="200 OK", pause=0):
    """Return a plan's step: send `head` and `bodies` as they are, then hang up."""

    def step(handler, start):
        head_lines = f"HTTP/1.1 {status}\r\n".encode("latin-1") + head
        for content in head_lines + b"\r\n", *bodies:
            handler.wfile.write(content)
            time.sleep(pause)

    return step


class Downloads(Case):
    content = bytes(range(256)) * 400  # 102,400 bytes
    md5 = hashlib.md5(content).hexdigest()

    def setUp(self):
        super().setUp()
        self.path = self.folder / "data" / "file.h5"
        self.part = self.folder / "data" / "file.h5.part"
        self.patch(helper, "PAUSES", (0.01,) * 5)

    def download(self, *servers, size=102_400, md5=None):
        urls = [server.url for server in servers]
        helper.download(urls, self.path, size, md5 or self.md5)

    def failure(self, *servers, **kwargs):
        with self.assertRaises(ProgramError) as caught:
            self.download(*servers, **kwargs)
        return str(caught.exception)

    def refusal(self, function, *arguments):
        """Return how `function` refuses, before anything is fetched, and its lines."""
        with (
            mock.patch.object(requests, "get", side_effect=AssertionError),
            self.assertRaises(ProgramError) as caught,
        ):
            function(*arguments)
        return str(caught.exception)

    def assert_whole(self):
        self.assertEqual(self.path.read_bytes(), self.content)
        self.assertFalse(self.part.exists())

    def test_a_file_is_fetched_once_and_never_again(self):
        with Server(answer(self.content)) as server:
            self.download(server)
            self.download(server)
            self.assert_whole()
            self.assertEqual(server.ranges, [0])

    def test_it_arrives_whole_whatever_the_server_does(self):
        whole, cut = answer(self.content), answer(self.content, sent=40_000)
        busy = answer(b"", resume=False, status=503)
        late = answer(b"", resume=False, status=408)

        def packing(handler, start):
            packed = "deflate" in handler.headers.get("Accept-Encoding", "")
            content = zlib.compress(self.content) if packed else self.content
            answer(content)(handler, start)

        plans = {
            "a cut is resumed": ([cut, whole], [0, 40_000]),
            "two overloads are waited for": ([busy, busy, whole], [0, 0, 0]),
            "too many at once, and too late": (
                [answer(b"", resume=False, status=429), late, whole],
                [0, 0, 0],
            ),
            "a server that may pack does not": ([packing], [0]),
            "a stall is timed out and resumed": (
                [answer(self.content, sent=50_000, stall=1), whole],
                [0, 50_000],
            ),
            "Range ignored: from the start": (
                [cut, answer(self.content, resume=False)],
                [0, 40_000],
            ),
            "a resume elsewhere is not believed": (
                [cut, answer(self.content, at=1), whole],
                [0, 40_000, 40_000],
            ),
            # 20 cuts, where 6 without a gain between them would be the end
            "every byte gained gives new tries": (
                [answer(self.content, sent=5000)],
                list(range(0, 102_400, 5000)),
            ),
        }
        for name, (plan, ranges) in plans.items():
            seconds = 0.3 if "stall" in name else 30
            timeout = mock.patch.object(helper, "READ_TIMEOUT", seconds)
            with self.subTest(name), timeout, Server(*plan) as server:
                self.download(server)
                self.assert_whole()
                self.assertEqual(server.ranges, ranges)
                self.path.unlink()

    def test_a_part_of_what_was_asked_for_is_not_the_end(self):
        starts, plan = [0, 40_000, 80_000], []
        for start in starts:
            part = self.content[start:][:40_000]
            end = start + len(part) - 1
            head = f"Content-Range: bytes {start}-{end}/102400\r\n"
            head += f"Content-Length: {len(part)}\r\n"
            plan.append(raw(head.encode(), part, status="206 Partial Content"))
        for size in 102_400, None:
            with self.subTest(size), Server(*plan) as server:
                self.download(server, size=size)
                self.assert_whole()
                self.assertEqual(server.ranges, starts)
                self.path.unlink()

    def test_pauses_grow_while_nothing_is_gained(self):
        self.patch(helper, "PAUSES", (1, 2, 4))
        with (
            Server(answer(self.content, sent=0)) as server,
            mock.patch.object(helper.time, "sleep") as sleep,
            mock.patch.object(time, "sleep", sleep),
        ):
            self.assertIn("0 bytes read", self.failure(server))
        pauses = [call.args[0] for call in sleep.call_args_list if call.args[0]]
        self.assertEqual(pauses, [1, 2, 4])

    def test_the_next_run_resumes_what_this_one_left(self):
        gone = answer(b"", resume=False, status=404)
        with Server(answer(self.content, sent=70_000), gone) as server:
            self.assertIn("404", self.failure(server))
        self.assertFalse(self.path.exists())
        self.assertEqual(self.part.stat().st_size, 70_000)
        usage = mock.Mock(return_value=mock.Mock(free=40_000))  # for what is left
        with (
            Server(answer(self.content)) as server,
            mock.patch.object(shutil, "disk_usage", usage),
        ):
            self.download(server)
        self.assert_whole()
        self.assertEqual(server.ranges, [70_000])
        self.path.unlink()
        with (
            Server(answer(self.content, sent=70_000), gone) as server,
            self.assertRaises(ProgramError),
        ):
            helper.download([server.url], self.path)  # without a sum, likewise
        self.assertEqual(self.part.stat().st_size, 70_000)

    def test_a_part_that_is_whole_is_renamed_and_one_too_long_starts_over(self):
        self.part.parent.mkdir()
        for more, ranges in (b"", []), (b"more", [102_404, 0]):
            self.part.write_bytes(self.content + more)
            with Server(answer(self.content)) as server:
                self.download(server)
            self.assert_whole()
            self.assertEqual(server.ranges, ranges)
            self.path.unlink()

    def test_a_file_of_another_size_is_refused_before_it_is_fetched(self):
        with Server(answer(b"another file", resume=False)) as server:
            message = self.failure(server)
        self.assertIn("12 bytes long there, not 102,400", message)
        self.assertFalse(self.part.exists())

    def test_a_server_that_states_too_much_is_given_up(self):
        with Server(answer(self.content, stated=200_000)) as server:
            message = self.failure(server, size=200_000)
        self.assertIn("102,400 bytes long there, not 200,000", message)
        self.assertFalse(self.path.exists())

    def test_a_wrong_file_is_removed_and_both_sums_are_named(self):
        wrong = self.content[::-1]
        with Server(answer(wrong)) as server:
            message = self.failure(server)
        self.assertIn(hashlib.md5(wrong).hexdigest(), message)
        self.assertIn(self.md5, message)
        self.assertEqual(self.files(), ["data"])

    def test_a_proxy_may_take_its_time_to_connect(self):
        get = self.patch(requests, "get", mock.Mock(side_effect=requests.get))
        far = mock.Mock(url="http://data.invalid/file")
        with Server(answer(self.content)) as server:
            proxy = {"http_proxy": server.url}
            for source, variables, seconds in (server, {}, 1.5), (far, proxy, 30):
                with mock.patch.dict(os.environ, variables):
                    self.download(source)
                self.assert_whole()
                self.path.unlink()
                self.assertEqual(get.call_args.kwargs["timeout"], (seconds, 30))

    def test_certificates_that_are_not_there_are_no_fault_of_the_disk(self):
        lost = {"REQUESTS_CA_BUNDLE": str(self.folder / "lost.pem")}
        with mock.patch.dict(os.environ, lost):
            message = self.failure(mock.Mock(url="https://127.0.0.1:9/file"))
        self.assertRegex(message, "Could not find a suitable TLS CA .*lost.pem")

    def test_a_url_that_does_not_connect_is_tried_twice_and_left(self):
        nobody = mock.Mock(url="http://127.0.0.1:9/file")
        with (
            mock.patch.object(requests, "get", side_effect=requests.get) as get,
            Server(answer(self.content)) as server,
        ):
            self.download(nobody, server)
        self.assert_whole()
        urls = [call.args[0] for call in get.call_args_list]
        self.assertEqual(urls, [nobody.url, nobody.url, server.url])

    def test_where_the_file_is_not_the_next_url_is_taken_at_once(self):
        plans = {
            "404": answer(b"", resume=False, status=404),
            "web page": answer(b"<html>".ljust(102_400), resume=False),
            "wrong file": answer(self.content[::-1]),
            "other size": answer(self.content[1:]),
            "no header": raw(b"Content-Length: 7\r\nContent-Length: 8\r\n"),
        }
        for name, step in plans.items():
            sums = () if name == "web page" else (102_400, self.md5)
            whole = Server(answer(self.content))
            with self.subTest(name), Server(step) as first, whole as second:
                helper.download([first.url, second.url], self.path, *sums)
                self.assert_whole()
                self.assertEqual((first.ranges, second.ranges), ([0], [0]))
                self.path.unlink()

    def test_without_a_sum_no_part_goes_on_from_another_server(self):
        gone = answer(b"", resume=False, status=404)
        cut = answer(self.content[::-1], sent=40_000)
        with Server(cut, gone) as first, Server(answer(self.content)) as second:
            helper.download([first.url, second.url], self.path)
        self.assert_whole()

    def test_without_network_each_source_has_a_line_and_then_comes_what_to_do(self):
        data, nobody = self.folder / "data", "http://127.0.0.1:9/"
        urls = [nobody + "first", nobody + "second"]
        self.patch(helper, "KITTI_URLS", urls)
        self.patch(helper, "VGG_URLS", urls)
        archive, vgg = data / "data_road.zip", data / helper.VGG_FILE
        page = "https://www.cvlibs.net/datasets/kitti/eval_road.php"
        for function, path, more in (
            (helper.maybe_download_kitti_road, archive, [page, "Download base kit"]),
            (helper.maybe_download_pretrained_vgg, vgg, [urls[0], "--vgg FILE"]),
        ):
            with (
                contextlib.chdir(self.folder),
                self.assertRaises(ProgramError) as caught,
            ):
                function(Path("data"))
            lines = str(caught.exception).splitlines()
            for url, line in zip(urls, lines[1:3]):
                self.assertRegex(line, f"^  {url}: .*refused$")
            advice = "\n".join(lines[3:])
            for part in str(path), "--demo", *more:
                self.assertIn(part, advice)
            self.assertLess(len(lines), 9)

    def test_a_full_disk_is_seen_before_a_byte_is_written(self):
        usage = mock.Mock(return_value=mock.Mock(free=50_000))
        self.patch(shutil, "disk_usage", usage)
        with Server(answer(self.content)) as server:
            self.assertIn("0 MB are free", self.failure(server, server))
        self.assertFalse(self.part.exists())
        self.assertEqual(server.ranges, [0])  # no other source would mend it

    def test_two_programs_fetch_a_file_once(self):
        slow = Server(answer(self.content, stall=0.5))
        with slow as server, ThreadPoolExecutor() as programs:
            list(programs.map(self.download, [server, server]))
        self.assert_whole()
        self.assertEqual(server.ranges, [0])

    def test_a_whole_part_of_unknown_size_is_not_fetched_again(self):
        self.part.parent.mkdir()
        for more, ranges in (b"", [102_400]), (b"more", [102_404, 0]):
            self.part.write_bytes(self.content + more)
            with Server(answer(self.content)) as server:
                helper.download([server.url], self.path)
            self.assert_whole()
            self.assertEqual(server.ranges, ranges)
            self.path.unlink()

    def test_no_header_gives_a_traceback(self):
        moved = {"status": "302 Found"}
        plans = {  # None: it arrives
            "Content-Length: \xb2": (None, {}),  # isdigit(), and no int()
            "Content-Length: -5": (None, {}),
            "Content-Length: " + "9" * 400: ("IncompleteRead", {}),
            "Content-Length: " + "9" * 5000: (None, {}),  # more than int() takes
            "Content-Length: 102400, 102400": (None, {}),
            "Content-Length: 7\r\nContent-Length: 8": ("multiple", {}),
            "Content-Range: bytes \xb2-/*": ("other bytes", {"status": "206 P"}),
            "Content-Range: bytes */\xb2": ("416", {"status": "416 R"}),
            "Content-Type: Text/HTML": ("a web page", {}),
            "Transfer-Encoding: chunked": ("IncompleteRead", {}),
            "no colon": (None, {}),  # urllib3 logs a traceback
            "Location: \xff": ("invalid start byte", moved),
            "Location: http://[::1": ("Invalid IPv6 URL", moved),
            "Location: file:///etc/hostname": ("No connection adapters", moved),
            "X: nothing": ("status 204", {"status": "204 No Content"}),
        }
        for head, (reason, status) in plans.items():
            step = raw(f"{head}\r\n".encode("latin-1"), self.content, **status)
            with (
                self.subTest(head[:50]),
                self.assertNoLogs("urllib3"),
                Server(step) as server,
            ):
                if reason:
                    self.assertIn(reason, self.failure(server))
                    if status == moved or reason == "multiple":  # no use to ask again
                        self.assertEqual(server.ranges, [0])
                else:
                    self.download(server)
                    self.assert_whole()
            self.path.unlink(missing_ok=True)
            self.part.unlink(missing_ok=True)

    def test_no_more_is_taken_than_the_file_may_have(self):
        sent, stated = [], answer(self.content)

        def endless(handler, start):
            raw(b"")(handler, start)
            for _ in range(100):
                sent.append(handler.wfile.write(bytes(10**6)))

        self.patch(helper, "MAX_FETCHED", 50_000)
        for step, size, said in (
            (endless, 102_400, "more than 102,400 bytes come"),
            (endless, None, "more than 50,000 bytes come"),
            (stated, None, "102,400 bytes long there, more than 50,000"),
        ):
            with self.subTest(said), Server(step) as server:
                self.assertIn(said, self.failure(server, size=size))
            self.assertEqual((self.files(), server.ranges), (["data"], [0]))
            self.assertLess(len(sent), 100)  # some more wait in the system's buffers
            sent.clear()

    def test_a_body_without_length_that_ends_early_is_resumed(self):
        early = raw(b"", self.content[:40_000])
        with Server(early, answer(self.content)) as server:
            self.download(server)
        self.assert_whole()
        self.assertEqual(server.ranges, [0, 40_000])

    def test_a_drip_comes_to_an_end(self):
        self.patch(helper, "SLOWEST", 10**12)  # bytes a second: on no machine enough
        drops = [b"."] * 5
        drip = raw(b"Content-Length: 102400\r\n", *drops, pause=0.04)
        for name, step, window, reason in (
            ("in one body", drip, 0.02, "bytes a second"),
            ("a byte a request", answer(self.content, sent=1), 100, "1 bytes read"),
        ):
            plan = [step] * 12 + [answer(self.content)]
            self.patch(helper, "WINDOW", window)
            with self.subTest(name), Server(*plan) as server:
                self.assertIn(reason, self.failure(server))
            self.assertEqual(len(server.ranges), 6)
            self.part.unlink()

    def test_what_a_server_says_does_not_steer_the_terminal(self):
        step = raw(b"", status="404 \x1b[31mred\x9b\x07")
        with Server(step) as server:
            message = self.failure(server)
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            helper.explain(ProgramError(message))
        self.assertIn(r"\x1b[31mred\x9b\x07", output.getvalue())
        self.assertNotIn("\x1b", output.getvalue())
        said = "a\\r\n\\u202eé \\udc80"
        self.assertEqual(helper.printable("a\r\n\u202eé \udc80"), said)

    @unittest.skipUnless(hasattr(os, "RWF_NOWAIT"), "only Linux tells what it caches")
    def test_a_file_that_is_read_ahead_comes_into_the_systems_cache(self):
        path, failed = self.folder / "file", []
        path.write_bytes(bytes(2**24))
        self.patch(threading, "excepthook", failed.append)

        def read_ahead(path):
            before = set(threading.enumerate())
            helper.read_ahead(path)
            for thread in set(threading.enumerate()) - before:
                thread.join()

        def is_cached(place):  # asking brings what follows the place into the cache
            try:
                return os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT)
            except BlockingIOError:
                return False

        with open(path, "rb", buffering=0) as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                if is_cached(2**23):
                    self.skipTest("this file system keeps all of a file")
            except OSError as error:
                self.skipTest(f"this file system does not tell: {error.strerror}")
            read_ahead(path)
            self.assertTrue(is_cached(0))
        read_ahead(self.folder / "missing")
        self.assertEqual(failed, [])

    def test_a_lock_lets_one_in_and_leaves_nothing(self):
        inside, most, path = [], [], self.folder / "data" / "file"

        def program(_):
            for _ in range(20):
                with helper.locked(path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()

        with ThreadPoolExecutor(4) as programs:
            list(programs.map(program, range(4)))
        self.assertEqual((max(most), len(most)), (1, 80))
        self.assertEqual(list(path.parent.iterdir()), [])
        with helper.locked(path):
            with (
                self.assertRaisesRegex(ProgramError, "another program works on"),
                helper.locked(path, wait=False),
            ):
                pass
            shutil.rmtree(path.parent)  # as a run that came to nothing does
        self.assertFalse(path.parent.exists())
        absent = OSError(errno.ENOSYS, "Function not implemented")  # as Lustre may
        with (
            mock.patch.object(helper.fcntl, "flock", side_effect=absent),
            helper.locked(path, wait=False),
        ):
            self.assertTrue(helper.is_locked(path))
        self.assertEqual(list(path.parent.iterdir()), [])
        absent.errno = errno.EIO
        with (
            mock.patch.object(helper.fcntl, "flock", side_effect=absent),
            self.assertRaises(ProgramError),
            helper.locked(self.folder / "file"),
        ):
            pass
        self.patch(helper, "fcntl", None)  # as on Windows
        with helper.locked(path):
            self.assertEqual(list(path.parent.iterdir()), [])

    def test_a_lock_that_was_removed_while_waited_for_is_none(self):
        path, flock = self.folder / "file", helper.fcntl.flock
        calls = iter([True])  # the first one gets the lock of a file that is gone

        def late(lock, how):
            if next(calls, False):
                os.unlink(lock.name)
            flock(lock, how)

        self.patch(helper.fcntl, "flock", late)
        with (
            helper.locked(path),
            self.assertRaisesRegex(ProgramError, "another program"),
            helper.locked(path, wait=False),
        ):
            pass
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_place_that_cannot_be_is_named_before_anything_is_fetched(self):
        kitti, vgg = (
            helper.maybe_download_kitti_road,
            helper.maybe_download_pretrained_vgg,
        )
        file, gone = self.folder / "file", self.folder / "gone"
        file.write_bytes(b"")
        for name in "data_road", "data_road.zip":
            link = self.folder / name
            link.symlink_to(gone)
            message = self.refusal(kitti, self.folder)
            self.assertIn(f"{link} links to {gone}, which is not there", message)
            self.assertTrue(link.is_symlink())
            link.unlink()
        inner = self.folder / "data_road" / "training" / "image_2"
        inner.mkdir(parents=True)
        parent = re.escape(os.path.realpath(self.folder))
        with contextlib.chdir(self.folder / "data_road"):
            message = self.refusal(kitti, Path())
        self.assertRegex(message, f"set itself: name its parent: --data-dir {parent}$")
        new = self.folder / "new" / "data_road"  # where one would be made in the other
        self.assertIn("name its parent", self.refusal(kitti, new))
        other = (self.folder / "data_road").rename(self.folder / "other")
        message = self.refusal(kitti, other)
        self.assertIn("set itself: call it data_road and name its parent", message)
        link = self.folder / "link"
        link.symlink_to(gone)
        for function in kitti, vgg:
            for place, reason in (
                (file, "a file or a broken link, not a folder"),
                (link, "a file or a broken link, not a folder"),
                (file / "data", "Not a directory"),
            ):
                message = self.refusal(function, place)
                self.assertEqual(
                    message, f"{place}: {reason}: name a folder to write to"
                )
            denied = PermissionError(13, "Permission denied")
            with mock.patch.object(helper, "open", create=True, side_effect=denied):
                message = self.refusal(function, self.folder)
            self.assertIn(f"{self.folder}: Permission denied: name", message)

    def archive(self, *names):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for name in names:
                archive.writestr(name, b"content of a file")
        return content.getvalue()

    kitti = (
        "data_road/training/image_2/um_000000.png",
        "data_road/training/gt_image_2/um_road_000000.png",
        "data_road/training/gt_image_2/um_lane_000000.png",
        "data_road/testing/image_2/um_000000.png",
    )

    def test_kitti_is_unpacked_counted_and_its_zip_removed(self):
        killed = self.folder / "data/.part.data_road/data_road/training/image_2"
        killed.mkdir(parents=True)
        (killed / "stale.png").write_bytes(b"left by a run that was killed")
        archive = self.archive(*self.kitti, "../../evil.png", "/tmp/evil.png")
        flushed = []  # to the disk, where a power cut leaves it

        def flush(path):
            flushed.append(
                (path.name, [zip.name for zip in self.folder.rglob("*.zip")])
            )

        self.patch(helper, "flush_file", flush)
        with Server(answer(archive)) as server:
            self.patch(helper, "KITTI_URLS", [server.url])
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                helper.maybe_download_kitti_road(self.folder / "data")
                helper.maybe_download_kitti_road(self.folder / "data")
        self.assertIn("CC BY-NC-SA 3.0", output.getvalue())
        self.assertEqual(len(server.ranges), 1)
        here = [name for name in self.files() if name.endswith(".png")]
        self.assertEqual(here, sorted(f"data/{name}" for name in self.kitti))
        self.assertFalse(list(self.folder.rglob("*evil*")))
        self.assertFalse(list(self.folder.rglob("*.zip")))
        unpacked = [(Path(name).name, ["data_road.zip"]) for name in self.kitti]
        self.assertEqual(sorted(flushed[1:]), sorted(unpacked))  # after the zip itself

    def damaged(self):
        """Return zips that cannot be unpacked, by what is wrong with them."""
        whole = self.archive(*self.kitti)
        flipped = bytearray(whole)
        flipped[flipped.rindex(b"content of")] ^= 1
        entry = b"PK\1\2\24\3\24\0"  # of its directory
        size = whole.index(entry) + 24
        claims = whole[:size] + b"\xff\xff\xff\xfe" + whole[size + 4 :]
        start = whole.index(entry) + 42
        return {
            "its CRC": bytes(flipped),
            "a password": whole.replace(entry + b"\0", entry + b"\1"),
            "an unknown compression": whole.replace(
                entry + b"\0\0\0", entry + b"\0\0c"
            ),
            "an offset behind the end": whole[:start]
            + b"\xff" * 4
            + whole[start + 4 :],
            "more than a disk": claims,
            "no zip": b"no zip",
            "nothing": b"",
            "half of it": whole[: len(whole) // 2],
            "another content": self.archive("other/file.png"),
            "no image": self.archive("data_road/training/image_2/readme.txt"),
            "two roots": self.archive(*(f"{x}/training/image_2/a.png" for x in "ab")),
            "a file as a folder": self.archive(*self.kitti, self.kitti[0] + "/a.png"),
            "too many": self.archive(*self.kitti, *map(str, range(100))),
        }

    def test_a_damaged_zip_leaves_neither_zip_nor_data(self):
        self.patch(helper, "MAX_ENTRIES", 100)
        for name, content in self.damaged().items():
            with self.subTest(name), Server(answer(content, resume=False)) as server:
                self.patch(helper, "KITTI_URLS", [server.url])
                with self.assertRaisesRegex(ProgramError, "damaged.*removed"):
                    helper.maybe_download_kitti_road(self.folder / "data")
            self.assertEqual(self.files(), ["data"])

    def test_a_zip_of_the_user_stays_whatever_it_is(self):
        archive = self.folder / "data_road.zip"
        self.patch(helper, "MAX_ENTRIES", 100)
        with mock.patch.object(helper, "MAX_UNPACKED", 4 * 17 - 1):
            archive.write_bytes(self.archive(*self.kitti))
            message = self.refusal(helper.maybe_download_kitti_road, self.folder)
            self.assertIn("(4 entries of 68 bytes)", message)
        for name, content in self.damaged().items():
            archive.write_bytes(content)
            with self.subTest(name):
                message = self.refusal(helper.maybe_download_kitti_road, self.folder)
                self.assertRegex(message, "not a zip of KITTI Road .*: replace it")
            self.assertEqual(list(self.folder.iterdir()), [archive])
            self.assertEqual(archive.read_bytes(), content)
        mine, same = self.archive(*self.kitti), answer(self.archive(self.kitti[0]))

        def meanwhile(handler, start):
            archive.write_bytes(mine)
            same(handler, start)

        for step in None, meanwhile:
            with self.subTest(step), Server(step) as server:
                self.patch(helper, "KITTI_URLS", [server.url])
                if not step:
                    archive.write_bytes(mine)
                helper.maybe_download_kitti_road(self.folder)
            self.assertEqual(archive.read_bytes(), mine)
            self.assertEqual(len(self.files(self.folder / "data_road")), 9)
            shutil.rmtree(self.folder / "data_road")
            archive.unlink()
            self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_disk_without_room_to_unpack_costs_no_zip(self):
        whole = self.archive(*self.kitti)
        full = OSError(28, "No space left on device")
        usage = mock.Mock(return_value=mock.Mock(free=10))
        archive = self.folder / "data_road.zip"
        for target, name, change, error in (
            (shutil, "disk_usage", usage, ProgramError),
            (zipfile.ZipFile, "extract", mock.Mock(side_effect=full), OSError),
        ):
            fetch = mock.Mock(side_effect=lambda *_, **__: archive.write_bytes(whole))
            with (
                self.subTest(name),
                mock.patch.object(helper, "download", fetch),
                mock.patch.object(target, name, change),
                self.assertRaisesRegex(error, "make room|No space left"),
            ):
                helper.maybe_download_kitti_road(self.folder)
            self.assertEqual(list(self.folder.iterdir()), [archive])
            archive.unlink()

    def test_a_zip_is_unpacked_from_where_its_images_are(self):
        inner = [name.removeprefix("data_road/") for name in self.kitti]
        other = "old/training/image_2/a.png"
        for top, more in (
            ("", [other]),
            ("data_road/", [other, "training/image_2/a.png"]),
            ("KITTI Road 2013/", ["readme.png", "__MACOSX/training/image_2/._um.png"]),
        ):
            archive = self.archive(*(top + name for name in inner), *more)
            (self.folder / "data_road.zip").write_bytes(archive)
            with self.subTest(top):
                helper.maybe_download_kitti_road(self.folder)
                found = self.files(self.folder / "data_road")
                images = [name for name in found if name.endswith(".png")]
                self.assertEqual(images, sorted(inner + (more if not top else [])))
            shutil.rmtree(self.folder / "data_road")

    def test_names_that_lead_elsewhere_and_links_are_left_out(self):
        content = io.BytesIO(self.archive(*self.kitti))
        bad = (
            "data_road/training/../evil.png",
            "data_road//evil.png",
            "data_road/training/image_2/\x1b[31mevil.png",
            f"data_road/evil{'l' * 300}.png",
        )
        with zipfile.ZipFile(content, "a") as archive:
            for name in bad:
                archive.writestr(name, b"evil")
            link = zipfile.ZipInfo("data_road/training/image_2/evil.png")
            link.create_system, link.external_attr = 3, 0o120777 << 16
            archive.writestr(link, b"/etc/passwd")
        (self.folder / "data_road.zip").write_bytes(content.getvalue())
        helper.maybe_download_kitti_road(self.folder)
        here = [name for name in self.files() if name.endswith(".png")]
        self.assertEqual(here, sorted(self.kitti))
        self.assertFalse(list(self.folder.rglob("*evil*")))

    def test_what_is_there_is_used_and_nothing_is_written(self):
        folder = self.folder / "data_road" / "training" / "image_2"
        folder.mkdir(parents=True)
        weights = self.folder / "vgg16_weights_tf_dim_ordering_tf_kernels.h5"
        weights.write_bytes(b"mine")
        before = sorted(self.folder.rglob("*"))
        self.patch(requests, "get", mock.Mock(side_effect=AssertionError))
        helper.maybe_download_kitti_road(self.folder)
        path = helper.maybe_download_pretrained_vgg(self.folder)
        self.assertEqual(path.read_bytes(), b"mine")
        self.assertEqual(sorted(self.folder.rglob("*")), before)


# -------------------------------------------------------------------------- data


def write_sample(folder, name, size=(40, 24), label=(255, 0, 255), mode="RGB"):
    """Write a training image of one colour and its label, of `size` (W, H)."""
    training = folder / "data_road" / "training"
    for part in "image_2", "gt_image_2":
        (training / part).mkdir(parents=True, exist_ok=True)
    number = int(name.rpartition("_")[2])
    Image.new("RGB", size, (number, 60, 90)).convert(mode).save(
        training / "image_2" / f"{name}.png"
    )
    path = training / "gt_image_2" / f"{name.replace('_', '_road_')}.png"
    picture = Image.new("RGB", size, label)
    picture.paste((255, 0, 255 - label[2]), (0, size[1] - 1, *size))  # both classes
    picture.save(path)
    return path


class Data(Case):
    def test_label_colours_mean_what_the_benchmark_means(self):
        colours = {
            (255, 0, 255): 1,  # valid and road
            (255, 0, 0): 0,  # valid, not road
            (0, 0, 0): VOID,
            (0, 0, 255): VOID,  # road outside the valid area
        }
        path = self.folder / "label.png"
        Image.fromarray(np.array([list(colours)], np.uint8)).save(path)
        self.assertEqual(helper.read_label(path).tolist(), [list(colours.values())])

    def test_ids_do_not_blend_when_resized(self):
        label = np.zeros((40, 60), np.uint8)
        label[:, 19:41], label[:, 41:] = VOID, 1
        resized = helper.resize_label(label, (16, 24)).numpy()
        self.assertEqual(set(resized.ravel()), {0, 1, VOID})
        # the columns nearest to the centres 1.25, 3.75, ... of the 24 new ones
        columns = [int(2.5 * (column + 0.5)) for column in range(24)]
        np.testing.assert_array_equal(resized, label[:16][:, columns])

    def test_images_are_resized_as_pillow_does(self):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (75, 248, 3), np.uint8)
        ours = helper.resize_image(image, (32, 96)).numpy()
        theirs = Image.fromarray(image).resize((96, 32), Image.Resampling.BILINEAR)
        difference = ours.astype(int) - np.asarray(theirs)
        self.assertLessEqual(np.abs(difference).max(), 1)
        self.assertLess(abs(difference.mean()), 0.1)  # rounded, not cut off
        self.assertEqual(ours.dtype, np.uint8)

    def test_names_that_would_be_counted_twice_are_refused(self):
        training = self.folder / "data_road" / "training"
        for folder in "image_2", "gt_image_2":
            (training / folder).mkdir(parents=True)
        pixels = np.zeros((4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(training / "gt_image_2" / "a.png")
        Image.fromarray(pixels).save(training / "gt_image_2" / "a.k.png")
        for name in "a.jpg", "a.k.png", "a.png":  # so they are in name order
            Image.fromarray(pixels).save(training / "image_2" / name)
        with self.assertRaisesRegex(ProgramError, "a.jpg and .*a.png: rename one"):
            helper.find_images(self.folder)
        Image.fromarray(pixels).save(training / "image_2" / "urban_1.png")
        Image.fromarray(pixels).save(training / "gt_image_2" / "urban_road_1.png")
        with self.assertRaisesRegex(ProgramError, "urban_1.png: urban means all"):
            helper.find_images(self.folder)

    def test_the_holdout_of_the_full_set_is_val3(self):
        counts = {"um": 95, "umm": 96, "uu": 98}
        for kind, count in counts.items():
            for number in range(count):
                write_sample(self.folder, f"{kind}_{number:06}", (1, 1))
        samples, _ = find_images(self.folder)
        training, holdout = helper.split_holdout(samples, 0.1667)
        expected = [
            f"{kind}_{number:06}.png"
            for kind, count in counts.items()
            for number in range(count - 16, count)
        ]
        self.assertEqual([image.name for image, _ in holdout], expected)
        self.assertEqual(sorted(training + holdout), sorted(samples))
        self.assertEqual(helper.split_holdout(samples, 0)[0], samples)

    def test_an_image_is_paired_with_its_road_label_only(self):
        road = write_sample(self.folder, "um_000003")
        shutil.copy(road, road.with_name("um_lane_000003.png"))
        hidden = road.parent.parent / "image_2" / "._um_000003.png"
        hidden.write_bytes(b"left by a Mac")
        image = self.folder / "data_road/training/image_2/um_000003.png"
        (image.parent / "folder.png").mkdir()
        upper = write_sample(self.folder, "um_000004")
        other = image.with_name("um_000004.PNG")
        image.with_name("um_000004.png").rename(other)
        samples, _ = find_images(self.folder)
        self.assertEqual(samples, [(image, road), (other, upper)])

    def test_a_missing_label_is_named(self):
        road = write_sample(self.folder, "um_000003")
        road.rename(road.with_name("um_lane_000003.png"))
        with self.assertRaises(ProgramError) as caught:
            find_images(self.folder)
        self.assertIn(str(road), str(caught.exception))
        self.assertIn("um_lane_000003.png is another task", str(caught.exception))

    def test_a_data_set_without_images_is_refused(self):
        with self.assertRaisesRegex(ProgramError, "no images in .*image_2"):
            find_images(self.folder)

    def test_grey_and_transparent_images_become_rgb(self):
        for mode in "L", "LA", "RGBA", "P", "1":
            path = self.folder / "image.png"
            Image.new("L", (5, 4), 200).convert(mode).save(path)
            self.assertEqual(helper.read_image(path).shape, (4, 5, 3), mode)
        Image.fromarray(np.full((4, 5), 200 * 257 + 99, np.uint16)).save(path)
        self.assertEqual(np.unique(helper.read_image(path)).tolist(), [200])

    def test_a_file_that_is_no_image_is_named(self):
        path = self.folder / "image.png"
        Image.effect_noise((90, 90), 50).save(path)
        whole = path.read_bytes()
        for content in b"", b"<html>", whole[: len(whole) // 2], whole[:20]:
            path.write_bytes(content)
            with self.assertRaises(ProgramError) as caught:
                helper.read_image(path)
            self.assertIn(str(path), str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))

    def test_a_damaged_image_is_named_and_never_read_as_another(self):
        path = self.folder / "image.png"
        Image.effect_noise((90, 90), 50).save(path)
        whole = path.read_bytes()
        path.write_bytes(
            whole[:200] + bytes(255 - c for c in whole[200:400]) + whole[400:]
        )
        with self.assertRaisesRegex(ProgramError, "not a readable image"):
            helper.read_image(path)

    def test_what_is_no_regular_file_is_named_and_not_waited_for(self):
        road = write_sample(self.folder, "um_000003")
        training = road.parent.parent
        (training / "calib").mkdir(exist_ok=True)
        calibration = training / "calib" / "um_000003.txt"
        os.mkfifo(calibration)
        waits = AssertionError("waits for a writer")
        with (
            mock.patch.object(Path, "read_text", side_effect=waits),
            self.assertRaisesRegex(ProgramError, "not a regular file"),
        ):
            helper.read_homography(training / "image_2" / "um_000003.png")
        road.unlink()
        os.mkfifo(road)
        with self.assertRaisesRegex(ProgramError, "has no label"):
            find_images(self.folder)

    def test_a_label_of_another_size_is_refused(self):
        road = write_sample(self.folder, "um_000003")
        Image.new("RGB", (24, 40)).save(road)
        samples, _ = find_images(self.folder)
        with self.assertRaisesRegex(ProgramError, "is 24x40, its image 40x24"):
            get_batches(samples, 1)

    def samples(self, count):
        for number in range(count):
            write_sample(
                self.folder, f"um_{number:06}", label=(255, 0, 255 * (number % 2))
            )
        return find_images(self.folder)[0]

    def test_the_holdout_comes_whole_in_order_and_as_it_is(self):
        parts = zip(*get_batches(self.samples(7), 3))
        images, labels, weights = (np.concatenate(part) for part in parts)
        self.assertEqual(len(images), 9)
        self.assertEqual(images[:7, 0, 0, 0].tolist(), [*range(7)])
        self.assertTrue((labels[:7] != VOID).all() and (labels[7:] == VOID).all())
        self.assertTrue((weights[:7] > 0).all() and (weights[7:] == 0).all())

    def test_an_epoch_takes_no_sample_twice_and_drops_the_rest(self):
        order = [helper.batch_rows(step, 7, 3, 0).numpy() for step in range(4)]
        first, second = np.concatenate(order[:2]), np.concatenate(order[2:])
        for epoch in first, second:
            self.assertEqual(len(set(epoch)), 6)
        self.assertNotEqual(first.tolist(), second.tolist())
        other = np.concatenate([helper.batch_rows(step, 7, 3, 1) for step in range(2)])
        self.assertNotEqual(first.tolist(), other.tolist())

    def test_a_batch_is_a_function_of_its_step(self):
        one = self.samples(1)
        (first,), (other,) = (get_batches(one, 1, range(1), seed=s) for s in (0, 1))
        self.assertFalse(np.array_equal(first[0], other[0]))  # jitter, of one image
        one_image = get_batches(one, 1, range(6))
        self.assertEqual(len({images.numpy().tobytes() for images, *_ in one_image}), 6)
        samples = self.samples(7)
        through = list(get_batches(samples, 3, range(6)))
        later = get_batches(samples, 3, range(4, 6))
        for step, batch in zip(range(4, 6), later, strict=True):
            for ours, theirs in zip(batch, through[step]):
                np.testing.assert_array_equal(ours, theirs)

    def test_batch_names_are_those_of_the_batch(self):
        samples = self.samples(7)
        ((_, labels, _),) = get_batches(samples, 3, range(5, 6))
        odd = [int(name[3:9]) % 2 for name in batch_names(samples, 3, 5)]
        self.assertEqual(labels[:, 0, 0].numpy().tolist(), odd)

    def test_a_flip_takes_the_label_along(self):
        images = np.zeros((40, 8, 16, 3), np.uint8)
        images[:, :, :4] = 200  # bright where the label is road
        labels = (images[..., 0] > 0).astype(np.uint8)
        draws = np.random.default_rng(0).uniform(size=(3, 40)).astype(np.float32)
        images, labels = helper.augment(images, labels, draws)
        bright = images.numpy()[..., 0] > 100
        np.testing.assert_array_equal(bright, labels.numpy() == 1)
        flipped = labels.numpy()[:, 0, 0] == 0
        np.testing.assert_array_equal(flipped, draws[0] < 0.5)

    def test_jitter_changes_brightness_and_contrast_of_each_image(self):
        images = np.tile(np.uint8([[[100], [150]]]), (40, 4, 1, 3))
        labels = np.zeros((40, 4, 2), np.uint8)
        draws = np.random.default_rng(0).uniform(size=(3, 40)).astype(np.float32)
        changed = helper.augment(images, labels, draws)[0].numpy().astype(float)
        means = changed.mean((1, 2, 3))
        contrasts = np.ptp(changed, axis=(1, 2, 3)) / 50
        colour = np.tile(np.uint8([90, 120, 150]), (40, 4, 2, 1))
        colour = helper.augment(colour, labels, draws)[0].numpy().astype(float)
        spread = np.ptp(colour, axis=(1, 2, 3)) / 60
        np.testing.assert_allclose(spread, 0.8 + 0.4 * draws[1], atol=0.03)
        _, contrast, brightness = draws
        np.testing.assert_allclose(means, 100 + 50 * brightness, atol=1)  # 125 +- 25
        np.testing.assert_allclose(contrasts, 0.8 + 0.4 * contrast, atol=0.03)

    def test_weights_spread_the_loss_over_the_valid_pixels(self):
        road = write_sample(self.folder, "um_000000", (64, 32))
        label = np.zeros((32, 64, 3), np.uint8)
        label[:, :16, 0] = 255  # a quarter is valid
        Image.fromarray(label).save(road)
        write_sample(self.folder, "um_000001", (64, 32))
        samples, _ = find_images(self.folder)
        ((_, labels, weights),) = get_batches(samples, 2)
        valid = (labels.numpy() != VOID).sum((1, 2))
        self.assertEqual(valid.tolist(), [512, 2048])
        np.testing.assert_allclose(weights, [1 / 2560] * 2)

    def test_replicas_share_a_batch_and_what_is_missing_is_void(self):
        samples = self.samples(7)
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        for steps in None, range(3, 5):
            whole_ones = get_batches(samples, 5, steps, seed=5)
            shared_ones = get_batches(samples, 5, steps, seed=5, strategy=two)
            for whole, parts in zip(whole_ones, shared_ones, strict=True):
                parts = map(two.experimental_local_results, parts)
                images, labels, weights = (tf.concat(part, 0).numpy() for part in parts)
                self.assertEqual(len(images), 6)
                for ours, theirs in zip((images, labels, weights), whole):
                    np.testing.assert_array_equal(ours[:5], theirs)
                self.assertTrue((labels[5] == VOID).all() and weights[5] == 0)

    def a_gpu(self):
        """Have the second of this machine's devices be a GPU; return it."""
        seen = tf.config.list_logical_devices
        gpu = seen("CPU")[1]
        self.patch(
            tf.config,
            "list_logical_devices",
            lambda kind=None: [gpu] if kind == "GPU" else seen(kind),
        )
        return gpu

    def test_batches_wait_on_the_gpu_that_computes(self):
        samples = self.samples(4)

        def batches():
            return [*get_batches(samples, 2, range(1, 4)), *get_batches(samples, 3)]

        expected, gpu = batches(), self.a_gpu()
        for ours, theirs in zip(batches(), expected, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                self.assertTrue(x.device.endswith(gpu.name), x.device)
                self.assertFalse(y.device.endswith(gpu.name))
                np.testing.assert_array_equal(x, y)

    def test_no_thread_is_left_that_training_would_wait_for_at_its_end(self):
        tasks = Path("/proc/self/task")
        if not tasks.exists():
            self.skipTest("only Linux tells the threads of a process")
        get_batches_fn = helper.gen_batch_function(self.samples(4), (32, 64))
        gc.collect()  # what other tests left ends before the counting, not in it
        alive = type(self).alive = []  # for good: their end may take a minute

        def threads():
            """Return how many threads two data sets have."""
            before = len([*tasks.iterdir()])
            for _ in range(2):
                alive.append(get_batches_fn(2).from_step(0))
                next(alive[-1])
            return len([*tasks.iterdir()]) - before

        untold = mock.patch.object(
            tf.data.Dataset, "with_options", lambda self, _: self
        )
        for pipelines in 1, 2:
            if pipelines == 2:
                self.a_gpu()  # which has one of its own
            threads()  # brings some that stay
            ours = threads()
            with untold:
                self.assertEqual(threads(), ours + 2 * pipelines)
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        device = helper.Device(strategy=two)
        get_batches_fn = helper.gen_batch_function(self.samples(4), (32, 64), 0, device)
        batches = weakref.ref(get_batches_fn(2).from_step(0))
        self.assertIsNotNone(batches())  # until the program's end

    def test_a_set_too_large_for_memory_is_refused_before_decoding(self):
        samples = self.samples(7)
        self.patch(helper, "read_image", None)
        self.patch(helper, "free_for_tensors", lambda: 4 * 7 * 32 * 64 - 1)
        said = "7 images of 32x64 take 0 MB of memory and 0 MB are free: lower --image"
        with self.assertRaisesRegex(ProgramError, said):
            get_batches(samples, 1)

    def test_the_drawn_set_has_kittis_layout_and_is_drawn_once(self):
        draw(self.folder, 9, 3)
        samples, tests = find_images(self.folder)
        self.assertEqual((len(samples), len(tests)), (9, 3))
        kinds = [image.stem[:-7] for image, _ in samples]
        self.assertEqual(kinds, ["um"] * 3 + ["umm"] * 3 + ["uu"] * 3)
        sizes, ids = set(), set()
        for image, label in samples:
            sizes.add(helper.read_image(image).shape)
            ids |= set(helper.read_label(label).ravel())
            calibration = image.parent.parent / "calib" / f"{image.stem}.txt"
            self.assertIn("Tr_cam_to_road: ", calibration.read_text())
        self.assertGreater(len(sizes), 1)
        self.assertEqual(ids, {0, 1, VOID})
        self.assertTrue(list(samples[0][1].parent.glob("um_lane_*.png")))
        skies = {helper.read_image(image)[:20].mean().round(1) for image, _ in samples}
        self.assertEqual(len(skies), 9)
        samples[0][0].write_bytes(b"changed")
        draw(self.folder)
        self.assertEqual(samples[0][0].read_bytes(), b"changed")

    def test_a_drawing_that_fails_leaves_nothing(self):
        self.patch(helper, "draw_scene", mock.Mock(side_effect=KeyboardInterrupt))
        with self.assertRaises(KeyboardInterrupt):
            draw(self.folder, 3, 3)
        self.assertFalse(list(self.folder.rglob("*part*")))
        self.assertEqual(self.files(), [])

    def test_the_drawn_road_lies_on_the_calibrated_plane(self):
        _, road, _ = helper.draw_scene("uu", np.random.default_rng(3))
        label = np.asarray(road)[..., 2] > 0
        widths = []
        for z in 8, 16, 32:  # metres ahead
            row = label[round(721.5377 * 1.65 / z + 172.854)]
            widths.append(row.sum() * z / 721.5377)
        self.assertTrue(4.4 < min(widths) and max(widths) < 6.4)
        self.assertLess(np.ptp(widths), 0.15)


class Labels(Case):
    def test_another_colour_is_refused_with_what_the_colours_mean(self):
        path = self.folder / "um_road_000000.png"
        known = (255, 0, 255), (255, 0, 0), (0, 0, 0), (0, 0, 255)
        others = (255, 255, 255), (0, 0, 1), (254, 0, 0), (255, 1, 255), (0, 255, 0)
        for colour in known + others:
            label = Image.new("RGB", (8, 8), (255, 0, 0))
            label.putpixel((3, 5), colour)
            label.save(path)
            if colour in known:
                self.assertEqual(helper.read_label(path).shape, (8, 8))
                continue
            said = rf"um_road_000000.png: colour {re.escape(str(colour))} .* is road"
            with self.assertRaisesRegex(ProgramError, said):
                helper.read_label(path)

    def test_a_set_without_background_or_road_is_refused(self):
        only = {"road": (255, 0, 0), "background": (255, 0, 255)}
        for missing, colour in only.items():
            folder = self.folder / missing
            for number in range(2):
                path = write_sample(folder, f"um_{number:06}", label=colour)
                Image.new("RGB", (40, 24), colour).save(path)  # all of it
            samples = helper.find_images(folder, 0).training
            with self.assertRaisesRegex(ProgramError, f"no {missing} in the labels"):
                helper.gen_batch_function(samples, (32, 64))
            predictor = predictor_of(small_model()[0], (32, 64))
            with self.assertRaisesRegex(ProgramError, f"no {missing} in the labels"):
                helper.score_holdout(self.folder, predictor, samples)


# ----------------------------------------------------------------------- network


def write_vgg_weights(path, model):
    """Write `model`'s weights in the layout of keras-applications' HDF5 files."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}_W_1:0", f"{layer.name}_b_1:0"][: len(layer.weights)]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.weights):
                group[name] = weight.numpy()


def small_vgg(vgg_path, keep_prob):
    """Stand in for load_vgg: the same strides, 8 channels, a thousandth of the size."""
    x = image_input = keras.Input((None, None, 3), dtype="uint8")
    x = keras.ops.cast(x, "float32") / 64 - 2
    pools = []
    for stride in 8, 2, 2:
        x = keras.layers.Conv2D(8, stride + 1, stride, "same", activation="relu")(x)
        pools.append(x)
    pools[-1] = keras.layers.Dropout(1 - keep_prob)(x)
    return image_input, *pools


def small_model():
    """Return FCN-8s on the small encoder, and the encoder's variables."""
    image_input, *pools = small_vgg("random", 0.5)
    model = keras.Model(image_input, main.layers(*pools, 2))
    return model, keras.Model(image_input, pools).trainable_variables


def undrawn():
    """Return a patch with which Keras's own kernels begin as zeros, in no time."""
    return mock.patch.object(
        keras.initializers.GlorotUniform,
        "__call__",
        lambda self, shape, dtype=None: tf.zeros(shape, dtype),
    )


def gradients_of(layer, x):
    """Return those of the sum of the layer's squared outputs, to x and its weights."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x) ** 2)
    return tape.gradient(y, [x, *layer.trainable_variables])


def narrow():
    """Return a patch with which fc6 and fc7 have 64 channels in place of 4096."""
    whole = main.FullyConnected
    return mock.patch.object(
        main, "FullyConnected", lambda filters, *rest, **how: whole(64, *rest, **how)
    )


class LoadVgg(Case):
    @classmethod
    def setUpClass(cls):
        """Write one full-size weight file; keep what the original makes of an image."""
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.weights = Path(folder.name) / "vgg16.h5"
        keras.utils.set_random_seed(0)
        original = keras.applications.VGG16(weights=None)
        for layer in original.layers:
            if layer.weights:
                layer.bias.assign(keras.random.normal(layer.bias.shape, 0.5))
        write_vgg_weights(cls.weights, original)
        cls.image = np.random.default_rng(0).integers(
            0, 256, (1, 224, 224, 3), np.uint8
        )
        x = keras.applications.vgg16.preprocess_input(cls.image.astype(np.float32))
        names = "block3_pool", "block4_pool", "fc2"
        outputs = [original.get_layer(name).output for name in names]
        cls.expected = [y.numpy() for y in keras.Model(original.input, outputs)(x)]
        del original
        build, cls.built = keras.applications.VGG16, []

        def watched(*args, **kwargs):
            model = build(*args, **kwargs)
            cls.built.append(weakref.ref(model))
            return model

        gc.disable()  # a collection that comes by itself, some day, is not enough
        try:
            with undrawn(), mock.patch.object(keras.applications, "VGG16", watched):
                image_input, *pools = main.load_vgg(cls.weights, 0.8)
            models = [model for each in cls.built if (model := each())]
            cls.left = [len(model.weights) for model in models]
        finally:
            gc.enable()
        cls.model = keras.Model(image_input, pools)

    @classmethod
    def tearDownClass(cls):
        del cls.model

    def test_it_equals_keras_vgg16_on_the_same_weight_file(self):
        pool3, pool4, fc7 = (y.numpy() for y in self.model(self.image))
        centre = fc7[:, 3, 3]  # where fc6 sees all of 7x7 and no padding
        for ours, theirs in zip((pool3, pool4, centre), self.expected):
            error = np.abs(ours - theirs).max() / np.abs(theirs).max()
            self.assertLess(error, 1e-4)
            self.assertGreater(theirs.std(), 0)

    def test_the_file_that_was_read_does_not_stay_in_memory(self):
        self.assertEqual(len(self.built), 2)
        self.assertEqual([count for count in self.left if count > 26], [])

    def test_outputs_have_the_shapes_the_decoder_expects(self):
        pool3, pool4, fc7 = self.model(np.zeros((2, 64, 96, 3), np.uint8))
        self.assertEqual(pool3.shape, (2, 8, 12, 256))
        self.assertEqual(pool4.shape, (2, 4, 6, 512))
        self.assertEqual(fc7.shape, (2, 2, 3, 4096))
        self.assertEqual(self.model.count_params(), 134_260_544)

    def test_dropout_keeps_its_share_of_fc6_and_fc7_in_training_only(self):
        image = self.image[:, :32, :32]
        fc7 = [self.model(image, training=flag)[2].numpy() for flag in (0, 1, 1)]
        self.assertFalse(np.array_equal(fc7[1], fc7[2]))
        np.testing.assert_array_equal(fc7[0], self.model(image)[2])
        dropouts = [y for y in self.model.layers if isinstance(y, keras.layers.Dropout)]
        self.assertEqual([round(y.rate, 6) for y in dropouts], [0.2, 0.2])

    def test_where_weights_follow_no_others_are_drawn(self):
        self.patch(keras.initializers, "VarianceScaling", None)
        image_input, *_, fc7 = main.load_vgg(None, 0.8)
        self.assertEqual(
            keras.Model(image_input, fc7).count_params(), self.model.count_params()
        )

    def test_a_product_is_the_convolution(self):
        for side, height in (7, 5), (7, 2), (7, 1), (1, 5):
            x = tf.random.normal((2, height, 9, 6), seed=0)
            ours = main.FullyConnected(4, side, padding="same", activation="relu")
            theirs = keras.layers.Conv2D(4, side, padding="same", activation="relu")
            for layer in ours, theirs:
                layer.build(x.shape)
            ours.bias.assign([1, 2, 0, -1])
            theirs.set_weights(ours.get_weights())
            np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)
            found, expected = gradients_of(ours, x), gradients_of(theirs, x)
            for values in zip(found, expected, strict=True):
                np.testing.assert_allclose(*values, atol=1e-4)
            with mock.patch.object(tf.config, "list_physical_devices"):  # as on a GPU
                np.testing.assert_array_equal(ours(x), theirs(x))

    def test_random_weights_bring_fc7_to_order_1(self):
        keras.utils.set_random_seed(0)
        with narrow():  # order 1 comes from the fan-in, which stays
            image_input, *pools = main.load_vgg("random", 0.5)
        encoder = keras.Model(image_input, pools[2])
        both = [encoder.get_layer(name).output for name in ("fc1", "fc2")]
        for y in keras.Model(image_input, both)(self.image):
            self.assertTrue(0.3 < y.numpy().std() < 3)
        kernel = encoder.get_layer("block3_conv2").kernel
        self.assertAlmostEqual(float(np.std(kernel)), (2 / 9 / 256) ** 0.5, delta=1e-3)

    def test_a_file_that_does_not_fit_is_named(self):
        whole = self.weights.open("rb").read(1 << 20)
        path = self.folder / "vgg.h5"
        with undrawn():
            notop = keras.applications.VGG16(weights=None, include_top=False)
        contents = {
            "HTML": lambda: path.write_bytes(b"<html>log in</html>"),
            "truncated": lambda: path.write_bytes(whole),
            "no fc layers": lambda: write_vgg_weights(path, notop),
        }
        for name, write in contents.items():
            with self.subTest(name), undrawn(), narrow():
                write()
                with self.assertRaises(ProgramError) as caught:
                    main.load_vgg(path, 0.5)
                self.assertIn(f"{path}: not VGG-16 weights", str(caught.exception))
                self.assertNotIn("\n", str(caught.exception))

        def exchange_bias(value):
            with h5py.File(self.weights, "r+") as file:
                bias = file["fc2/fc2_b_1:0"]
                before, bias[0] = bias[0], value
            return before

        self.addCleanup(exchange_bias, exchange_bias(np.nan))
        with undrawn(), self.assertRaisesRegex(ProgramError, "fc2.* is not finite"):
            main.load_vgg(self.weights, 0.5)
        no_fault = helper.blaming(path, "VGG-16 weights", "name another")
        with self.assertRaises(MemoryError), no_fault:
            raise MemoryError


class Layers(Case):
    def model(self, **kwargs):
        shapes = (None, None, 256), (None, None, 512), (None, None, 4096)
        pools = [keras.Input(shape) for shape in shapes]
        return keras.Model(pools, main.layers(*pools, 2, **kwargs))

    def pools(self):
        rng = np.random.default_rng(0)
        shapes = (1, 8, 12, 256), (1, 4, 6, 512), (1, 2, 3, 4096)
        return [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def test_it_has_the_parameters_worked_out_by_hand(self):
        scores = 4096 * 2 + 2 + 512 * 2 + 2 + 256 * 2 + 2
        upsampling = 4 * 4 * 2 * 2 + 4 * 4 * 2 * 2 + 16 * 16 * 2 * 2
        self.assertEqual(self.model().count_params(), scores + upsampling)

    def test_upsampling_starts_bilinear(self):
        model = self.model()
        x = np.random.default_rng(0).normal(size=(1, 6, 7, 2)).astype(np.float32)
        for name, factor in ("fc7", 2), ("pool4", 2), ("pool3", 8):
            ours = model.get_layer(f"upscore_{name}")(x).numpy()
            size = 6 * factor, 7 * factor
            theirs = tf.image.resize(x, size).numpy()
            inside = slice(factor, -factor)  # the border sees zeros, not its neighbour
            np.testing.assert_allclose(
                ours[:, inside, inside], theirs[:, inside, inside], atol=1e-5
            )

    def test_every_skip_reaches_the_logits_at_its_scale(self):
        model, pools = self.model(), self.pools()
        logits = model(pools).numpy()
        self.assertEqual(logits.shape, (1, 64, 96, 2))
        scales = {"pool3": 0.01, "pool4": 0.1, "fc7": 1}
        for index, name in enumerate(scales):
            changed = list(pools)
            changed[index] = pools[index] + 1
            kernel = model.get_layer(f"score_{name}").kernel.numpy()
            expected = kernel.sum((0, 1, 2)) * scales[name]  # bilinear keeps constants
            change = (model(changed).numpy() - logits)[0, 32, 48]
            np.testing.assert_allclose(change, expected, rtol=2e-2, atol=1e-6)

    def test_every_kernel_is_in_the_l2_term(self):
        model = self.model(l2=0.01)
        kernels = [w.numpy() for w in model.weights if "kernel" in w.path]
        self.assertEqual(len(kernels), 6)
        expected = 0.01 * sum((kernel**2).sum() for kernel in kernels)
        self.assertAlmostEqual(float(sum(model.losses)), expected, places=5)


# ---------------------------------------------------------------------- training


def small_batch(count=2, seed=0):
    """Return images, labels with void, and the weights of a batch at 32x64."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 64, 3), np.uint8)
    labels = rng.choice(np.uint8([0, 1, VOID]), (count, 32, 64))
    labels[:, :8] = VOID
    weights = np.full(count, 1 / (labels != VOID).sum(), np.float32)
    return images, labels, weights


def cross_entropy_by_hand(logits, labels):
    """Return the mean cross entropy over valid pixels, pixel by pixel."""
    terms = []
    for pixel, label in zip(logits.reshape(-1, 2).astype(float), labels.ravel()):
        if label != VOID:
            terms.append(np.log(np.exp(pixel).sum()) - pixel[label])
    return np.mean(terms)


class Optimize(Case):
    def setUp(self):
        super().setUp()
        keras.utils.set_random_seed(0)
        self.model, self.vgg = small_model()

    def optimize(self, **how):
        return optimize(self.model, **how)

    @classmethod
    @functools.cache
    def plain_steps(cls):
        """Return the five steps of a plain program."""
        return cls().five_steps()

    def five_steps(self, **how):
        """Return what five steps return, and the weights after them."""
        keras.utils.set_random_seed(0)
        self.model, self.vgg = small_model()
        next(y for y in self.model.layers if "dropout" in y.name).rate = 0
        step, _ = self.optimize(rate=0.01, vgg_rate=0.01, **how)
        values = [step(*small_batch(seed=seed)).numpy() for seed in range(5)]
        return values, [w.numpy() for w in self.model.trainable_variables]

    def test_building_it_leaves_the_weights_as_they_were_loaded(self):
        before = [w.numpy() for w in self.model.trainable_variables]
        self.optimize()
        for ours, theirs in zip(self.model.trainable_variables, before):
            np.testing.assert_array_equal(ours, theirs)

    def test_a_compiled_step_is_the_plain_one(self):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            compiled = self.five_steps(xla=True)[0]
        self.assertEqual(said.getvalue(), "")  # it did not fall back
        np.testing.assert_allclose(compiled, self.plain_steps()[0], rtol=1e-4)

    def test_what_xla_cannot_compile_goes_on_without_it(self):
        plain = self.plain_steps()
        entropy = main.cross_entropy

        def not_for_xla(logits, labels):
            return entropy(
                logits,
                tf.io.decode_raw(tf.io.encode_base64("AAAA"), tf.uint8)[0] * 0 + labels,
            )

        self.patch(main, "cross_entropy", not_for_xla)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            fallen = self.five_steps(xla=True)
        np.testing.assert_array_equal(fallen[0], plain[0])
        self.assertRegex(said.getvalue(), r"^XLA failed \(.+\): going on without it\n$")
        step, _ = self.optimize(xla=True)
        full = tf.errors.ResourceExhaustedError(None, None, "OOM")
        step.compiled = mock.Mock(side_effect=full)  # without it, it takes no less
        with self.assertRaises(tf.errors.ResourceExhaustedError):
            step(*small_batch())

    def test_a_scaled_step_is_an_unscaled_one(self):
        plain, scaled = self.plain_steps(), self.five_steps(precision="float16")
        np.testing.assert_array_equal(scaled[0], plain[0])
        for ours, theirs in zip(scaled[1], plain[1]):
            np.testing.assert_array_equal(ours, theirs)

    def test_a_step_that_overflows_is_left_out_and_the_loss_scale_is_resumed(self):
        step, state = self.optimize(precision="float16")
        before = [w.numpy() for w in self.model.trainable_variables]
        scale = float(state.optimizer.dynamic_scale)
        images, labels, weights = small_batch()
        loss, _, norm = step(images, labels, weights * np.float32(1e37)).numpy()
        self.assertTrue(np.isfinite(loss))
        self.assertEqual((norm, int(state.step)), (0, 1))
        self.assertEqual(float(state.optimizer.dynamic_scale), scale / 2)
        for ours, theirs in zip(self.model.trainable_variables, before):
            np.testing.assert_array_equal(ours, theirs)
        path = state.write(str(self.folder / "ckpt"))
        expected = step(images, labels, weights).numpy()
        self.assertGreater(expected[2], 0)
        self.model, _ = small_model()
        step, state = self.optimize(precision="float16")
        state.read(path).assert_consumed()
        self.assertEqual(float(state.optimizer.dynamic_scale), scale / 2)
        np.testing.assert_array_equal(step(images, labels, weights), expected)
        plain, _ = self.optimize()  # where it is no matter of the scale, and ends it
        loss, _, norm = plain(images, labels, weights * np.float32(1e37)).numpy()
        self.assertEqual((np.isfinite(loss), np.isfinite(norm)), (True, False))

    def test_in_half_precision_only_the_encoder_computes(self):
        plain = self.plain_steps()[0]
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        for precision in "bfloat16", "float16":
            keras.config.set_dtype_policy(f"mixed_{precision}")
            half = self.five_steps(precision=precision)[0]
            np.testing.assert_allclose(half, plain, rtol=0.05)
            self.assertFalse(np.array_equal(half, plain))
            pools = [y for y in self.model.layers if y.name.startswith("conv2d")]
            self.assertEqual({y.output.dtype for y in pools}, {precision})
            scores = [y for y in self.model.layers if "score" in y.name]
            self.assertEqual({y.output.dtype for y in scores}, {"float32"})
            skips = [y.input.dtype for y in scores if "pool" in y.name]  # scaled before
            self.assertEqual(set(skips), {"float32"})
            _, state = self.optimize()
            kinds = {v.dtype for v in [*self.model.weights, *state.optimizer.variables]}
            self.assertLessEqual(kinds, {"float32", "int64", "int32", "uint32"})

    def test_the_batch_that_fits_is_what_the_layers_put_out(self):
        outputs = keras.Model(self.model.input, [y.output for y in self.model.layers])
        each = sum(
            x.numpy().nbytes for x in outputs(np.zeros((1, 32, 96, 3), np.uint8))
        )
        fixed = 8 * self.model.count_params()
        for memory, fits in (
            (fixed + 15.1 * each, 10),
            (fixed + 1.4 * each, 0),
            (0, 0),
        ):
            self.patch(helper, "free_for_tensors", lambda memory=memory: memory)
            self.assertEqual(helper.largest_batch(self.model, (32, 96), 1), fits)
            self.assertEqual(helper.largest_batch(self.model, (32, 96), 4), 4 * fits)
        held = {"peak": fixed + 15.1 * each + 10**6, "current": 10**6}  # of a GPU
        memory = mock.Mock(return_value=held)
        self.patch(tf.config.experimental, "get_memory_info", memory)
        self.patch(tf.config, "list_logical_devices", lambda kind: [kind])
        self.assertEqual(helper.largest_batch(self.model, (32, 96), 1), 10)
        self.assertEqual(helper.peak_memory(), held["peak"])

    def test_the_loss_is_the_mean_over_valid_pixels_and_l2_is_apart(self):
        dropout = next(y for y in self.model.layers if "dropout" in y.name)
        dropout.rate = 0
        images, labels, weights = small_batch()
        logits = self.model(images).numpy()
        l2 = float(sum(self.model.losses))
        loss, ours, norm = self.optimize()[0](images, labels, weights).numpy()
        self.assertAlmostEqual(loss, cross_entropy_by_hand(logits, labels), places=5)
        self.assertAlmostEqual(ours, l2, places=6)
        self.assertGreater(norm, 0)

    def test_of_nothing_but_void_l2_alone_is_minimised(self):
        images, labels, weights = small_batch()
        labels[:] = VOID
        step, _ = self.optimize(epochs=100)
        first, *_, last = (step(images, labels, weights).numpy() for _ in range(20))
        self.assertEqual(first[0], 0)
        self.assertTrue(np.isfinite(first).all())
        self.assertLess(last[1], first[1])

    def test_a_step_is_adams_with_two_rates_and_a_clipped_gradient(self):
        batches = [small_batch(seed=seed) for seed in range(6)]
        dropout = next(y for y in self.model.layers if "dropout" in y.name)
        dropout.rate = 0
        start = [w.numpy().astype(float) for w in self.model.trainable_variables]
        step, _ = self.optimize(rate=0.01, vgg_rate=0.002, epochs=3, steps=2)
        share = [1, 1, 400, 1, 400, 1]  # some gradients are above norm 1, some below
        for (images, labels, weights), factor in zip(batches, share):
            step(images, labels, weights * np.float32(factor))
        ends = [w.numpy() for w in self.model.trainable_variables]
        # the same by hand: warm-up over 2 steps, then half a cosine over 4
        rates = [0.005, 0.0075] + [
            0.01 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)
        ]
        values, m, v = list(start), [0.0] * len(start), [0.0] * len(start)
        slow = {variable.path for variable in self.vgg}
        for t, ((images, labels, weights), rate) in enumerate(zip(batches, rates), 1):
            for variable, value in zip(self.model.trainable_variables, values):
                variable.assign(value)
            with tf.GradientTape() as tape:
                losses = keras.losses.SparseCategoricalCrossentropy(
                    from_logits=True, ignore_class=VOID
                )(labels, self.model(images))
                total = losses * share[t - 1] + sum(self.model.losses)
            gradients = tape.gradient(total, self.model.trainable_variables)
            gradients = [gradient.numpy().astype(float) for gradient in gradients]
            norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
            self.assertEqual(norm > 1, share[t - 1] > 1)
            for index, variable in enumerate(self.model.trainable_variables):
                gradient = gradients[index] / max(norm, 1)
                m[index] = 0.9 * m[index] + 0.1 * gradient
                v[index] = 0.999 * v[index] + 0.001 * gradient**2
                own = rate * (0.2 if variable.path in slow else 1)
                corrected = own * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
                change = corrected * m[index] / (np.sqrt(v[index]) + 1e-7)
                values[index] = values[index] - change
        self.assertEqual(len(slow), 6)
        for ours, theirs, before in zip(ends, values, start):
            self.assertGreater(np.abs(theirs - before).max(), 1e-4)
            np.testing.assert_allclose(ours, theirs, atol=2e-4)

    def test_the_rate_rises_over_an_epoch_and_falls_to_zero(self):
        step, state = self.optimize(rate=0.01, epochs=3, steps=4)
        rates = []
        for _ in range(12):
            rates.append(float(state.optimizer.learning_rate))
            step(*small_batch())
        rates.append(float(state.optimizer.learning_rate))
        np.testing.assert_allclose(np.diff(rates[:5]), 0.001875, rtol=1e-3)
        self.assertAlmostEqual(rates[4], 0.01, places=6)
        self.assertAlmostEqual(rates[8], 0.005, places=6)
        self.assertAlmostEqual(rates[12], 0, places=6)

        warm_up_only = main.warm_up_and_cosine(0.01, epochs=1, steps=4)
        self.assertAlmostEqual(float(warm_up_only(4)), 0.01, places=6)

    def test_a_keras_that_would_know_no_factors_is_refused(self):
        update = keras.optimizers.Adam._backend_update_step
        self.patch(main.Adam, "_backend_update_step", update)
        with self.assertRaisesRegex(ProgramError, "all at one rate: pip install -r"):
            self.optimize()[0](*small_batch())

    def test_dropout_is_a_function_of_seed_and_step(self):
        batch = small_batch()
        step, state = self.optimize(vgg_rate=0, rate=1e-12)
        first, second = step(*batch)[0], step(*batch)[0]
        state.step.assign(0)
        self.assertAlmostEqual(float(step(*batch)[0]), float(first), places=7)
        self.assertNotAlmostEqual(float(second), float(first), places=6)
        other, _ = self.optimize(vgg_rate=0, rate=1e-12, seed=1)
        self.assertNotAlmostEqual(float(other(*batch)[0]), float(first), places=6)

    def test_each_replica_drops_others(self):
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with two.scope():
            model, _ = small_model()
            again = keras.layers.Dropout(0.5)(model.output)  # as fc6 and fc7 have one
            self.model = keras.Model(model.input, again)
        step, _ = self.optimize(strategy=two)
        share = two.experimental_distribute_values_from_function
        step(*(share(lambda _, part=part: tf.constant(part)) for part in small_batch()))
        states = [dropout.seed_generator.state.value for dropout in step.dropouts]
        masks = [m for each in states for m in two.experimental_local_results(each)]
        self.assertEqual(len({tuple(mask.numpy()) for mask in masks}), 4, masks)


@functools.cache
def gpu_kernels():
    """Return {op: (its types by attribute, what it keeps on the host) of each kernel}.

    TensorFlow's CUDA build registers them on any machine.
    """
    found = collections.defaultdict(list)
    for kernel in kernels.get_all_registered_kernels().kernel:
        if kernel.device_type in ("GPU", "DEFAULT"):
            allowed = {c.name: c.allowed_values.list.type for c in kernel.constraint}
            found[kernel.op].append((allowed, kernel.host_memory_arg))
    return found


def fitting_kernels(node):
    """Return what each GPU kernel that fits a node of a graph keeps on the host."""
    types = {name: value.type for name, value in node.attr.items() if value.type}
    return [
        on_host
        for allowed, on_host in gpu_kernels()[node.op]
        if all(types[name] in kinds for name, kinds in allowed.items())
    ]


def without_gpu_kernel(function, *arguments):
    """Return the ops of a tf.function, of all it calls too, that no GPU kernel fits."""
    graph = function.get_concrete_function(*arguments).graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return {node.op for node in nodes if not fitting_kernels(node)}


class Gpu(Case):
    """What a GPU would stumble over, as far as a machine without one can tell."""

    def setUp(self):
        super().setUp()
        if "Conv2D" not in gpu_kernels():
            self.skipTest("this build of TensorFlow has no kernels for a GPU")
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        zeros = mock.Mock(return_value=keras.initializers.Zeros())
        self.patch(keras.initializers, "VarianceScaling", zeros)  # which take no time
        self.enterContext(undrawn())
        self.enterContext(narrow())  # a kernel is for types, not for sizes
        seen = tf.config.list_physical_devices
        self.patch(
            tf.config,
            "list_physical_devices",
            lambda kind=None: ["GPU"] if kind == "GPU" else seen(kind),
        )

    def test_every_op_of_a_step_has_a_kernel_for_the_gpu(self):
        images, labels, weights = small_batch()
        for precision in "float32", "bfloat16", "float16":
            mixed = precision if precision == "float32" else f"mixed_{precision}"
            keras.config.set_dtype_policy(mixed)
            model = main.fcn8s("random", keep_prob=0.5)
            step, _ = optimize(model, precision=precision)
            predictor = predictor_of(model)
            with self.subTest(precision):
                arguments = images, labels, weights
                self.assertEqual(without_gpu_kernel(step.plain, *arguments), set())
                arguments = model, ONE, tf.constant(images), tf.constant(labels)
                self.assertEqual(
                    without_gpu_kernel(main.holdout_step, *arguments), set()
                )
                for function in predictor.network, predictor.grow:
                    self.assertEqual(without_gpu_kernel(function), set())
                # on purpose on the host, which then sends a fifth of the bytes
                self.assertEqual(
                    without_gpu_kernel(predictor.shrink), {"ScaleAndTranslate"}
                )

    def test_no_pixel_goes_over_to_the_host(self):
        labels = tf.TensorSpec((2, 32, 96), tf.uint8)
        logits = tf.TensorSpec((2, 32, 96, 2), tf.float32)
        for function, *arguments in (
            (helper.confidence_histogram, labels, labels),
            (main.cross_entropy, logits, labels),
        ):
            graph = helper.traced(function).get_concrete_function(*arguments).graph
            of_pixels = [
                (op, argument.name)
                for op in graph.get_operations()
                for x, argument in (
                    *zip(op.inputs, op.op_def.input_arg),
                    *zip(op.outputs, op.op_def.output_arg),
                )
                if (x.shape.num_elements() or 0) >= 2 * 32 * 96
            ]
            self.assertGreater(len(of_pixels), 5)
            for op, argument in of_pixels:
                with self.subTest(function.__name__, op=op.type):
                    kept_there = fitting_kernels(op.node_def)
                    self.assertTrue(any(argument not in names for names in kept_there))

    def test_shrinking_is_placed_on_the_host(self):
        graph = predictor_of(small_model()[0]).shrink.get_concrete_function().graph
        (shrink,) = (op for op in graph.get_operations() if "Scale" in op.type)
        self.assertIn("CPU", shrink.device)

    def test_growing_without_antialias_is_growing_with_it(self):
        roads = np.random.default_rng(0).uniform(size=(1, 32, 96)).astype(np.float32)
        ours = predictor_of(small_model()[0]).grow(roads, (75, 248))
        theirs = tf.image.resize(roads[..., None], (75, 248), antialias=True)[..., 0]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


class Evaluate(Case):
    def test_loss_and_scores_are_those_of_all_valid_pixels(self):
        keras.utils.set_random_seed(0)
        model, _ = small_model()
        batches = [small_batch(2, seed=0), small_batch(1, seed=1)]
        images, labels = (np.concatenate(part) for part in list(zip(*batches))[:2])
        logits = model(images).numpy().astype(float)
        road = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
        confidence, is_road = np.round(road * 255), labels == 1
        valid, found = labels != VOID, confidence >= 128
        ious = [
            ((confidence >= least) & is_road & valid).sum()
            / (((confidence >= least) | is_road) & valid).sum()
            for least in range(256)
        ]
        ours = evaluate(model, batches)
        loss = cross_entropy_by_hand(logits, labels)
        self.assertAlmostEqual(ours["holdout_loss"], loss, places=4)
        iou = max(ious)  # which is largest where F1 is
        self.assertAlmostEqual(ours["IoU"], 100 * iou, delta=0.05)
        self.assertAlmostEqual(ours["MaxF"], 200 * iou / (1 + iou), delta=0.05)
        right = 100 * (found == is_road)[valid].mean()
        self.assertAlmostEqual(ours["accuracy"], right, delta=0.05)

    def test_a_holdout_loss_that_is_not_finite_stops_the_run(self):
        model, _ = small_model()
        model.get_layer("score_fc7").bias.assign([np.nan, 0])
        with self.assertRaisesRegex(ProgramError, "hold-out loss is nan"):
            evaluate(model, [small_batch()])

    def test_without_images_there_are_no_scores(self):
        self.assertEqual(evaluate(small_model()[0], []), {})


class TrainNn(Case):
    def train(self, values, epochs=2, steps=10):
        """Train on a train_step that answers `values`; return the epochs' records.

        `self.trained` is the number of steps so far.
        """
        self.trained = 0
        self.state = tf.train.Checkpoint(
            step=tf.Variable(0),
            epoch=tf.Variable(0),
            totals=tf.Variable(np.zeros(5)),
        )
        return self.train_on(values, epochs, steps)

    def train_on(self, values, epochs, steps):
        """Train from the state on; return the records of the epochs that end."""
        records = self.records = []
        batches = mock.MagicMock(
            __len__=lambda batches: steps,
            from_step=lambda step: zip(itertools.count(step)),
            files=lambda step: [f"file {step}", "another"],
            batch_size=2,  # of those asked for there are so many
        )

        def train_step(step):
            self.trained += 1
            return tf.constant(values[step])

        get_batches_fn = mock.Mock(return_value=batches)
        main.train_nn(epochs, 3, get_batches_fn, train_step, self.state, records.append)
        get_batches_fn.assert_called_once_with(3)
        return records

    def test_a_record_is_the_mean_over_its_epoch(self):
        values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
        records = self.train(values)
        self.assertEqual([record["epoch"] for record in records], [1, 2])
        self.assertEqual([record["step"] for record in records], [10, 20])
        for record, part in zip(records, (values[:10], values[10:])):
            ours = [record[name] for name in ("loss", "l2", "gradient_norm")]
            np.testing.assert_allclose(ours, part.mean(0), rtol=1e-5)
            speed = 20 / record["seconds"]
            self.assertAlmostEqual(record["images_per_second"], speed)

    def test_steps_that_an_interrupt_lost_count_in_no_mean(self):
        values = {step: np.ones(3, np.float32) for step in range(10)}
        with self.assertRaises(KeyError):  # in the sixth step, as by hand in a notebook
            self.train({step: values[step] for step in range(5)}, epochs=1)
        self.state.step.assign(5)
        (record,) = self.train_on(values, epochs=1, steps=10)
        ours = [record[name] for name in ("loss", "l2", "gradient_norm")]
        self.assertEqual(ours, [1, 1, 1])
        images = record["images_per_second"] * record["seconds"]
        self.assertAlmostEqual(images, 2 * (2 + 5))  # 2 and 5 steps were fetched

    def test_the_bar_goes_on_from_the_restored_step(self):
        bars, plain = [], main.tqdm

        def bar(*args, **kwargs):
            shown = {"disable": False, "file": io.StringIO()}
            bars.append(plain(*args, **kwargs | shown))
            return bars[-1]

        self.patch(main, "tqdm", bar)
        values = np.ones((20, 3), np.float32)
        self.train(values, epochs=0)
        self.state.step.assign(15)
        self.state.epoch.assign(1)
        self.train_on(values, epochs=2, steps=10)
        # tqdm's speed is that of what came after `initial`
        self.assertEqual(
            [(bar.initial, bar.n, bar.total) for bar in bars], [(5, 10, 10)]
        )

    def test_a_loss_that_is_not_finite_stops_it_with_its_own_step(self):
        values = np.ones((20, 3), np.float32)
        values[13, 0] = np.nan
        values[14:] = np.nan
        with self.assertRaises(ProgramError) as caught:
            self.train(values)
        self.assertRegex(
            str(caught.exception), r"step 14 gave \[nan.* on file 13, another"
        )
        self.assertIn("--learning-rate", str(caught.exception))
        self.assertEqual([record["epoch"] for record in self.records], [1])
        values[13, 0], values[14:] = 1, 1
        values[9, 2] = np.inf
        with self.assertRaisesRegex(ProgramError, r"step 10 gave \[1.0, 1.0, inf\]"):
            self.train(values)

    def test_losses_are_fetched_once_a_second_not_at_every_step(self):
        values = np.ones((50, 3), np.float32)
        clock = mock.Mock(wraps=time)
        clock.perf_counter = lambda: 0.2 * self.trained
        self.patch(main, "time", clock)
        with (
            mock.patch.object(tf, "stack", side_effect=tf.stack) as stack,
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            self.train(np.tile(values, (20, 1)), epochs=20, steps=50)
        words = "an epoch takes about 10 s, what is left of the training 3.3 minutes\n"
        self.assertEqual(said.getvalue(), words)
        self.assertEqual(helper.duration(9000), "2.5 hours")
        sizes = [len(call.args[0]) for call in stack.call_args_list]
        self.assertEqual(sum(sizes), 20 * 50)
        sizes = sizes[: 2 + 12]
        self.assertEqual(sizes[:2], [1, 1])  # their time is told
        self.assertTrue(all(4 <= size <= 6 for size in sizes[2:-1]), sizes)


# --------------------------------------------------------------------- inference


class Inference(Case):
    def setUp(self):
        super().setUp()
        keras.utils.set_random_seed(0)
        self.model, _ = small_model()

    def images(self, *shape):
        return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)

    def test_a_probability_has_the_size_of_its_image(self):
        for height, width in (33, 70), (375, 1242), (32, 64):
            images = self.images(2, height, width)
            road = predict_road(self.model, images, (32, 64))
            self.assertEqual((road.shape, road.dtype), (images.shape[:3], np.float32))
            self.assertTrue(0 <= road.min() and road.max() <= 1)

    def test_it_is_the_mean_softmax_of_both_mirror_images_resized_back(self):
        images = self.images(1, 64, 128)
        small = helper.resize_image(images, (32, 64)).numpy()[0]
        logits = self.model(np.stack([small, small[:, ::-1]])).numpy().astype(float)
        roads = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
        self.assertGreater(np.abs(roads[0] - roads[1][:, ::-1]).max(), 1e-4)
        road = (roads[0] + roads[1][:, ::-1]) / 2
        back = Image.fromarray(road.astype(np.float32)).resize(
            (128, 64), Image.Resampling.BILINEAR
        )
        ours = predict_road(self.model, images, (32, 64))[0]
        np.testing.assert_allclose(ours, np.asarray(back), atol=1e-5)

    def test_overlays_have_the_names_and_sizes_of_their_images(self):
        paths = []
        for index, size in enumerate([(90, 40), (80, 40), (80, 40), (90, 40)]):
            paths.append(self.folder / f"um_{index:06}.png")
            Image.new("RGB", size, (index, 0, 0)).save(paths[-1])
        out = self.folder / "out"
        out.mkdir()
        self.model.get_layer("score_fc7").bias.assign([-1, 0])
        save_overlays(out, self.model, paths, 3)
        names = ["thumbnails", *(f"thumbnails/{path.stem}.jpg" for path in paths)]
        names += [path.name for path in paths]
        self.assertEqual(self.files(out), sorted(names))
        for path in paths:
            image = helper.read_image(path)
            road = predict_road(self.model, image[None], (32, 64))[0]
            expected = helper.overlay(image, road)
            np.testing.assert_array_equal(helper.read_image(out / path.name), expected)
            self.assertTrue((expected != image).any())

    def test_a_broken_image_is_named_and_no_overlay_is_half_written(self):
        paths = [self.folder / "a.png", self.folder / "b.png"]
        Image.new("RGB", (64, 32)).save(paths[0])
        paths[1].write_bytes(b"no image")
        out = self.folder / "out"
        with self.assertRaisesRegex(ProgramError, "b.png"):
            save_overlays(out, self.model, paths, 1)
        self.assertLessEqual({path.name for path in out.glob("*.png")}, {"a.png"})


class Scores(Case):
    def test_where_there_is_no_road_none_is_missed(self):
        histogram = np.zeros((2, 256))
        histogram[0, 127] = 90
        right = {"IoU50": 100, "missed": 0, "false": 0}
        self.assertEqual(helper.at_half(histogram), right)
        histogram[0, 128] = 10
        self.assertEqual(helper.at_half(histogram), right | {"IoU50": 0, "false": 10})

    def test_the_histogram_counts_valid_pixels_by_class_and_confidence(self):
        rng = np.random.default_rng(0)
        road = rng.random((2, 9, 11)).astype(np.float32)
        labels = rng.choice(np.uint8([0, 1, VOID]), road.shape)
        expected = np.zeros((2, 256))
        for value, label in zip(road.ravel(), labels.ravel()):
            if label != VOID:
                expected[label, int(np.rint(np.float32(value * 255)))] += 1
        ours = helper.confidence_histogram(helper.to_confidence(road), labels)
        np.testing.assert_array_equal(ours, expected)

    def test_scores_are_the_sums_worked_out_by_hand(self):
        histogram = np.zeros((2, 256))
        histogram[0, 0], histogram[0, 200] = 70, 10  # background
        histogram[1, 127], histogram[1, 220] = 5, 15  # road
        # from threshold 201: TP 15, FP 0, F1 30/35; up to 127: TP 20, FP 10, F1 40/50
        ours = helper.scores(histogram)
        expected = {
            "MaxF": 600 / 7,
            "PRE": 100,
            "REC": 75,
            "FPR": 0,
            "FNR": 25,
            "threshold": 100 * 201 / 255,
            "IoU": 75,
            "IoU50": 100 * 15 / 30,
            "accuracy": 85,
            "AP": (8 * 100 + 3 * 200 / 3) / 11,  # recall 0 to 0.7, and 0.8 to 1
        }
        self.assertEqual(set(ours), set(expected))
        for name, value in expected.items():
            self.assertAlmostEqual(ours[name], value, places=6, msg=name)

    def test_a_perfect_and_a_constant_prediction(self):
        perfect = np.zeros((2, 256))
        perfect[0, 0], perfect[1, 255] = 30, 10
        ours = helper.scores(perfect)
        for name in "MaxF", "AP", "PRE", "REC", "IoU", "IoU50", "accuracy":
            self.assertAlmostEqual(ours[name], 100, places=6, msg=name)
        constant = np.zeros((2, 256))
        constant[:, 77] = 30, 10
        ours = helper.scores(constant)
        self.assertAlmostEqual(ours["MaxF"], 40, places=6)  # P 1/4, R 1
        self.assertAlmostEqual(ours["AP"], 25, places=6)
        self.assertAlmostEqual(ours["FPR"], 100, places=6)
        nothing = helper.scores(np.zeros((2, 256)))
        self.assertTrue(np.isfinite(list(nothing.values())).all())

    def test_a_calibration_maps_the_road_to_its_pixels(self):
        rng = np.random.default_rng(0)
        turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2)]
        rectification, rotation = (turn * np.linalg.det(turn) for turn in turns)
        camera, shift = rng.normal(size=(3, 4)), rng.normal(size=3)
        to_road = np.column_stack([rotation, shift])
        (self.folder / "image_2").mkdir()
        (self.folder / "calib").mkdir()
        lines = {"P2": camera, "R0_rect": rectification, "Tr_cam_to_road": to_road}
        text = "".join(
            f"{name}: {' '.join(map(repr, numbers.ravel().tolist()))}\n"
            for name, numbers in lines.items()
        )
        path = self.folder / "calib" / "um_000000.txt"
        image = self.folder / "image_2" / "um_000000.png"
        self.assertIsNone(helper.read_homography(image))
        path.write_text("P0: 1 2 3\n\n" + text)
        ours = helper.read_homography(image) @ (3, 20, 1)
        in_camera = rotation.T @ (np.array([3, 0, 20]) - shift)
        theirs = camera @ [*(rectification @ in_camera), 1]
        np.testing.assert_allclose(ours, theirs)
        for damaged in text[:40], text.replace("P2", "P3"), text.replace(".", "x"), "":
            path.write_text(damaged)
            with self.assertRaisesRegex(ProgramError, "um_000000.txt: not a calib"):
                helper.read_homography(image)

    def test_from_above_each_cell_shows_the_pixel_of_its_centre(self):
        for part in "image_2", "calib":
            (self.folder / part).mkdir()
        (self.folder / "calib" / "uu_000000.txt").write_text(helper.DRAWN_CALIBRATION)
        homography = helper.read_homography(self.folder / "image_2" / "uu_000000.png")
        pixels = np.random.default_rng(0).integers(0, 255, (375, 1242), np.uint8)
        view = birds_eye(pixels, homography, VOID)
        self.assertEqual((view.shape, view.dtype), ((800, 400), np.uint8))
        outside = 0
        for row, column in itertools.product(range(0, 800, 7), range(0, 400, 3)):
            x, z = -9.975 + 0.05 * column, 45.975 - 0.05 * row
            u, v = 721.5377 * x / z + 609.5593, 721.5377 * 1.65 / z + 172.854
            inside = 1 <= u <= 1242 and 1 <= v <= 375
            outside += not inside
            expected = pixels[int(v) - 1, int(u) - 1] if inside else VOID
            self.assertEqual(view[row, column], expected, (row, column))
        self.assertGreater(outside, 100)

    def test_a_plane_of_known_homography_comes_out_as_it_was_drawn(self):
        homography = np.array([[20.0, 0, 200], [0, -20, 920], [0, 0, 1]])
        plane = np.random.default_rng(0).integers(0, 255, (799, 399), np.uint8)
        view = birds_eye(plane, homography, VOID)  # a pixel a cell, 1-based
        expected = np.full((800, 400), VOID, np.uint8)
        expected[1:799, 1:399] = plane[:798, :398]
        np.testing.assert_array_equal(view, expected)


# --------------------------------------------------------------------------- run


WEIGHTS_OF = {"image_height": 32, "image_width": 96, "holdout_fraction": 0.1667}


def save_weights(model, path, network=main.NETWORK, config=WEIGHTS_OF):
    """Write a weight file as a run does."""
    facts = {"network": network, "config": config}
    with contextlib.redirect_stdout(io.StringIO()):
        helper.write_weights(model, path, facts, seen=[])


def noise():
    """Return an image of noise."""
    return np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)


def find_half(model):
    """Shift `model` until half of the noise is road; few epochs find none."""
    for _ in range(8):
        road = predict_road(model, noise()[None])
        odds = float(np.median(np.log(road / (1 - road))))
        model.get_layer("score_fc7").bias.assign_add([odds, 0])


def scored(maxf):
    """Return what evaluate returns, with that MaxF."""
    return {"holdout_loss": 0.5, "MaxF": maxf, "IoU": maxf / 2, "accuracy": maxf}


class Program(Case):
    """The whole program, in this process, on drawn data and the small encoder."""

    def setUp(self):
        super().setUp()
        self.patch(main, "load_vgg", small_vgg)
        self.data("small", draw_small)

    def data(self, name, draw):
        """Make a copy of what is kept under `name` the data."""
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        shutil.copytree(kept(name, draw), self.folder / "data")

    def demo_is_small(self):
        """Have the demonstration draw what is kept: fewer images, and smaller ones."""
        self.patch(
            helper,
            "maybe_draw_kitti_road",
            lambda folder: shutil.copytree(kept("small", draw_small), folder),
        )

    def command(self, *arguments):
        """Return the command line of a small run."""
        paths = ["--data-dir", self.folder / "data", "--runs-dir", self.folder / "runs"]
        small = ["--image-height=32", "--image-width=96", "--vgg=random"]
        return [*paths, *small, "--epochs=2", "--batch-size=5", *arguments]

    def main(self, *arguments):
        """Run main.py; return its exit code, stdout and stderr."""
        return self.call(*self.command(*arguments))

    def call(self, *command):
        write = os.write

        def quiet(file, content):
            return len(content) if file == 1 else write(file, content)

        output, errors = io.StringIO(), io.StringIO()
        with (
            warnings.catch_warnings(action="ignore"),  # unittest shows Keras's own
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            mock.patch.object(os, "write", quiet),  # what a signal's handler says
        ):
            try:
                code = main.main([str(part) for part in command])
            except SystemExit as leaving:
                code = leaving.code
        return code, output.getvalue(), errors.getvalue()

    def reuse(self, *arguments, until=None):
        """Return a copy in runs/ of the run of these settings, made once for all tests.

        It is finished, or was stopped at the moment `until`.
        """

        def make(folder):
            paths = "--data-dir", kept("small", draw_small), "--runs-dir", folder
            run = functools.partial(self.main, *arguments, *paths)
            code = self.stopped(until, run)[0] if until else run()[0]
            self.assertEqual(code, 143 if until else 0)

        name = re.sub(r"\W+", "_", f"run {until} {arguments}")
        (source,) = kept(name, make).glob("*/")
        copy = self.folder / "runs" / f"0-{len(self.run_dirs())}"  # before all others
        return Path(shutil.copytree(source, copy))

    def half_road(self):
        """Return a run whose weights take a good part of each image for road."""

        def make(folder):
            run_dir = self.reuse("--epochs", 0)
            model = self.trained(run_dir)
            find_half(model)
            save_weights(model, run_dir / "fcn8s.weights.h5")
            shutil.move(run_dir, folder)

        return kept("half road", make)

    def run_dirs(self):
        return sorted((self.folder / "runs").glob("*/"))

    def record(self):
        return json.loads((self.run_dirs()[-1] / "run.json").read_text())

    def trained(self, run_dir):
        """Return the small model with the weights of a run."""
        model, _ = small_model()
        model.load_weights(run_dir / "fcn8s.weights.h5")
        return model

    def outcome(self, run_dir):
        """Return all that must be equal: weights, history, scores, pictures."""
        weights = {}

        def keep(name, item):
            if isinstance(item, h5py.Dataset):
                weights[name] = item[()].tobytes()

        with h5py.File(run_dir / "fcn8s.weights.h5") as file:
            file.visititems(keep)
        self.assertEqual(len(weights), 15 + 1)  # and what images they have seen
        record = json.loads((run_dir / "run.json").read_text())
        self.assertEqual(record["state"], "finished")
        self.assertFalse((run_dir / "checkpoint").exists())
        for epoch in record["history"]:
            self.assertGreater(epoch.pop("seconds"), 0)
            self.assertGreater(epoch.pop("images_per_second"), 0)
        return {
            "weights": weights,
            **{name: record[name] for name in ("history", "scores")},
            **{path.name: path.read_bytes() for path in run_dir.rglob("*.png")},
        }

    def assert_line(self, result, said, code=1):
        """Check that a run ended with one line that says so."""
        found, _, errors = result
        self.assertEqual((found, errors.count("\n")), (code, 1), errors)
        self.assertRegex(errors, said)
        self.assertNotIn("Traceback", errors)

    def assert_refused(self, code, *arguments, said=""):
        self.assert_line(self.main(*arguments), said, code)

    def stopped(self, moment, run, *arguments, signum=signal.SIGTERM):
        """Run until `moment`; return the code, stdout and stderr."""
        with kill_at(str(moment), [signum]):
            return run(*arguments)

    def resume(self, *arguments):
        return self.call("--resume", self.run_dirs()[-1], *arguments)

    def device(self, **how):
        """Return what the preparation of the device says."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            helper.prepare_device(**how)
        return said.getvalue()


class Run(Program):
    def test_a_run_writes_what_the_readme_promises(self):
        code, output, errors = self.main("--learning-rate", "0.01")
        self.assertEqual((code, errors), (0, ""))
        (run_dir,) = self.run_dirs()
        tests = ["um_000000.png", "umm_000000.png", "uu_000000.png"]
        holdout = [f"{kind}_road_000005.png" for kind in ("um", "umm", "uu")]
        self.assertEqual(self.files(run_dir / "holdout"), holdout)
        names = {"fcn8s.weights.h5", "run.json", "holdout", *tests}
        names |= {"index.html", "progress.gif", "errors", "thumbnails"}
        self.assertEqual({path.name for path in run_dir.iterdir()}, names)
        run = json.loads((run_dir / "run.json").read_text())
        self.assertEqual(run["state"], "finished")
        self.assertEqual(run["config"]["learning_rate"], 0.01)
        self.assertEqual(run["config"]["batch_size"], 5)
        self.assertEqual(run["data"], {"training": 15, "holdout": 3, "test": 3})
        self.assertEqual(run["versions"]["tensorflow"], tf.__version__)
        self.assertEqual([epoch["step"] for epoch in run["history"]], [3, 6])
        for epoch in run["history"]:
            self.assertIn(f"MaxF {epoch['MaxF']:.2f}", output)
        self.assertIn("an epoch takes about", output)
        self.assertIn(str(run_dir), output)
        self.assertNotIn("writing checkpoint", output)  # it does every 5 minutes

    def test_the_weights_are_those_of_the_last_epoch(self):
        start = "--weights", self.half_road(), "--learning-rate", 1e-5
        scores = map(scored, [50, 90, 70])
        weights = []

        def evaluate(model, *args, **kwargs):
            weights.append(model.get_weights())
            return next(scores)

        self.patch(main, "evaluate", evaluate)
        save, used = helper.save_inference_samples, []

        def save_inference_samples(*args, **kwargs):
            used.extend(bound(save, args, kwargs)["predictor"].model.get_weights())
            save(*args, **kwargs)

        self.patch(helper, "save_inference_samples", save_inference_samples)
        self.assertEqual(self.main("--epochs", "3", *start)[0], 0)
        (run_dir,) = self.run_dirs()
        model = self.trained(run_dir)
        for ours, theirs, shown in zip(model.weights, weights[2], used, strict=True):
            if "seed_generator" not in ours.path:
                np.testing.assert_array_equal(ours, theirs)
                np.testing.assert_array_equal(shown, theirs)
        self.assertFalse(np.array_equal(weights[1][0], weights[2][0]))
        path = self.folder / "data/data_road/testing/image_2/um_000000.png"
        image = helper.read_image(path)
        road = predict_road(model, image[None])[0]
        overlay = helper.read_image(run_dir / path.name)
        np.testing.assert_array_equal(overlay, helper.overlay(image, road))
        self.assertTrue(0.1 < (overlay != image).any(-1).mean() < 0.99)

    def test_a_source_that_is_edited_meanwhile_is_not_read(self):
        convert, read = autograph._convert_actual, set()

        def noted(entity, context):
            read.add(inspect.getfile(entity))
            return convert(entity, context)

        self.patch(autograph, "_convert_actual", noted)
        tf.function(lambda x: x + 1)(1)
        self.assertTrue(read)
        read.clear()
        self.assertEqual(self.main()[0], 0)
        self.assertEqual(read, set())

    def test_a_run_is_what_the_stages_make_of_its_settings(self):
        rates = "--learning-rate=0.01", "--vgg-learning-rate=0.003"
        code, *_ = self.main("--seed=7", "--keep-prob=0.7", "--l2=0.05", *rates)
        self.assertEqual(code, 0)
        keras.utils.set_random_seed(7)
        image_input, *pools = small_vgg("random", keep_prob=0.7)
        logits = main.layers(*pools, num_classes=2, l2=0.05)
        model = keras.Model(image_input, logits)
        train_step, state = optimize(model, 0.01, 0.003, epochs=2, steps=3, seed=7)
        split = helper.find_images(self.folder / "data")
        get_batches_fn = helper.gen_batch_function(split.training, (32, 96), seed=7)
        records = []
        main.train_nn(2, 5, get_batches_fn, train_step, state, records.append)
        for ours, theirs in zip(self.record()["history"], records, strict=True):
            self.assertEqual(ours["loss"], theirs["loss"])
        trained = self.trained(*self.run_dirs())
        for ours, theirs in zip(trained.weights, model.weights, strict=True):
            if "seed_generator" not in ours.path:
                np.testing.assert_array_equal(ours, theirs)

    def test_deterministic_ops_are_asked_for_and_their_cost_is_told(self):
        with mock.patch.object(tf.config.experimental, "enable_op_determinism") as ask:
            self.device()
            ask.assert_not_called()
            self.patch(main, "prepare", mock.Mock(side_effect=KeyboardInterrupt))
            output = self.main("--deterministic")[1]
            ask.assert_called_once_with()
        self.assertIn("deterministic: the same bits on every run, at a lower", output)

    def test_runs_of_one_second_do_not_collide(self):
        self.patch(helper.time, "strftime", lambda form: "20261122-141500")
        for _ in range(3):
            helper.new_folder(self.folder / "runs", name=None)
        names = [path.name for path in self.run_dirs()]
        expected = ["20261122-141500", "20261122-141500-2", "20261122-141500-3"]
        self.assertEqual(names, expected)

    def test_without_holdout_it_trains_on_all_and_scores_nothing(self):
        run_dir = self.reuse("--holdout-fraction", 0)
        run = json.loads((run_dir / "run.json").read_text())
        self.assertEqual(run["data"]["training"], 18)
        self.assertEqual(run["scores"], {})
        self.assertNotIn("MaxF", run["history"][0])

    def test_the_demo_draws_its_own_data_and_settings_win_over_its_own(self):
        config = main.parse(["--demo", "--image-width", "96"])
        self.assertEqual((config.image_height, config.image_width), (64, 96))
        self.assertEqual((config.vgg, config.keep_prob), ("random", 1))
        self.assertEqual(main.parse([]).image_height, 160)
        self.assertEqual(main.parse([]).keep_prob, 0.5)
        vgg = main.parse(["--vgg", "a.h5"]).vgg  # good in any folder, for a resume
        self.assertEqual(vgg, str(Path("a.h5").absolute()))
        data = self.folder / "data" / "data_road"
        shutil.rmtree(data)
        self.demo_is_small()
        self.patch(main, "load_vgg", mock.Mock(side_effect=KeyboardInterrupt))
        code, output, _ = self.main("--demo")
        self.assertEqual(code, 130)  # enough
        self.assertIn("a demonstration on drawn roads", output)
        self.assertTrue((data.parent / "demo" / "data_road").is_dir())
        self.assertFalse(data.exists())

    def test_a_gpu_that_tensorflow_cannot_use_is_spoken_of(self):
        self.assertNotIn("NVIDIA", self.device())
        self.patch(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
        for hidden in "", "-1":
            with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=hidden):
                self.assertNotIn("NVIDIA", self.device())
        with mock.patch.dict(os.environ):
            del os.environ["CUDA_VISIBLE_DEVICES"]
            output = self.device()
        said = "cannot use the NVIDIA GPU.*\n.*requirements.txt.*\n.*LOG_LEVEL=0"
        self.assertRegex(output, said)

    def test_every_setting_is_explained(self):
        code, output, _ = self.main("--help")
        self.assertEqual(code, 0)
        for name in main.Config.__dataclass_fields__:
            self.assertIn("--" + name.replace("_", "-"), output)
        self.assertIn("0.0001", output)

    def assert_refused(self, code, *arguments, said=""):
        super().assert_refused(code, *arguments, said=said)
        self.assertEqual(self.run_dirs(), [], "something is left")

    def test_impossible_settings_are_refused_with_one_line(self):
        for line in (
            "--epochs -1",
            "--epochs 1.5",
            "--epochs 99999999999999999999",
            "--batch-size 0",
            "--batch-size five",
            "--learning-rate nan",
            "--learning-rate 0",
            "--learning-rate 1e-300",
            "--vgg-learning-rate inf",
            "--keep-prob 0",
            "--keep-prob 1.01",
            "--l2 -0.1",
            "--image-height 100",
            "--image-height 0",
            "--image-height 3200000000",
            "--image-width -32",
            "--holdout-fraction 1",
            "--seed -1",
            "--epoch 3",
            "--bogus",
            "more",
        ):
            with self.subTest(line):
                self.assert_refused(2, *line.split(), said=line.split()[0])
        self.assert_refused(
            2, "--epochs", "\x1b[2J\n3", said=r"--epochs: \\x1b\[2J 3 is"
        )
        self.assert_refused(2, "--epochs=1.5", said=r" 1.5 is not a whole number in \[")
        self.assert_refused(2, "--l2=2", said=r" 2 is not a number in \[0, 1\]")

    def test_bad_data_ends_with_one_line_and_no_run(self):
        training = self.folder / "data" / "data_road" / "training"
        image = training / "image_2" / "umm_000004.png"
        label = training / "gt_image_2" / "umm_road_000004.png"
        self.assert_refused(1, "--batch-size", "16", said="16 is more than the 15")
        helper.check_batch_size(15, range(15), replicas=1)
        calibration = training / "calib" / "uu_000005.txt"  # of one that is held out
        calibration.parent.mkdir()
        calibration.write_text("P2: 1")
        said, built = "uu_000005.txt: not a calibration", mock.Mock(side_effect=OSError)
        with mock.patch.object(main, "fcn8s", built):  # before anything takes time
            self.assert_refused(1, said=said)
        calibration.unlink()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            helper.find_images(training.parent.parent)
        self.assertIn("; the full set has 289 and 290\n", output.getvalue())
        self.assert_refused(
            1, "--vgg", self.folder / "vgg", said="vgg: not a file: put it there"
        )
        self.assert_refused(1, "--weights", training, said="weights.h5: no such file")
        test = training.parent / "testing" / "image_2" / "uu_000000.png"
        for path in image, label, test:
            whole = path.read_bytes()
            path.write_bytes(whole[:200])
            self.assert_refused(1, said=f"{path.name}: not a readable image")
            path.write_bytes(whole)
        label.rename(self.folder / "label.png")
        self.assert_refused(1, said="umm_000004.png has no label")
        shutil.rmtree(training / "image_2")
        self.assert_refused(1, said="no images in")

    def test_runs_that_cannot_be_written_end_with_one_line(self):
        (self.folder / "file").write_text("not a folder")
        runs = self.folder / "file" / "runs"
        self.assert_refused(1, "--runs-dir", runs, said=str(runs))
        usage = mock.Mock(return_value=mock.Mock(free=1000))
        with mock.patch.object(shutil, "disk_usage", usage):
            self.assert_refused(1, said="a run takes .* MB")
        full = OSError("Can't write data (time = Sun Nov 22\n, errno = 28)")  # h5py's
        with mock.patch.object(keras.Model, "save_weights", side_effect=full):
            said = "h5: Can't write data .* errno = 28.: make room"
            self.assert_line(self.main(), said)
        record = self.record()  # the epochs are kept
        self.assertEqual((record["state"], len(record["history"])), ("failed", 2))
        quota = OSError(errno.EDQUOT, "Disk quota exceeded")  # where HDF5 would crash
        allocate = mock.patch.object(
            os, "posix_fallocate", create=True, side_effect=quota
        )
        model, _ = small_model()
        with allocate:
            with self.assertRaisesRegex(ProgramError, "h5: Disk quota exceeded: make"):
                save_weights(model, self.folder / "x.weights.h5")
            self.assertFalse((self.folder / "x.weights.h5").exists())
            quota.errno = errno.EINVAL  # a file system that cannot tell
            save_weights(model, self.folder / "x.weights.h5")
        shutil.rmtree(self.folder / "runs")
        full = OSError(28, "No space left on device")
        with mock.patch.object(helper.os, "replace", side_effect=full):
            self.assert_refused(1, said="No space left on device: make room")
        self.assertEqual(self.run_dirs(), [])
        runs = self.folder / "link"
        runs.symlink_to(self.folder / "unmounted")
        self.assert_refused(1, "--runs-dir", runs, said=str(runs))

    def test_a_file_that_cannot_be_renamed_leaves_nothing_beside(self):
        run_dir = self.reuse(until=4)
        files = [path for path in run_dir.rglob("*") if path.is_file()]
        before = {path: path.read_bytes() for path in files}
        with mock.patch.object(helper.os, "replace", side_effect=OSError(28, "full")):
            self.assert_line(self.resume(), "full: make room")
        files = [path for path in run_dir.rglob("*") if path.is_file()]
        self.assertEqual({path: path.read_bytes() for path in files}, before)

    def test_what_a_resume_needs_is_flushed_to_the_disk(self):
        flushed, late, replace = set(), [], os.replace

        def watched(part, path):
            if path.name in ("run.json", "fcn8s.weights.h5"):
                late.extend({os.stat(part).st_ino} - flushed)
            if path.exists():
                flushed.discard(os.stat(path).st_ino)  # for another file to have
            replace(part, path)

        self.patch(os, "replace", watched)
        with mock.patch.object(
            os, "fsync", lambda fd: flushed.add(os.fstat(fd).st_ino)
        ):
            self.assertEqual(self.stopped(4, self.main)[0], 143)
        self.assertEqual(late, [])
        (run_dir,) = self.run_dirs()
        files = [*run_dir.glob("run.json"), *run_dir.glob("fcn8s.weights.h5")]
        files += run_dir.glob("checkpoint/ckpt-*")
        self.assertEqual(len(files), 4, files)
        for path in files:
            self.assertIn(path.stat().st_ino, flushed, path)

    def test_a_failure_after_training_does_not_look_finished(self):
        full = mock.Mock(side_effect=tf.errors.ResourceExhaustedError(None, None, "\n"))
        self.patch(helper, "gen_test_output", full)
        code, _, errors = self.main()
        self.assertEqual(code, 1)
        self.assertRegex(errors, r"^out of memory: lower --batch-size.*\n$")
        (run_dir,) = self.run_dirs()
        here = sorted(path.name for path in run_dir.iterdir())
        names = ["checkpoint", "fcn8s.weights.h5", "index.html", "progress.gif"]
        self.assertEqual(here, [*names, "run.json"])
        record = json.loads((run_dir / "run.json").read_text())
        self.assertEqual(record["state"], "failed")

    def test_a_failure_in_training_keeps_the_epochs_before_it(self):
        ends = [scored(30), ProgramError("the hold-out loss is nan")]
        self.patch(main, "evaluate", mock.Mock(side_effect=ends))
        code, output, errors = self.main()
        self.assertEqual((code, errors), (1, "the hold-out loss is nan\n"))
        (run_dir,) = self.run_dirs()
        self.assertIn(
            f"begin this run again: python main.py --resume {run_dir}", output
        )
        self.assertNotIn("with other settings", output)
        record = self.record()
        self.assertEqual((record["state"], len(record["history"])), ("failed", 1))
        self.assertIn("30.00 %", (run_dir / "index.html").read_text("utf-8"))
        self.patch(main, "evaluate", lambda *args: scored(40))
        self.assertEqual(self.resume()[0], 0)  # from the start
        maxf = [epoch["MaxF"] for epoch in self.record()["history"]]
        self.assertEqual(maxf, [40, 40])

    def test_what_cannot_be_is_said_before_anything_is_downloaded(self):
        for name in "maybe_download_kitti_road", "prepare_device":
            self.patch(helper, name, mock.Mock(side_effect=AssertionError))
        for name in "a/b", "..", ".a", "index.html", 201 * "a":
            self.assert_refused(
                1, "--name", name, said="not the plain name of a folder"
            )
        refused = PermissionError(errno.EACCES, "Permission denied")
        with mock.patch.object(tempfile, "TemporaryFile", side_effect=refused):
            self.assert_refused(1, said=f"^{self.folder / 'runs'}: nothing may be wri")
        (self.folder / "file").touch()
        runs = self.folder / "file" / "runs"
        self.assert_refused(
            1, "--runs-dir", runs, said=rf"^{runs}: .*\(Not a directory\): set --runs"
        )
        said = (
            r"run\.json: not the record .* \(No such file or directory\): name another"
        )
        self.assert_line(self.call("--resume", self.folder / "typo"), said)
        vgg = "--weights", self.folder, "--vgg", self.folder / "vgg"
        self.assert_refused(2, *vgg, said="--weights replaces VGG-16 too")

    def test_the_demo_takes_the_vgg_that_is_there(self):
        fetch = self.patch(
            helper, "maybe_download_pretrained_vgg", mock.Mock(side_effect=ProgramError)
        )
        self.demo_is_small()
        self.main("--demo", "--vgg", "downloaded")
        fetch.assert_called_once_with(self.folder / "data")

    def test_replicas_that_get_no_image_are_spoken_of(self):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            helper.check_batch_size(2, training=range(9), replicas=2)
            helper.check_batch_size(2, training=range(9), replicas=5)
        idle = "--batch-size 2 leaves 3 devices of 5 idle: a larger one uses more\n"
        self.assertEqual(said.getvalue(), idle)

    def test_without_training_there_need_not_be_a_batch(self):
        self.assertEqual(
            self.main("--epochs", 0, "--batch-size", 16, "--name", "a")[0], 0
        )
        self.assertEqual([path.name for path in self.run_dirs()], ["a"])

    def test_a_record_has_what_was_asked_for_and_what_it_came_to(self):
        record = json.loads((self.reuse(until=4) / "run.json").read_text())
        self.assertEqual(record["config"]["precision"], "auto")
        self.assertEqual(record["device"]["precision"], "float32")
        self.assertEqual(record["defaults"]["data_dir"], str(Path("data").absolute()))
        path = self.run_dirs()[0] / "run.json"
        record["device"]["precision"] = "bfloat16"  # as "auto" had come to on a GPU
        path.write_text(json.dumps(record))
        config = main.parse(["--resume", str(path.parent)])
        self.assertEqual(config.precision, "bfloat16")
        del record["device"]["precision"]
        path.write_text(json.dumps(record))
        self.assert_line(self.resume(), "config: no precision of the device")

    def test_ctrl_c_ends_it_with_one_line(self):
        for target, name in (helper, "file_digest"), (main, "train_nn"):
            with mock.patch.object(target, name, side_effect=KeyboardInterrupt):
                self.assert_refused(130, said="stopped by SIGINT")
            self.assertEqual(self.run_dirs(), [])
        self.assertIn("<h1>0 runs", (self.folder / "runs/index.html").read_text())

    def test_a_signal_a_moment_after_another_does_not_end_its_ending(self):
        self.patch(helper, "SAME_SIGNAL", 0.5)
        self.addCleanup(helper.look_again, signal.SIGINT, delay=0)
        with helper.handling_signals(helper.interrupt):
            with self.assertRaises(helper.Stopped):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.5)
            with self.assertRaises(helper.Stopped):
                signal.raise_signal(signal.SIGINT)

    def test_in_a_terminal_the_line_after_a_signal_is_not_glued_to_a_bar(self):
        for terminal in False, True:
            # a terminal's and a launcher's, a moment later, are one
            numbers = mock.Mock(recv=mock.Mock(side_effect=[b"\x02", b"\x0f", b""]))
            end = self.patch(os, "_exit", mock.Mock())
            self.patch(os, "isatty", lambda file, terminal=terminal: terminal)
            write = self.patch(os, "write", mock.Mock())
            helper.watch_signals(numbers, helper.Stop(workers=1))
            end.assert_not_called()
            (said,) = (call.args[1] for call in write.call_args_list)
            start = b"\r\x1b[KSIGINT: " if terminal else b"SIGINT: "
            self.assertEqual(said[: len(start)], start)
            self.assertLessEqual(len(said), 106)

    def test_a_process_says_no_more_than_its_line(self):
        """Once as a process, for what only shows there: import, exit code, signal."""
        command = [sys.executable, str(Path(main.__file__)), "--vgg", "random"]
        command += ["--data-dir", str(self.folder / "data")]
        command += ["--runs-dir", str(self.folder / "runs")]
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script would
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        signal.signal(signal.SIGINT, previous)
        self.addCleanup(process.kill)
        process.stdout.readline()  # the program has begun
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130, errors)
        self.assertEqual(own_lines(errors), ["stopped by SIGINT"])


def measures_by_hand(confidence, labels):
    """Return some scores of pixels (N,), and the curve, threshold by threshold."""
    confidence, labels = confidence[labels != VOID], labels[labels != VOID]
    best, levels, curve = {"MaxF": -1}, np.zeros(11), []
    road, rest = (np.bincount(confidence[labels == k], minlength=256) for k in (1, 0))
    for k in range(256):
        tp, fp = road[k:].sum(), rest[k:].sum()
        precision, recall = tp / (tp + fp + 1e-10), tp / road.sum()
        f1 = 2 * precision * recall / (precision + recall + 1e-10)
        curve.append((100 * recall, 100 * precision))
        at = np.arange(11) / 10 <= recall
        levels[at] = np.maximum(levels[at], precision)
        if k == 128:
            iou50 = tp / (road.sum() + fp)
        if f1 > best["MaxF"]:
            best = {"MaxF": f1, "PRE": precision, "REC": recall, "threshold": k / 255}
            best |= {"FPR": fp / rest.sum(), "IoU": f1 / (2 - f1)}
    best |= {"AP": levels.mean(), "FNR": 1 - best["REC"], "IoU50": iou50}
    return {name: 100 * value for name, value in best.items()}, curve


class Score(Program):
    def test_large_images_are_held_one_by_one(self):
        read, held, most = helper.read_image, [], [0]

        def watched(path):
            image = read(path)
            held.append(weakref.ref(image))
            most[0] = max(most[0], sum(each() is not None for each in held))
            return image

        split = helper.find_images(self.folder / "data", holdout_fraction=0.9)
        images = [sample.image for sample in split.holdout]
        predictor = predictor_of(small_model()[0], batch_size=9)
        self.patch(helper, "IN_FLIGHT", 1)
        self.patch(helper, "read_image", watched)
        helper.save_inference_samples(self.folder / "out", predictor, images)
        helper.score_holdout(self.folder / "out", predictor, split.holdout)
        self.assertGreater(len(images), 9)
        self.assertLess(most[0], 5)

    def test_a_folder_that_was_moved_and_linked_is_written_anew(self):
        moved, link = self.folder / "moved", self.folder / "holdout"
        (moved / "kept").mkdir(parents=True)
        link.symlink_to(moved)
        with helper.written(link) as part:
            (part / "new").mkdir(parents=True)
        self.assertTrue((moved / "kept").is_dir())
        self.assertFalse(link.is_symlink())
        self.assertTrue((link / "new").is_dir())

    def test_what_is_built_has_a_name_that_fits_and_is_ones_own(self):
        long = self.folder / (250 * "n")  # .part. would make it too long
        with helper.written(long) as part:
            part.touch()
        self.assertTrue(long.exists())
        parts = set()
        for process in 1, 2:  # each builds its own
            with (
                mock.patch.object(os, "getpid", return_value=process),
                helper.written(long.with_name("index.html"), alone=False) as part,
            ):
                part.touch()
            parts.add(part.name)
        self.assertEqual(len(parts), 2)

    def test_scores_follow_from_the_files_in_holdout_alone(self):
        self.data("drawn", draw)  # of KITTI's size, calibrated
        calibrations = self.folder / "data/data_road/training/calib"
        (calibrations / "um_000005.txt").unlink()
        code, output, _ = self.main("--learning-rate", "0.01")
        self.assertEqual(code, 0)
        (run_dir,) = self.run_dirs()
        pooled = {"image": {"urban": []}, "bev": {"urban": []}}
        for path in sorted((run_dir / "holdout").iterdir()):
            kind, _, number = path.stem.split("_")
            labels = self.folder / "data/data_road/training/gt_image_2" / path.name
            confidence, label = np.asarray(Image.open(path)), helper.read_label(labels)
            self.assertEqual(confidence.dtype, np.uint8)
            image = labels.parent.parent / "image_2" / f"{kind}_{number}.png"
            pairs = {"image": (confidence, label)}
            if kind != "um":
                homography = helper.read_homography(image)
                sides = zip(pairs["image"], (0, VOID))
                pairs["bev"] = [birds_eye(x, homography, o) for x, o in sides]
            for plane, pair in pairs.items():
                pooled[plane]["urban"].append(pair)
                pooled[plane][kind] = [pair]
        ours = self.record()["scores"]
        self.assertEqual(list(ours["image"]), ["um", "umm", "uu", "urban"])
        self.assertEqual(list(ours["bev"]), ["umm", "uu", "urban"])
        for plane, kinds in pooled.items():
            for kind, pairs in kinds.items():
                x, y = (np.concatenate([a.ravel() for a in p]) for p in zip(*pairs))
                found = dict(ours[plane][kind])
                self.assertEqual(found.pop("images"), len(pairs))
                found.pop("accuracy")
                expected, curve = measures_by_hand(x, y)
                if plane == "image":
                    found_curve = self.record()["curves"][kind]
                    np.testing.assert_allclose(found_curve, curve, atol=0.0006)
                self.assertEqual(set(found), set(expected))
                for name, value in expected.items():
                    self.assertAlmostEqual(found[name], value, places=5, msg=name)
                row = rf"{kind} +{len(pairs)} +{ours[plane][kind]['MaxF']:.2f}"
                self.assertRegex(output, row)
        errors = helper.read_image(run_dir / "errors" / "uu_000005_errors.jpg")
        self.assertEqual(errors.shape[1], 576)  # of 1242
        image = self.folder / "data/data_road/training/image_2/uu_000005.png"
        model = self.trained(run_dir)
        road = predict_road(model, helper.read_image(image)[None])[0]
        saved = np.asarray(Image.open(run_dir / "holdout" / "uu_road_000005.png"))
        self.assertLessEqual(np.abs(saved - 255.0 * road).max(), 0.5001)

    def test_bars_reach_their_end(self):
        bars, plain = [], helper.tqdm

        def bar(items, *args, **kwargs):
            bars.append(plain(items, *args, **kwargs | {"disable": False}))
            return bars[-1]

        weights = self.reuse() / "fcn8s.weights.h5"
        self.patch(helper, "tqdm", bar)
        code, _, errors = self.main("--epochs", 0, "--weights", weights)
        self.assertEqual(code, 0)
        for title in "scoring", "overlays":
            self.assertRegex(errors, rf"{title}: 100%.* 3/3 ")
        shutil.rmtree(self.folder / "data/data_road/testing")
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            find_images(self.folder / "data")
            helper.save_inference_samples(
                self.folder / "out", predictor=None, image_paths=[]
            )
        self.assertNotIn("looking at the test images", errors.getvalue())
        self.assertNotIn("overlays", errors.getvalue())

    def test_trained_weights_are_scored_without_training(self):
        weights = self.reuse() / "fcn8s.weights.h5"
        self.patch(helper, "maybe_download_pretrained_vgg", None)
        arguments = "--epochs", 0, "--vgg", "downloaded", "--weights", weights
        code, output, errors = self.main(*arguments)
        self.assertEqual((code, errors), (0, ""))
        self.assertIn(f"reading {weights}\n", output)  # which takes seconds
        self.assertIn("no hold-out image has a calibration", output)
        both = []
        for run_dir in self.run_dirs():
            model = self.trained(run_dir)
            both.append(model.get_weights()[:-1])
        for ours, theirs in zip(*both):
            np.testing.assert_array_equal(ours, theirs)
        self.assertEqual(self.record()["scores"]["bev"], {})
        self.assertEqual(self.record()["scores"]["image"]["urban"]["images"], 3)
        self.assertEqual(self.record()["history"], [])
        for content in b"", b"no weights", weights.read_bytes()[:5000]:
            weights.write_bytes(content)
            self.assert_refused(1, *arguments, said="not weights of this FCN-8s")
        model.get_layer("score_fc7").bias.assign([np.nan, 0])
        save_weights(model, weights)
        self.assert_refused(1, *arguments, said="FCN-8s .*not finite")
        shutil.copy(weights, self.folder / "x.keras")
        arguments = *arguments[:-1], self.folder / "x.keras"
        self.assert_refused(
            1, *arguments, said="x.keras: not a .weights.h5 file: name .*--vgg"
        )

    def test_a_category_without_road_has_no_score_of_its_own(self):
        for path in self.folder.glob("data/data_road/training/gt_image_2/uu_*.png"):
            label = helper.read_label(path)
            red = np.zeros((*label.shape, 3), np.uint8)
            red[..., 0] = 255
            Image.fromarray(red).save(path)
        self.patch(helper, "read_homography", lambda path: np.eye(3))
        self.patch(helper, "birds_eye", lambda x, cells, void: np.full_like(x, void))
        code, output, _ = self.main("--epochs", 0)
        self.assertEqual(code, 0)
        self.assertIn("uu, image plane: one class only, no score of its own", output)
        self.assertIn("urban, bird's-eye view: one class only", output)
        self.assertNotIn("has a calibration", output)
        image = self.record()["scores"]["image"]
        self.assertEqual({k: v["images"] for k, v in image.items()}, self.counted())

    def counted(self):
        """Return how many hold-out images are in each category but uu, and in all."""
        names = [path.name for path in (self.run_dirs()[-1] / "holdout").iterdir()]
        counts = {k: sum(n.startswith(f"{k}_") for n in names) for k in ("um", "umm")}
        return counts | {"urban": len(names)}

    def test_a_label_of_another_size_is_not_scored(self):
        label = self.folder / "data/data_road/training/gt_image_2/um_road_000005.png"
        whole = label.read_bytes()
        Image.new("RGB", (24, 40)).save(label)
        self.assert_refused(1, "--epochs", 0, said="um_road_000005.png is 24x40")
        label.write_bytes(whole)
        self.assertEqual(self.resume()[0], 0)  # it has learned nothing from the other

    def test_a_submission_is_what_the_benchmark_takes(self):
        self.data("calibrated", draw_calibrated)
        code, said, _ = self.main("--epochs", 0, "--submission")
        self.assertEqual(code, 0)
        (run_dir,) = self.run_dirs()
        self.assertIn(f"benchmark's server: {run_dir / 'submission.zip'}", said)
        with zipfile.ZipFile(run_dir / "submission.zip") as archive:
            names = [f"{kind}_road_000000.png" for kind in ("um", "umm", "uu")]
            self.assertEqual(sorted(archive.namelist()), names)
            content = io.BytesIO(archive.read("uu_road_000000.png"))
        view = Image.open(content)
        self.assertEqual((view.size, view.mode), ((400, 800), "L"))
        path = self.folder / "data/data_road/testing/image_2/uu_000000.png"
        model = self.trained(run_dir)
        road = predict_road(model, helper.read_image(path)[None])[0]
        expected = birds_eye(
            np.uint8(np.round(255 * road)), helper.read_homography(path), 0
        )
        self.assertLessEqual(np.abs(np.asarray(view) - expected.astype(int)).max(), 1)
        (path.parent.parent / "calib" / "uu_000000.txt").unlink()
        said = "testing has no uu_000000.txt .1 of 3 are missing.: add"
        self.assert_refused(1, "--submission", said=said)
        self.assertEqual(len(self.run_dirs()), 1)


# ------------------------------------------------------------------------ resume


DRIVER = """
import os, sys, helper, main, project_tests
moment, signals = sys.argv.pop(1), [int(n) for n in sys.argv.pop(1).split()]
main.load_vgg, os.fsync = project_tests.small_vgg, lambda file: None
helper.SAME_SIGNAL = 0
with project_tests.kill_at(moment, signals):
    helper.be_a_program(main.main)
"""


def before(target, name, action):
    """Return a patch with which `action` goes before each call of a function."""
    original = getattr(target, name)

    def both(*args, **kwargs):
        action()
        return original(*args, **kwargs)

    return mock.patch.object(target, name, both)


def once(function):
    """Return a function that calls `function` once, and gives that result ever after."""
    results = []

    def call(*args, **kwargs):
        if not results:
            results.append(function(*args, **kwargs))
        return results[0]

    return call


def kill_at(moment, signals):
    """Return a patch with which the program sends itself `signals` at a moment."""

    def kill(condition=True):
        for signum in signals if condition else ():
            os.kill(os.getpid(), signum)
        if condition and len(signals) > 1:
            time.sleep(TIMEOUT)  # the second one ends it

    def kill_in_callback():  # where Python ignores what is raised
        dying = set()
        watched = weakref.ref(dying, lambda reference: kill())
        del dying
        time.sleep(TIMEOUT / 60 if watched() is None else 0)

    def with_kill(train_step, state):
        @functools.wraps(train_step)
        def step(*batch):
            result = train_step(*batch)
            kill(int(state.step.numpy()) == int(moment))
            return result

        return step, state

    def half_written(state, path, *args, **kwargs):
        Path(f"{path}_temp").mkdir()
        Path(f"{path}_temp", "part-0").write_bytes(b"half")
        kill()

    built = main.optimize
    if moment == "evaluating":
        return before(main, "evaluate", kill)
    if moment == "saving, in a callback":
        return before(helper, "save_inference_samples", kill_in_callback)
    if moment == "writing":
        return mock.patch.object(tf.train.Checkpoint, "write", half_written)
    return mock.patch.object(
        main, "optimize", lambda *args, **kwargs: with_kill(*built(*args, **kwargs))
    )


def own_lines(errors):
    """Return a process's lines on stderr but for those of TensorFlow's import."""
    remarks = re.compile(r"WARNING: All log|[IW]\d{4} |\s*$")
    return [line for line in errors.splitlines() if not remarks.match(line)]


class Resume(Program):
    """Kill it in every way; what comes out is what was never killed."""

    def process(self, moment, signals, *arguments):
        """Run as a process until `moment`; return the exit code, stdout and stderr."""
        command = [sys.executable, "-c", DRIVER, str(moment), signals]
        done = subprocess.run(
            [*command, *map(str, arguments)],
            check=False,
            capture_output=True,
            text=True,
            cwd=Path(main.__file__).parent,
            timeout=TIMEOUT,
        )
        return done.returncode, done.stdout, done.stderr

    def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(self):
        expected = self.outcome(self.reuse())
        moments = [
            (2, signal.SIGTERM, 143, 2),  # inside the first epoch
            (3, signal.SIGINT, 130, 3),  # at an epoch's end, before its scores
            ("evaluating", signal.SIGTERM, 143, 3),
            (5, signal.SIGTERM, 143, 5),
            (6, signal.SIGINT, 130, 6),  # the last step
        ]
        steps = []
        for moment, signum, code, step in moments:
            with self.subTest(moment):
                run = self.resume if steps else self.main
                result = self.stopped(moment, run, signum=signum)
                name = signal.Signals(signum).name
                self.assert_line(result, f"^stopped by {name}$", code)
                output = result[1]
                self.assertIn(f"main.py --resume {self.run_dirs()[-1]}", output)
                self.assertNotIn("with other settings", output)
                if steps:
                    self.assertIn(f"resumed at step {steps[-1]} of 6", output)
                steps.append(step)
        self.assertEqual(self.resume()[0], 0)
        self.assertEqual(self.record()["resumed"], steps)
        self.assertEqual(self.outcome(self.run_dirs()[1]), expected)

    def test_a_process_survives_every_kill(self):
        expected = self.outcome(self.reuse("--epochs", 3))
        begin = self.command("--epochs", 3, "--checkpoint-minutes", 0)
        moments = [
            ("writing", "9", -9, 0),  # the first checkpoint
            ("5", "15 15", 143, 3),  # the second signal ends it at once
            ("saving, in a callback", "15", 143, 9),
        ]
        arguments, resumed = begin, []
        for moment, signals, code, step in moments:
            with self.subTest(f"{signals} at {moment}"):
                found, output, errors = self.process(moment, signals, *arguments)
                self.assertEqual(found, code, errors)
                said = ["stopped by SIGTERM"] if signals == "15" else []
                self.assertEqual(own_lines(errors), said)
                if arguments is not begin:
                    self.assertIn(f"resumed at step {resumed[-1]} of 9", output)
                arguments = ["--resume", self.run_dirs()[-1]]
                resumed.append(step)
        self.assertEqual(self.resume()[0], 0)
        self.assertEqual(self.record()["resumed"], resumed)
        self.assertEqual(self.outcome(self.run_dirs()[1]), expected)

    def test_a_damaged_checkpoint_gives_way_to_the_one_before(self):
        expected = self.outcome(self.reuse())
        run_dir = self.reuse("--checkpoint-minutes", 0, until=5)
        folder = run_dir / "checkpoint"
        whole = self.folder / "whole"
        shutil.copytree(run_dir, whole)
        data = folder / "ckpt-2.data-00000-of-00001"
        bytes_ = bytearray(data.read_bytes())
        bytes_[len(bytes_) // 2] ^= 1
        damages = {
            "cut": lambda: data.write_bytes(bytes_[:1000]),
            "gone": lambda: data.unlink(),
            "index": lambda: (folder / "ckpt-2.index").write_bytes(b"damaged"),
            "a bit": lambda: data.write_bytes(bytes_),
        }
        _, state = optimize(small_model()[0])
        for name, damage in damages.items():
            with self.subTest(name):
                shutil.rmtree(run_dir)
                shutil.copytree(whole, run_dir)
                damage()
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    self.assertEqual(helper.restore(state, run_dir), 1)
                self.assertEqual(int(state.step), 3)
                self.assertIn("ckpt-2: not a whole checkpoint", said.getvalue())
        code, output, _ = self.resume()
        self.assertEqual(code, 0)
        self.assertIn("resumed at step 3 of 6", output)
        self.assertEqual(self.outcome(run_dir), expected)
        shutil.rmtree(run_dir)
        shutil.copytree(whole, run_dir)
        for path in folder.glob("*.index"):
            path.write_bytes(b"damaged")
        result = self.resume()
        self.assert_line(result, "no checkpoint can be restored: begin a new run")
        self.assertNotIn("--resume", result[1])  # which would end the same way

    def test_without_a_checkpoint_it_does_not_say_that_the_run_goes_on(self):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with mock.patch.object(tf.train.Checkpoint, "write", side_effect=full):
            result = self.main("--checkpoint-minutes", 0)
        self.assert_line(result, "No space left on device: make room")
        self.assertIn("to begin this run again: python main.py --resume", result[1])
        self.assertIn("with other settings: python main.py --weights", result[1])

    def test_a_signal_at_the_very_end_leaves_a_run_that_is_not_finished(self):
        finish = helper.Run.finish

        def stopped(run):
            finish(run)
            raise helper.Stopped(signal.SIGTERM)

        with mock.patch.object(helper.Run, "finish", stopped):
            self.assert_line(self.main(), "stopped by SIGTERM", 143)
        record = self.record()
        self.assertEqual(record["state"], "stopped")
        code, output, _ = self.resume()
        self.assertEqual(code, 0)
        self.assertIn("resumed at step 6 of 6", output)
        self.assertEqual(self.record()["state"], "finished")

    def test_a_gpu_that_fails_makes_no_checkpoint_a_damaged_one(self):
        run_dir = self.reuse("--checkpoint-minutes", 0, until=5)
        names = self.files(run_dir / "checkpoint")
        for error in tf.errors.InternalError, tf.errors.UnknownError:
            failing = error(None, None, "Dst tensor is not initialized\nat line 5")
            with mock.patch.object(tf.train.Checkpoint, "read", side_effect=failing):
                said = "^TensorFlow: Dst tensor is not initialized: see .*nvidia-smi"
                self.assert_line(self.resume(), said)
            self.assertEqual(self.files(run_dir / "checkpoint"), names)
        without = tf.errors.NotFoundError(None, None, "No algorithm worked!")
        with mock.patch.object(main, "train_nn", side_effect=without):
            self.assert_line(self.resume(), "^TensorFlow: No algorithm worked!: .*GPU")

    def test_weights_that_are_all_replaced_are_not_drawn_before(self):
        run_dir = self.reuse(until=4)
        images = self.folder / "data" / "data_road" / "testing" / "image_2"
        load_vgg = mock.Mock(side_effect=KeyboardInterrupt)  # enough
        self.patch(main, "load_vgg", load_vgg)
        self.main("--epochs", 0)
        self.call("--resume", run_dir)
        self.main("--weights", run_dir, "--epochs", 0)
        self.call("--weights", run_dir, "--predict", images)
        found = [
            bound(small_vgg, call.args, call.kwargs)["vgg_path"]
            for call in load_vgg.call_args_list
        ]
        self.assertEqual(found, ["random", None, None, None])

    def test_weights_come_with_a_checkpoint_and_history_goes_back_with_it(self):
        seen = []

        def evaluate(model, *args, **kwargs):
            seen.append([w.numpy() for w in model.trainable_variables])
            if len(seen) > 2:
                raise ProgramError("as if it were killed")
            return scored(50 + len(seen))

        self.patch(main, "evaluate", evaluate)
        output = self.main("--epochs", 3, "--checkpoint-minutes", 0)[1]
        (run_dir,) = self.run_dirs()
        self.assertIn(f"go on with this run: python main.py --resume {run_dir}", output)
        self.assertIn(f"other settings: python main.py --weights {run_dir}", output)
        self.assertEqual(len(self.record()["history"]), 2)
        model = self.trained(run_dir)
        for ours, theirs in zip(model.trainable_variables, seen[1]):
            np.testing.assert_array_equal(ours, theirs)
        (run_dir / "checkpoint/ckpt-2.index").write_bytes(b"damaged")
        self.assert_line(self.resume(), "as if it were killed")
        self.assertEqual(len(self.record()["history"]), 1)

    def test_at_most_two_checkpoints_are_kept_and_the_record_knows_their_epochs(self):
        counts, known, write_run = [], [], helper.write_run

        def count():
            counts.append(len([*self.run_dirs()[-1].glob("checkpoint/ckpt-*.index")]))

        def write_late(run_dir, text):
            time.sleep(0.1)
            write_run(run_dir, text)

        self.patch(helper, "write_run", write_late)
        with (
            before(main, "evaluate", count),
            before(
                tf.train.Checkpoint,
                "write",
                lambda: known.append(len(self.record()["history"])),
            ),
            mock.patch.object(helper, "write_weights") as write,
        ):
            self.assertEqual(self.main("--epochs", 5, "--checkpoint-minutes", 0)[0], 0)
        self.assertEqual(counts, [0, 1, 2, 2, 2])
        self.assertEqual(known, [1, 2, 3, 4])
        self.assertEqual(write.call_count, 5)  # with each of four, and at the end
        ends, written, clock = [], [], mock.Mock(wraps=time)
        clock.monotonic = lambda: 60 * len(ends)  # an epoch takes a minute
        with (
            mock.patch.object(helper, "time", clock),
            before(main, "evaluate", lambda: ends.append(0)),
            before(tf.train.Checkpoint, "write", lambda: written.append(len(ends))),
        ):
            self.assertEqual(self.main("--epochs", 6, "--checkpoint-minutes", 2)[0], 0)
            self.assertEqual(written, [2, 4])
            self.stopped("evaluating", self.main, "--checkpoint-minutes", 0)
        self.assertEqual(len(written), 3)  # the epoch's is that of the stop

    def test_a_resume_removes_what_a_kill_left_and_all_but_two_checkpoints(self):
        run_dir = self.reuse("--checkpoint-minutes", 0, until=5)
        folder = run_dir / "checkpoint"
        (folder / "ckpt-0.data-00000-of-00001").write_bytes(b"a kill left it")
        (folder / "ckpt-old.index").write_bytes(b"of another program")
        parameters = self.trained(run_dir).count_params()  # 8 bytes, one checkpoint
        usage = mock.Mock(return_value=mock.Mock(free=20 * parameters + 3 * 10**6))
        train = mock.Mock(side_effect=KeyboardInterrupt)
        with (
            mock.patch.object(shutil, "disk_usage", usage),
            mock.patch.object(main, "train", train),
        ):
            self.assertEqual(self.resume()[0], 130)
        self.assertFalse((folder / "ckpt-0.data-00000-of-00001").exists())  # at once
        self.assertEqual(self.stopped(6, self.resume)[0], 143)
        names = {path.name.partition(".")[0] for path in folder.glob("ckpt*")}
        self.assertEqual(names, {"ckpt-2", "ckpt-3", "ckpt-old"})  # not ours: stays

    def test_a_folder_that_tensorflow_would_not_find_is_refused_at_once(self):
        runs = self.folder / "runs[1]"
        self.assert_line(self.main("--runs-dir", runs), "name another --runs-dir")
        self.assertFalse(runs.exists())
        for name in "a[1]", "a*", os.fsdecode(b"a\xff"):
            self.assert_line(self.main("--name", name), "name another --runs-dir")
        latin = self.folder / os.fsdecode(b"runs\xff")
        self.assert_line(self.main("--runs-dir", latin), "name another --runs-dir")
        self.assertEqual(self.run_dirs(), [])
        shutil.copytree(self.reuse(until=4), runs)
        self.assert_line(self.call("--resume", runs), "rename it")

    def test_weights_bring_the_holdout_that_they_do_not_know(self):
        use = "--weights", self.reuse("--holdout-fraction", 0), "--epochs", 0
        code, output, _ = self.main(*use)
        self.assertEqual((code, self.record()["scores"]), (0, {}))
        self.assertIn("no hold-out: no scores", output)
        self.assertNotIn("flatter", output)

    def test_scores_of_images_that_were_trained_on_say_so_for_ever(self):
        start = self.reuse("--holdout-fraction", 0)  # on all 18
        more = "--holdout-fraction", 0.4, "--weights", start
        results = [self.stopped(4, self.main, *more)]
        shutil.rmtree(start)
        results.append(self.resume())
        path = next(self.folder.glob("data/data_road/training/image_2/uu_*5.png"))
        helper.save_image(255 - helper.read_image(path), path)  # which nobody has seen
        results.append(self.main("--weights", *self.run_dirs(), "--epochs", 1))
        results.append(self.main("--weights", self.run_dirs()[-1], "--epochs", 0))
        counts = ["6 of the 6", "6 of the 6", "5 of the 6", "5 of the 6"]
        self.assertEqual([code for code, *_ in results], [143, 0, 0, 0])
        for (code, output, _), count in zip(results, counts, strict=True):
            said = f"{count} images were trained on too: the scores flatter"
            self.assertIn(f"hold-out: {said}\n", output)
            if code == 0:
                self.assertRegex(output, f"hold-out: MaxF .*; {said}\n")
        for run_dir, count in zip(self.run_dirs(), counts[1:], strict=True):
            text = Elements((run_dir / "index.html").read_text()).text
            self.assertEqual(text.count(f"{count} images were trained on too"), 1)
        overview = Elements((self.folder / "runs/index.html").read_text())
        self.assertEqual(overview.text.count("scores flatter"), 3)
        self.assertEqual(self.record()["config"]["holdout_fraction"], 0.4)

    def test_where_the_data_change_what_is_held_out_may_have_been_trained_on(self):
        start = self.reuse()
        for path in self.folder.glob("data/data_road/training/*/um_*05.png"):
            path.unlink()  # it was held out; now the one before is
        _, output, _ = self.main("--weights", start, "--epochs", 0)
        self.assertIn("hold-out: 1 of the 3 images were trained on too", output)

    def test_weights_that_learned_nothing_have_seen_nothing(self):
        self.main("--epochs", 0)
        first = self.run_dirs()[-1]
        self.assertEqual(helper.read_seen(first), [])
        _, output, _ = self.main("--weights", first, "--holdout-fraction", 0.4)
        self.assertNotIn("flatter", output)
        seen = helper.read_seen(self.run_dirs()[-1])
        images = self.folder.glob("data/data_road/training/image_2/*[0-3].png")
        contents = [hashlib.sha256(path.read_bytes()) for path in images]
        self.assertEqual(seen, sorted(c.hexdigest()[:16] for c in contents))
        path = self.folder / "without.weights.h5"
        shutil.copy(first / "fcn8s.weights.h5", path)
        with h5py.File(path, "r+") as file:
            del file["seen"]
        before = self.run_dirs()
        result = self.main("--weights", path, "--epochs", 0)
        self.assert_line(result, "it does not say which images it was trained on")
        self.assertEqual(self.run_dirs(), before)

    def test_a_signal_that_something_swallows_is_not_lost(self):
        self.patch(helper, "SAME_SIGNAL", -0.9)  # 0.1 s until it is raised again
        alarm = signal.getsignal(signal.SIGALRM)
        self.addCleanup(signal.signal, signal.SIGALRM, alarm)
        self.addCleanup(helper.look_again, signal.SIGTERM, delay=0)
        with helper.handling_signals(helper.interrupt):
            with contextlib.suppress(helper.Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
            with self.assertRaises(helper.Stopped):
                time.sleep(10)
            with self.assertRaises(helper.Stopped):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    time.sleep(0.3)  # it is not raised in the program's ending
                    ended = True
        self.assertTrue(ended)

    def test_a_finished_run_is_left_as_it_is(self):
        run_dir = self.reuse()
        before = [(path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")]
        code, output, errors = self.resume()
        self.assertEqual((code, errors), (0, ""))
        self.assertIn(f"is finished; its weights are {run_dir}/fcn8s", output)
        after = [(path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")]
        self.assertEqual(before, after)
        (run_dir / "checkpoint").mkdir()  # as a kill at the very end leaves it
        self.assertEqual(self.resume()[0], 0)
        self.assertFalse((run_dir / "checkpoint").exists())
        record = (run_dir / "run.json").read_bytes()
        # as seen a while ago
        self.patch(helper, "leave_if_finished", lambda run_dir: False)
        self.assert_line(self.resume(), "is finished: nothing to go on with")
        self.assertEqual((run_dir / "run.json").read_bytes(), record)

    def test_the_command_to_train_on_names_the_same_data(self):
        self.reuse()
        _, output, _ = self.resume()
        data = (self.folder / "data", kept("small", draw_small))
        self.assertRegex(output, "--data-dir (" + "|".join(map(str, data)) + ")\n")
        self.assertNotIn("--demo", output)
        self.demo_is_small()
        _, output, _ = self.main("--demo", "--epochs", "0")
        (words,) = (x for x in output.splitlines() if x.startswith("train on: "))
        typed = words.removeprefix("train on: python main.py ").split()
        config = main.parse(typed)
        self.assertTrue(config.demo)
        self.assertEqual(config.data_dir, self.folder / "data")
        self.assertEqual(config.weights, self.run_dirs()[-1])

    def test_a_run_keeps_its_settings(self):
        self.data("calibrated", draw_calibrated)  # as a submission needs
        rate = ["--learning-rate", "0.00123", "--keep-prob", "0.7", "--submission"]
        self.assertEqual(self.stopped(4, self.main, *rate)[0], 143)
        config = self.record()["config"]
        for flag in "--seed=0", "--learning-rate=0.00123", "--demo", "--runs-dir=x":
            self.assert_line(self.resume(flag), flag.partition("=")[0], 2)
        other = self.folder / "other"
        shutil.copytree(self.folder / "data", other)
        for path in other.glob("data_road/training/*/uu*_000000.png"):
            shutil.copy(path, path.with_name(path.name.replace("00.", "10.")))
        before = (self.run_dirs()[0] / "run.json").read_bytes()
        for argument, value, said in (
            ("--epochs", 1, "is at step 4 of --epochs' 3"),
            ("--data-dir", other, "was begun with"),
        ):
            self.assert_line(self.resume(argument, value), re.escape(said))
            after = (self.run_dirs()[0] / "run.json").read_bytes()
            self.assertEqual(before, after)
        code, output, _ = self.resume("--epochs", 3, "--data-dir", self.folder / "data")
        self.assertEqual(code, 0)
        self.assertIn("resumed at step 4 of 9", output)
        record = self.record()
        self.assertEqual(record["config"], config | {"epochs": 3})
        rates = [epoch["learning_rate"] for epoch in record["history"]]
        # over the new length: half of the cosine after epoch 2, all of it after 3
        np.testing.assert_allclose(rates, [0.00123, 0.00123 / 2, 0], atol=1e-9)

    def test_a_run_is_resumed_from_within_and_keeps_the_largest_peak_of_memory(self):
        run_dir = self.reuse(until=4)
        record = json.loads((run_dir / "run.json").read_text())
        (run_dir / "run.json").write_text(json.dumps(record | {"peak_memory": 10**12}))
        (run_dir / "mine").mkdir()
        seen = []  # once it goes on
        looking = before(main, "train", lambda: seen.append(self.record()))
        with contextlib.chdir(run_dir / "mine"), looking:
            self.assertEqual(self.call("--resume", "..")[0], 0)
        self.assertEqual((seen[0]["state"], seen[0]["resumed"]), ("running", [4]))
        self.assertIn(
            f"<title>Run {run_dir.name}: finished", (run_dir / "index.html").read_text()
        )
        self.assertIn(
            f"{run_dir.name}</a>", (run_dir.parent / "index.html").read_text()
        )
        self.assertEqual(self.record()["peak_memory"], 10**12)
        with h5py.File(run_dir / "fcn8s.weights.h5") as file:
            self.assertEqual(json.loads(file.attrs["fcn8s"])["run"], run_dir.name)

    def test_a_record_without_a_setting_is_refused(self):
        path = self.reuse(until=4) / "run.json"
        record = json.loads(path.read_text())
        rate = record["config"].pop("learning_rate")
        path.write_text(json.dumps(record))
        self.assert_line(self.resume(), "run.json: config: no learning_rate: correct")
        record["config"] |= {"learning_rate": rate, "vgg": "a\0"}
        path.write_text(json.dumps(record))
        self.assert_line(self.resume(), "run.json: config: a zero byte in vgg: correct")
        record["config"]["vgg"] = "random"
        del record["network"]["pool_scales"]  # as of an older version
        path.write_text(json.dumps(record))
        said = r"not a run of this network .its pool_scales are None, not \[0.01, 0.1"
        self.assert_line(self.resume(), said)

    def test_two_programs_do_not_work_on_one_run(self):
        run_dir = self.reuse(until=4)
        with helper.locked(run_dir / "checkpoint" / "run"):
            self.assert_line(self.resume(), "another program works on this run")
        with open(run_dir / "checkpoint" / ".run.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # as another program looks at it
            self.patch(time, "sleep", lambda seconds: lock.close())
            self.patch(main, "load_vgg", mock.Mock(side_effect=KeyboardInterrupt))
            self.assertEqual(self.resume()[0], 130)  # it had begun

    def test_what_is_no_run_is_named(self):
        record = a_record(state="stopped")
        wrong = {"seconds": 10**400}, {"seen_before": "0a"}, {"seen_before": [[]]}
        wrong += {"seconds": float("nan")}, {"peak_memory": 10**400}
        wrong += {"command": float("nan")}, {"state": "asleep"}, {"defaults": None}
        damaged = [json.dumps(record | change) for change in wrong]
        for content in None, "", "{", "[]", "{}", *damaged:
            folder = self.folder / "runs" / "x"
            folder.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (folder / "run.json").write_text(content)
            self.assert_line(
                self.resume(), f"{folder}/run.json: not the record of a run"
            )

    def test_a_full_disk_leaves_the_last_good_checkpoint(self):
        full = tf.errors.ResourceExhaustedError(None, None, "No space left on device")
        write = tf.train.Checkpoint.write

        def fill(state, path, *args, **kwargs):
            if path.endswith("ckpt-2"):
                Path(f"{path}_temp").mkdir()
                Path(f"{path}.index").write_bytes(b"half")
                raise full
            return write(state, path, *args, **kwargs)

        patcher = mock.patch.object(tf.train.Checkpoint, "write", fill)
        with patcher:
            self.assert_line(
                self.main("--checkpoint-minutes", 0, "--epochs", 3),
                "ckpt-2: No space left on device: .* is kept",
            )
        code, output, _ = self.resume()
        self.assertEqual(code, 0)
        self.assertNotIn("ckpt-2: not a whole", output)
        self.assertEqual(self.record()["resumed"], [3])


class Failures(Case):
    def said(self, function, *arguments):
        with self.assertRaises(tf.errors.OpError) as caught:
            function(*arguments)
        return helper.first_line(caught.exception)

    def patch_gpus(self, *capabilities):
        """Have TensorFlow list such GPUs; return them, and those that are visible."""
        gpus = [mock.Mock(capability=each) for each in capabilities]
        visible = list(gpus)

        def set_visible(some, kind):
            visible[:] = some

        def details(gpu):
            return {"compute_capability": gpu.capability, "device_name": "H1"}

        self.patch(tf.config, "list_physical_devices", lambda kind: gpus)
        self.patch(tf.config, "get_visible_devices", lambda kind: visible)
        self.patch(tf.config, "set_visible_devices", set_visible)
        self.patch(tf.config.experimental, "set_memory_growth", mock.Mock())
        self.patch(tf.config.experimental, "get_device_details", details)
        return gpus, visible

    def test_of_a_failing_operation_the_reason_is_said(self):
        def check(x):
            return tf.debugging.check_numerics(x, "of this network")

        for function in check, helper.traced(check):
            said = self.said(function, tf.constant(np.nan))
            self.assertRegex(said, "^of this network : Tensor had NaN values")
        head = "Graph execution error:\n\nDetected at node a/b defined at (most recent "
        head += "call last):\n<stack traces unavailable>\n"
        for several in "", "2 root error(s) found.\n  (0) ":
            message = f"{head}{several}No algorithm worked!\n\t [[{{{{node a/b}}}}]]"
            error = tf.errors.NotFoundError(None, None, message)
            self.assertEqual(helper.first_line(error), "No algorithm worked!")
        self.assertEqual(helper.first_line(OSError()), "OSError")
        self.assertEqual(len(helper.first_line(ValueError(300 * "x"))), 200)

    def test_a_gpu_that_cannot_compute_is_named_at_the_start(self):
        said = r"cannot compute with GPU 0 \(it does not know this kind\)"
        with self.assertRaisesRegex(ProgramError, said):
            helper.check_gpu(0)  # where there is none TensorFlow takes the CPU
        x = mock.Mock(device="/job:localhost/replica:0/task:0/device:GPU:1")
        with mock.patch.object(tf, "pow", return_value=x):
            helper.check_gpu(1)
        error = tf.errors.InvalidArgumentError(None, None, "No DNN in stream executor.")
        kernels = (tf, "cast"), (tf.nn, "conv2d"), (tf.nn, "max_pool2d"), (tf, "pow")
        for owner, name in kernels:
            for capability, words in (
                ((7, 0), "older than Turing needs: pip"),
                ((9, 0), ""),
            ):
                with (
                    mock.patch.object(owner, name, side_effect=error),
                    mock.patch.object(
                        helper, "compute_capability", return_value=capability
                    ),
                    self.assertRaises(ProgramError) as caught,
                ):
                    helper.check_gpu(1)
                said = r"with GPU 1 \(No DNN in stream executor\.\): see .*nvidia-smi"
                self.assertRegex(str(caught.exception), f"{said}.*{words}")
                self.assertEqual("Turing" in str(caught.exception), bool(words))
        check = mock.Mock(side_effect=[None, error])
        self.patch_gpus((7, 0), (7, 0))
        with (
            mock.patch.object(helper, "choose_strategy", return_value=(ONE, 1)),
            mock.patch.object(helper, "check_gpu", check),
            contextlib.redirect_stdout(io.StringIO()) as output,
            self.assertRaises(tf.errors.InvalidArgumentError),
        ):
            helper.prepare_device(batch=(16, 160, 576))
        self.assertEqual(check.call_args_list, [mock.call(0), mock.call(1)])
        self.assertIn("H1, float32", output.getvalue())  # should it crash

    def test_as_many_gpus_work_as_the_batch_keeps_busy(self):
        gpus, visible = self.patch_gpus((9, 0), (9, 0), (6, 1))
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        for batch, cluster, count, idle in (
            ((2, 160, 576), False, 1, "2 devices"),
            ((15, 160, 576), False, 1, "2 devices"),
            ((16, 160, 576), False, 2, "1 device"),
            ((99, 160, 576), False, 3, None),
            ((4, 384, 1248), False, 2, "1 device"),
            ((2, 3200, 5760), False, 2, "1 device"),  # one image each
            ((2, 160, 576), True, 3, "1 device"),
        ):
            visible[:] = gpus
            variables = {"TF_CONFIG": "{}"} if cluster else {}  # whose batch all share
            with (
                mock.patch.dict(os.environ, variables),
                mock.patch.object(
                    tf.distribute, "MirroredStrategy", return_value=ONE
                ) as mirrored,
                mock.patch.object(helper, "check_gpu") as check,
                mock.patch.object(helper.ctypes, "pythonapi") as libc,
                contextlib.redirect_stdout(io.StringIO()) as output,
            ):
                device = helper.prepare_device(batch=batch)
                helper.check_batch_size(batch[0], range(99), replicas=count)
            self.assertEqual(visible, gpus[:count])
            grow = tf.config.experimental.set_memory_growth
            self.assertEqual(grow.mock_calls, [mock.call(g, True) for g in visible])
            grow.reset_mock()
            self.assertEqual(check.call_args_list, [*map(mock.call, range(count))])
            self.assertEqual(mirrored.call_count, count > 1)
            weakest = "float32" if count == 3 else "bfloat16"
            self.assertEqual(device.precision, weakest)
            libc.mallopt.assert_not_called()  # that is for CPUs
            found = re.findall("leaves (.*) of 3 idle", output.getvalue())
            self.assertEqual(found, [idle] if idle else [])

    def test_gpus_of_several_workers_sum_by_nccl(self):
        kinds = tf.distribute.experimental.CommunicationImplementation
        cluster = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker"}}
        cluster["task"]["index"] = 0
        for gpus, expected in ((["0"], kinds.NCCL), ([], kinds.AUTO)):
            with (
                mock.patch.dict(os.environ, TF_CONFIG=json.dumps(cluster)),
                mock.patch.object(tf.config, "get_visible_devices", return_value=gpus),
                mock.patch.object(tf.distribute, "MultiWorkerMirroredStrategy") as made,
                contextlib.redirect_stdout(io.StringIO()),
            ):
                helper.choose_strategy()
            (options,) = made.call_args.kwargs.values()
            self.assertEqual(options.implementation, expected)


class Killed(BaseException):
    """The process is killed, as far as the disk can tell."""


class FileOperations:
    """The file operations below a folder; from one on, none is done any more.

    Python reports each of them, before it is done, to an audit hook, which stays for
    good; what is opened to be written is then there, and empty. What clears up after
    an exception fails too, as after a kill.
    """

    events = "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"

    def __init__(self, folder):
        self.folder, self.left, self.killed_at = str(folder), None, None
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.left is None or event not in self.events:
            return
        if event == "open" and not set(str(arguments[1])) & set("wax+"):
            return
        if isinstance(arguments[0], str) and self.folder not in arguments[0]:
            return  # names in a folder that is being removed are not whole paths
        self.left -= 1
        if self.left >= 0:
            return
        if event == "open" and not self.killed_at and "w" in str(arguments[1]):
            self.left = None
            open(arguments[0], "wb").close()  # opened, and killed before it writes
            self.left = -1
        self.killed_at = self.killed_at or (event, *arguments)
        raise Killed


class Damaged(Program):
    """What a run left, damaged by hand or by a kill."""

    def all_files(self, folder):
        """Return the files below `folder`, hidden ones too, as sorted text."""
        found = [path for path in folder.rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(folder)) for path in found)

    def test_a_damaged_record_is_refused_and_nothing_is_removed(self):
        run_dir = self.reuse(until=4)
        path = run_dir / "run.json"
        whole = json.loads(path.read_text())

        def change(*keys, to):
            record = json.loads(json.dumps(whole))
            place = record
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = to
            return record

        damages = {
            "trained": [change("trained", to=value) for value in ("yes", 0, None)],
            "state": [change("state", to=value) for value in ("asleep", True, None)],
            "history": [
                change("history", to={}),
                change("history", 0, to="epoch"),
                change("history", 0, "epoch", to=7),
            ],
            "loss": [
                change("history", 0, "loss", to=value)
                for value in ("0.5", float("nan"), 1e50, None, True)
            ],
            "resumed": [change("resumed", to=["4"]), change("resumed", to=4)],
            "data": [change("data", to=[15, 3, 3])],
            "config": [change("config", to=3)],
            "predict": [change("config", "predict", to=["x.png"])],
            "export": [change("config", "export", to="x")],
            "help": [change("config", "help", to=True)],
            "--bogus": [change("config", "bogus", to=1)],
            "--epochs": [
                change("config", "epochs", to=value) for value in (-1, 2.5, "two", [2])
            ],
            "--precision": [change("device", "precision", to="int8")],
            "--demo": [change("config", "demo", to=3)],
        }
        before = self.files(run_dir)
        for field, records in damages.items():
            for record in records:
                path.write_text(json.dumps(record))
                result = self.resume()
                with self.subTest(field, errors=result[2]):
                    self.assert_line(result, rf"run\.json.*{field}")
                    self.assertEqual(self.files(run_dir), before)
                    self.assertEqual(path.read_text(), json.dumps(record))
        del whole["trained"]
        path.write_text(json.dumps(whole))
        self.assert_line(self.resume(), r"run\.json.*trained is None")
        self.assertEqual(self.files(run_dir), before)

    def test_foreign_files_and_what_a_kill_left_do_not_stop_a_resume(self):
        run_dir = self.reuse(until=4)
        checkpoint = run_dir / "checkpoint"
        left = [
            checkpoint / "frames" / ".part.000000002.png",
            checkpoint / "frames" / "foo.png",
            checkpoint / "ckpt-x9.index",
            checkpoint / "ckpt-9.data-00000-of-00001",
            checkpoint / ".part.ckpt-3",
            run_dir / ".part.run.json",
            run_dir / ".part.index.html",
            run_dir / ".part.progress.gif",
            run_dir / ".part.fcn8s.weights.h5",
        ]
        for path in left:
            path.write_bytes(b"left")
        (checkpoint / "ckpt-8_temp").mkdir()
        (run_dir / ".part.holdout").mkdir()
        (run_dir / ".part.holdout" / "um_road_000000.png").write_bytes(b"left")
        code, _, errors = self.resume()
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(self.record()["resumed"], [4])
        self.assertEqual(self.record()["state"], "finished")

    def test_a_kill_at_any_file_operation_of_an_epochs_end_leaves_a_run_to_resume(self):
        run_dir = self.reuse("--checkpoint-minutes", 0, "--epochs", 3, until=5)
        start, killed = self.folder / "start", self.folder / "killed"
        watch, keep = FileOperations(run_dir), helper.Run.keep
        save_weights, write = keras.Model.save_weights, tf.train.Checkpoint.write

        def kills(run, epoch):
            """End the second epoch over and over, killed at one operation more."""
            shutil.copytree(run_dir, start)
            before = copy.deepcopy({name: vars(run)[name] for name in names})
            for moment in itertools.count():
                watch.left, watch.killed_at = moment, None
                with contextlib.suppress(Killed):
                    keep(run, dict(epoch))
                watch.left = None
                shutil.copytree(run_dir, killed / f"{moment:03}" / "run")
                if watch.killed_at is None:
                    raise KeyboardInterrupt  # enough
                shutil.rmtree(run_dir)
                shutil.copytree(start, run_dir)
                vars(run).update(copy.deepcopy(before), writing=None)

        def weights_by_python(model, path):
            Path(path).write_bytes(b"")  # HDF5 does not report what it does
            save_weights(model, path)

        def checkpoint_by_python(state, path):
            Path(path + "_temp").mkdir()
            Path(path + "_temp", "part").write_bytes(b"")
            shutil.rmtree(path + "_temp")
            return write(state, path)

        names = "record", "saved_progress", "saved_time", "checkpoint_number"
        self.patch(keras.Model, "save_weights", weights_by_python)
        self.patch(tf.train.Checkpoint, "write", checkpoint_by_python)
        frame = np.zeros((32, 96, 3), np.uint8)  # these take time, and write nothing
        self.patch(helper, "followed_frame", mock.Mock(return_value=frame))
        self.patch(main, "evaluate", lambda *_: scored(50))
        self.patch(helper.Run, "score", mock.Mock())  # of no matter here
        self.patch(helper, "save_inference_samples", mock.Mock())
        with mock.patch.object(helper.Run, "keep", kills):
            self.assertEqual(self.call("--resume", run_dir)[0], 130)
        self.assertEqual(self.call("--resume", start)[0], 0)
        expected, states = self.outcome(start), {}

        def size(name):
            """Return what of a file makes a state; most operations change nothing."""
            path = folder / name
            if path.suffix in (".html", ".gif"):
                return name  # nothing reads it
            return name, path.stat().st_size // 100  # a time may have a digit more

        for folder in sorted(killed.glob("*/run")):
            names = self.all_files(folder)
            names = [name for name in names if ".part." not in name]  # nor these
            states[tuple(map(size, names))] = folder
        self.assertGreater(len(states), 5)
        self.patch(main, "fcn8s", once(main.fcn8s))  # the checkpoint replaces all that
        self.patch(main, "optimize", once(main.optimize))  # they hold
        self.patch(helper, "gen_batch_function", once(helper.gen_batch_function))
        for folder in states.values():
            code, output, errors = self.call("--resume", folder)
            with self.subTest(folder.name):
                self.assertEqual((code, errors), (0, ""))
                self.assertRegex(output, "resumed at step [56] of 9")
                self.assertEqual(self.outcome(folder), expected)

    def test_a_terminal_that_is_closed_stops_it_as_sigterm_does(self):
        previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.addCleanup(signal.signal, signal.SIGHUP, previous)
        result = self.stopped(4, self.main, signum=signal.SIGHUP)
        self.assert_line(result, "^stopped by SIGHUP$", 129)
        self.assertIn("to go on with this run: ", result[1])
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        handler = mock.Mock()
        with helper.handling_signals(handler):
            signal.raise_signal(signal.SIGHUP)
        handler.assert_not_called()

    def test_a_standard_output_that_breaks_or_knows_ascii_alone_stops_nothing(self):
        runs = self.folder / "rüns"
        command = [sys.executable, "-c", DRIVER, "0", "", *self.command("--epochs", 0)]
        command += ["--runs-dir", str(runs)]
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(main.__file__).parent,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        )
        self.addCleanup(process.kill)
        process.stdout.readline()
        process.stdout.close()  # as head does
        errors = process.stderr.read()
        self.assertEqual(process.wait(TIMEOUT), 0, errors)
        said = "standard output: Broken pipe: going on without"
        self.assertEqual(own_lines(errors), [said])
        (run_dir,) = runs.glob("*/")
        record = json.loads((run_dir / "run.json").read_text())
        self.assertEqual(record["state"], "finished")
        output = helper.Stream(mock.Mock(write=mock.Mock(side_effect=OSError(28, "x"))))
        with tempfile.TemporaryFile() as file:
            output.stream.fileno = file.fileno
            self.assertEqual(output.write("abc"), 3)

    def test_a_decoration_that_fails_stops_no_run(self):
        parts = {
            "write_progress": "progress.gif",
            "followed_frame": "a frame of progress.gif",
            "report": "index.html",
            "overview": f"{self.folder}/runs/index.html",
        }
        for name in parts:
            self.patch(helper, name, mock.Mock(side_effect=OSError(5, f"no {name}")))
        code, output, errors = self.main("--checkpoint-minutes", 0)
        self.assertEqual((code, errors), (0, ""))
        for name, part in parts.items():
            self.assertIn(f"without {part}: [Errno 5] no {name}\n", output)

    def test_a_run_that_is_trained_needs_no_vgg_and_no_room_for_checkpoints(self):
        vgg = self.folder / "vgg.h5"
        vgg.touch()
        gone = mock.Mock(side_effect=OSError(5, "Input/output error"))
        ahead = self.patch(helper, "read_ahead", mock.Mock())
        with mock.patch.object(helper, "score_holdout", gone):
            self.assert_line(self.main("--vgg", vgg), "Input/output error")
        ahead.assert_called_once_with(str(vgg))
        vgg.unlink()
        history = self.record()["history"]
        said = "has been trained for all its 2 epochs: leave --epochs out, or train on"
        self.assert_line(self.resume("--epochs", 3), said)
        parameters = self.trained(*self.run_dirs()).count_params()
        usage = mock.Mock(return_value=mock.Mock(free=8 * parameters + 3 * 10**6))
        with mock.patch.object(shutil, "disk_usage", usage):
            code, output, errors = self.resume()
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("resumed at step 6 of 6", output)
        self.assertEqual(self.record()["history"], history)

    def test_two_test_images_of_one_name_are_refused(self):
        folder = self.folder / "data/data_road/testing/image_2"
        shutil.copy(folder / "um_000000.png", folder / "um_000000.jpg")
        self.assert_line(self.main("--epochs", 0), "um_000000.png: rename one of them")

    def test_a_closed_standard_error_stops_nothing(self):
        command = (
            f"{shlex.quote(sys.executable)} {shlex.quote(main.__file__)} --help 2>&-"
        )
        environment = {k: v for k, v in os.environ.items() if k[:6] != "TF_CPP"}
        done = subprocess.run(
            command, shell=True, check=False, capture_output=True, env=environment
        )
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"--epochs", done.stdout)

    def test_without_a_temporary_folder_it_ends_with_one_line(self):
        code = "import tempfile; tempfile._candidate_tempdir_list = list; import main"
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            capture_output=True,
            text=True,
            cwd=Path(main.__file__).parent,
        )
        said = "No usable temporary directory found in []: make room there, or set TMP"
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, rf"^{re.escape(said)}DIR\n$")

    def test_other_images_of_the_same_number_are_noticed(self):
        self.reuse(until=4)
        said = "here are .* of other names or content: undo the change, or name its "
        said += "data set with --data-dir"
        data = self.folder / "data"
        folder = data / "data_road/training"
        image, label = "image_2/um_000003.png", "gt_image_2/um_road_000003.png"
        for name in image, label, "gt_image_2/um_road_000005.png":  # the last held out
            whole = (folder / name).read_bytes()
            with Image.open(folder / name) as picture:
                picture.transpose(Image.FLIP_LEFT_RIGHT).save(folder / name)
            self.assert_line(self.resume("--data-dir", data), said)
            (folder / name).write_bytes(whole)
        (folder / image).rename(folder / "image_2/um_000033.png")
        (folder / label).rename(folder / "gt_image_2/um_road_000033.png")
        self.assert_line(self.resume("--data-dir", data), said)


# ----------------------------------------------------------- what was trained, used


# Ask for tensors of 300 and 500 MB where 400 MiB are free, and one core.
SMALL_MACHINE = """
import os
import pathlib

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
read = pathlib.Path.read_text

def read_text(path, *args, **kwargs):
    small = str(path) == "/proc/meminfo"
    return "MemAvailable: 409600 kB" if small else read(path, *args, **kwargs)

pathlib.Path.read_text = read_text
import helper
import tensorflow as tf

print(helper.CORES)
for size in 300, 500:
    try:
        tf.zeros(size * 10**6, tf.uint8)
        print(size, "MB")
    except tf.errors.ResourceExhaustedError:
        pass
"""


class Devices(Program):
    """One device, two, and two processes: the same run."""

    settings = "--keep-prob", 1, "--checkpoint-minutes", 0

    def workers(self, kills, *arguments, different=(), signum=signal.SIGKILL):
        """Run a process for each of `kills`, the steps at which they get a signal.

        Returns exit code, stdout and stderr of each; `different` are other settings of
        the second.
        """
        addresses, processes = [], []
        for _ in kills:  # bound as long as they run, lest others get the port
            port = socket.socket()
            self.addCleanup(port.close)
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            port.bind(("127.0.0.1", 0))
            addresses.append("{}:{}".format(*port.getsockname()))
        for index, moment in enumerate(kills):
            task = {"type": "worker", "index": index}
            cluster = {"cluster": {"worker": addresses}, "task": task}
            command = [sys.executable, "-c", DRIVER, moment, int(signum), *arguments]
            process = subprocess.Popen(
                [str(part) for part in (*command, *(different if index else ()))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(main.__file__).parent,
                env=os.environ
                | {"TF_CONFIG": json.dumps(cluster), "TF_GRPC_REUSE_PORT": "1"},
            )
            self.addCleanup(process.kill)
            processes.append(process)
        with ThreadPoolExecutor(len(kills)) as pool:  # none may wait for its pipe
            said = pool.map(lambda each: each.communicate(timeout=TIMEOUT), processes)
            return [(each.returncode, *both) for each, both in zip(processes, said)]

    def outcome(self, run_dir):
        record = json.loads((run_dir / "run.json").read_text())
        self.assertEqual(record["state"], "finished")
        weights = self.trained(run_dir).trainable_variables
        return record, [w.numpy() for w in weights]

    def assert_same(self, ours, theirs, replicas, workers):
        (record, weights), (other, other_weights) = ours, theirs
        self.assertEqual(record["device"]["replicas"], replicas)
        self.assertEqual(record["device"]["workers"], workers)
        self.assertEqual([epoch["step"] for epoch in record["history"]], [3, 6])
        for epoch, expected in zip(record["history"], other["history"]):
            for name in "loss", "l2", "gradient_norm", "holdout_loss":
                np.testing.assert_allclose(epoch[name], expected[name], rtol=1e-4)
        for value, expected in zip(weights, other_weights):
            error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
            self.assertLess(error, 1e-4)
        for kind, measures in record["scores"]["image"].items():
            for name in "MaxF", "AP", "IoU50", "accuracy":  # some pixels may change
                expected = other["scores"]["image"][kind][name]
                self.assertAlmostEqual(measures[name], expected, delta=0.1)

    def test_two_replicas_are_as_one(self):
        one = self.outcome(self.reuse(*self.settings))
        self.assert_same(one, one, 1, 1)
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), 1
        predictors = mock.Mock(wraps=helper.Predictor)
        prepare = mock.Mock(wraps=helper.prepare_device)
        with (
            mock.patch.object(helper, "choose_strategy", return_value=two),
            mock.patch.object(helper, "prepare_device", prepare),
            mock.patch.object(helper, "Predictor", predictors),
        ):
            self.assertEqual(self.main(*self.settings)[0], 0)
        self.assertEqual(prepare.call_args.args[3], (5, 32, 96))  # the batch
        ((_, _, batch_size),) = (each.args for each in predictors.call_args_list)
        self.assertEqual(batch_size, 2)  # of 5: it has one device
        self.assert_same(self.outcome(self.run_dirs()[-1]), one, 2, 1)

    def test_two_workers_that_stop_lose_one_and_go_on_are_as_one(self):
        one = self.outcome(self.reuse(*self.settings))
        rare = "--checkpoint-minutes", 9  # none is due
        command = self.command(*self.settings, *rare)
        # a signal to one of them stops both at the epoch's end, with a checkpoint
        ends = self.workers([0, 1], *command, signum=signal.SIGINT)
        said = [(code, own_lines(errors)) for code, _, errors in ends]
        expected = [(143, ["stopped by SIGTERM"]), (130, ["stopped by SIGINT"])]
        self.assertEqual(said, expected)
        run_dir = self.run_dirs()[-1]
        # the end of one ends the other
        chief, lost = self.workers([0, 4], "--resume", run_dir)
        self.assertEqual((chief[0], lost[0]), (1, -9), chief)
        said = "another worker has ended: start all of them again, with --resume"
        self.assertEqual(own_lines(chief[2]), [said])
        self.assertIn(f"main.py --resume {run_dir}", chief[1])
        # any number of them goes on
        alone = shutil.copytree(run_dir, self.folder / "alone")
        ends = self.workers([0, 0], "--resume", run_dir)
        self.assertEqual([end[0] for end in ends], [0, 0], own_lines(ends[0][2]))
        self.assertIn("segmented test images", ends[0][1])
        self.assertNotIn("segmented", ends[1][1])  # only the chief writes
        self.assertEqual(self.call("--resume", alone)[0], 0)
        for folder, count in (run_dir, 2), (alone, 1):
            ours = self.outcome(folder)
            self.assertEqual(ours[0]["resumed"], [3, 3])
            self.assert_same(ours, one, count, count)

    def test_workers_that_differ_are_refused(self):
        def agree(others):
            """Agree on 5 with workers whose mean is `others` away."""
            strategy = mock.Mock(run=lambda own, args: own(*args))
            strategy.reduce = lambda kind, own, axis: own + others
            helper.Device(strategy=strategy).agree({"batch_size": 5})

        agree(0)
        with self.assertRaisesRegex(ProgramError, "other settings .*'batch_size': 5"):
            agree(0.5)
        both = self.folder / "a.weights.h5", self.folder / "b.weights.h5"
        for weights in both:  # each worker may have a disk of its own
            save_weights(small_model()[0], weights)
        command = self.command("--weights", both[0])
        ends = self.workers([0, 0], *command, different=["--weights", both[1]])
        for code, _, errors in ends:
            self.assertEqual(code, 1)
            self.assertRegex(own_lines(errors)[-1], "^another worker has (oth|end)")
        self.assertIn("other settings", "".join(end[2] for end in ends))
        self.assertEqual(self.run_dirs(), [])

    def test_workers_know_other_labels(self):
        facts = []

        def begin(run, state, *args, **kwargs):
            run.state = state
            facts.append(run.shared_facts(step=0))
            raise KeyboardInterrupt  # enough

        self.patch(helper.Run, "begin", begin)
        labels = self.folder / "data/data_road/training/gt_image_2"
        for _ in range(2):
            self.assertEqual(self.main()[0], 130)
        shutil.copy(labels / "um_road_000001.png", labels / "um_road_000002.png")
        self.assertEqual(self.main()[0], 130)
        self.assertEqual(facts[0], facts[1])
        self.assertNotEqual(facts[0], facts[2])

    def test_a_cluster_that_is_none_is_refused_with_one_line(self):
        for text in "{", '{"cluster": 3}', '{"cluster": {"worker": ["a:1", "b:2"]}}':
            with mock.patch.dict(os.environ, TF_CONFIG=text):
                self.assert_refused(1, said="^TF_CONFIG: not a cluster .*: correct it")
        with mock.patch.dict(os.environ, TF_CONFIG="{}"):
            self.assertEqual(self.main("--epochs", 0)[0], 0)

    def on_gpu(self, *capability):
        """Have the program see a GPU's compute capability."""
        self.patch(helper, "compute_capability", mock.Mock(return_value=capability))

    def test_the_precision_follows_the_gpu_and_is_kept(self):
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        auto = ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((7, 5), "float32")
        for capability, precision in auto:
            self.on_gpu(*capability)
            self.assertIn(f", {precision}\n", self.device())
        self.on_gpu(8, 0)
        said = self.stopped(2, self.main, "--epochs", 1)[1]
        self.assertIn(", bfloat16\n", said)
        self.on_gpu(0, 0)
        self.assertIn(", bfloat16\n", self.resume()[1])
        self.assertEqual(self.record()["device"]["precision"], "bfloat16")
        self.assertEqual(self.record()["config"]["precision"], "auto")
        page = (self.run_dirs()[-1] / "index.html").read_text()
        self.assertIn("auto, here bfloat16", page)
        (epoch,) = self.record()["history"]
        self.assertTrue(0 < epoch["loss"] < 1)
        self.assertEqual(self.main("--precision", "float16", "--epochs", 1)[0], 0)
        self.assert_refused(
            2, "--precision", "int8", said="--precision: invalid choice: 'int8'"
        )

    def test_half_precision_on_a_cpu_gets_large_memory_from_the_kernel(self):
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        threshold = mock.call(-3, 128 * 1024)  # glibc's M_MMAP_THRESHOLD
        for precision, expected in (
            ("float32", []),
            ("bfloat16", [threshold]),
            ("float16", [threshold]),
        ):
            with mock.patch.object(helper.ctypes, "pythonapi") as libc:
                self.device(precision=precision)
            self.assertEqual(libc.mallopt.mock_calls, expected, precision)
        with mock.patch.object(helper.ctypes, "pythonapi", object()):  # no glibc
            self.assertIn(", bfloat16\n", self.device(precision="bfloat16"))

    def test_where_the_kernels_have_to_be_compiled_it_is_said(self):
        for capability, compiled in ((9, 0), False), ((10, 0), True), ((12, 0), True):
            self.on_gpu(*capability)
            self.assertEqual("half an hour" in self.device(), compiled)

    def test_xla_is_left_out_where_it_does_not_work(self):
        settings = "--xla", "--precision", "float32", "--epochs"
        for capability in (10, 0), (12, 0):
            self.on_gpu(*capability)
            self.assertIn("XLA is off", self.device(xla=True))
        self.on_gpu(9, 0)
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), 1
        with mock.patch.object(helper, "choose_strategy", return_value=two):
            self.assertIn("XLA is off", self.device(xla=True))
        with mock.patch.object(tf.config.experimental, "enable_op_determinism"):
            self.assertIn("XLA is off", self.device(xla=True, deterministic=True))
        code, said, _ = self.main(*settings, 0)
        self.assertEqual((code, "XLA is off" in said), (0, False))
        self.assertTrue(self.record()["device"]["xla"])

    def test_free_memory_is_that_of_the_machine_or_of_its_container(self):
        group = self.folder / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (self.folder / "proc").mkdir()
        self.patch(helper, "Path", lambda path: self.folder / path.lstrip("/"))
        self.assertEqual(helper.free_memory(), np.inf)
        meminfo = "MemTotal:        9000 kB\n"
        (self.folder / "proc/meminfo").write_text(meminfo)
        self.assertEqual(helper.free_memory(), np.inf)
        meminfo += "MemAvailable:    4000 kB\n"
        (self.folder / "proc/meminfo").write_text(meminfo)
        kinds = "anon 2500000\nfile 500000\ninactive_file 400000\nactive_file 100000\n"
        (group / "memory.stat").write_text(kinds)
        (group / "memory.current").write_text("3000000\n")
        for limit, free in ("max", 4_096_000), ("5000000", 2_500_000):
            (group / "memory.max").write_text(f"{limit}\n")
            self.assertEqual(helper.free_memory(), free)
        job = group / "slurm/job_1"  # has the limit, not the task in it
        (job / "task_0").mkdir(parents=True)
        (self.folder / "proc/self").mkdir()
        (self.folder / "proc/self/cgroup").write_text("0::/slurm/job_1/task_0\n")
        self.assertEqual(helper.free_memory(), 2_500_000)
        for file, text in ("stat", kinds), ("current", "3000000"), ("max", "4000000"):
            (job / f"memory.{file}").write_text(text)
        self.assertEqual(helper.free_memory(), 1_500_000)

    @unittest.skipUnless(Path("/proc/self/status").exists(), "only Linux tells it")
    def test_the_peak_of_memory_is_in_bytes(self):
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
        self.assertAlmostEqual(helper.peak_memory() / peak, 1, delta=0.05)

    def test_tensors_can_have_what_is_free_or_idle_up_to_the_limit(self):
        held = mock.Mock(return_value={"current": 300, "peak": 500})
        self.patch(tf.config.experimental, "get_memory_info", held)
        for free, limit, expected in (1000, 2000, 1200), (1000, 1400, 1100):
            self.patch(helper, "free_memory", mock.Mock(return_value=free))
            self.patch(helper, "MEMORY", limit)
            self.assertEqual(helper.free_for_tensors(), expected)
        held.side_effect = ValueError  # of an allocator that keeps none
        self.assertEqual(helper.free_for_tensors(), 1000)

    def test_cores_and_memory_are_those_that_it_may_use(self):
        done = subprocess.run(
            [sys.executable, "-c", SMALL_MACHINE],
            check=False,
            capture_output=True,
            text=True,
            cwd=Path(main.__file__).parent,
            timeout=TIMEOUT,
        )
        cores = 1 if hasattr(os, "sched_setaffinity") else os.cpu_count()
        said = f"{cores}\n300 MB\n"
        self.assertEqual((done.returncode, done.stdout), (0, said), done.stderr)

    def test_without_memory_the_batch_that_should_fit_is_named(self):
        full = tf.errors.ResourceExhaustedError(None, None, "OOM")
        self.patch(main, "train_nn", mock.Mock(side_effect=full))
        said = (
            "^out of memory with --batch-size 5: 4 should fit; set that, or lower --im"
        )
        self.assert_refused(1, said=said)
        for fits, size, words in (
            (0, 5, "5: lower it, --im"),
            (0, 1, "1: lower --im"),
            (2, 5, "5: 2 should fit; set that"),
        ):
            with (
                mock.patch.object(helper, "largest_batch", return_value=fits),
                self.assertRaisesRegex(
                    ProgramError, f"^out of memory with --batch-size {words}"
                ),
                helper.naming_the_batch_that_fits(None, None, size, 1),
            ):
                raise full


class Benchmark(Program):
    def test_flop_are_those_worked_out_by_hand(self):
        model, _ = small_model()
        kernels = {  # side, channels in and out, at 32x96
            "conv2d": (9 * 9 * 3 * 8, 4 * 12),
            "conv2d_1": (3 * 3 * 8 * 8, 2 * 6),
            "conv2d_2": (3 * 3 * 8 * 8, 1 * 3),
            "score_fc7": (8 * 2, 1 * 3),
            "upscore_fc7": (4 * 4 * 2 * 2, 1 * 3),
            "score_pool4": (8 * 2, 2 * 6),
            "upscore_pool4": (4 * 4 * 2 * 2, 2 * 6),
            "score_pool3": (8 * 2, 4 * 12),
            "upscore_pool3": (16 * 16 * 2 * 2, 4 * 12),
        }
        expected = sorted(2 * weights * places for weights, places in kernels.values())
        self.assertEqual(sorted(layer_flop(model, (32, 96))), expected)
        fc6 = main.FullyConnected(4, 7, padding="same")
        image = keras.Input((None, None, 3))
        model = keras.Model(image, fc6(image))
        # of 2 rows those of the kernel see 0, 0, 1, 2, 1, 0, 0
        self.assertEqual(layer_flop(model, (2, 5)), [2 * 7 * 3 * 4 * (1 + 2 + 1) * 5])

    def test_it_prints_a_table_and_json(self):
        settings = ["--image-height=32", "--image-width=96", "--batch-size=2"]
        small = """
import main, project_tests
main.load_vgg, project_tests.SIDES = project_tests.small_vgg, [64, 128]
"""
        self.enterContext(mock.patch.dict(globals(), BENCHMARK=small + BENCHMARK))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = benchmark(
                ["--benchmark", "--benchmark-steps=1", *settings]
                + [f"--data-dir={self.folder / 'data'}"]
            )
        self.assertEqual(code, 0)
        *table, text = said.getvalue().splitlines()
        results = json.loads(text)
        self.assertTrue(all(value > 0 for value in results.values()))
        shares = re.findall(r"([0-9.]+) % of the product", "".join(table))
        expected = (results["train_share"], results["predict_share"])
        for shown, share in zip(shares, expected, strict=True):
            self.assertAlmostEqual(float(shown), 100 * share, places=1)

    def test_the_job_prints_where_its_time_goes(self):
        small = "import os\nassert os.environ['CUDA_VISIBLE_DEVICES'] == '99'\n"
        small += "import helper, main, project_tests, tensorflow as tf\n"
        small += "main.load_vgg = project_tests.small_vgg\n"
        two = "tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])"
        small += f"helper.choose_strategy = lambda: ({two}, 1)\n"
        smaller = {
            "JOB": small + JOB,
            "ENVIRONMENT": os.environ | {"CUDA_VISIBLE_DEVICES": "99"},
            "draw": lambda data, **_: shutil.copytree(self.folder / "data", data),
            "write_vgg_weights": lambda path, model: path.touch(),
        }
        self.enterContext(mock.patch.dict(globals(), smaller))
        self.patch(keras.applications, "VGG16", mock.Mock())
        with contextlib.redirect_stdout(io.StringIO()) as said:
            settings = "--epochs=3", "--image-height=32", "--image-width=96"
            self.assertEqual(job([*settings, "--checkpoint-minutes=0"]), 0)
        results = json.loads(said.getvalue().splitlines()[-1])
        whole = results.pop("in all")
        self.assertEqual(list(results), ["imports", *STAGES])
        self.assertTrue(all(value > 0 for value in results.values()), results)
        self.assertLess(sum(results.values()), whole)


class ByHand(Program):
    def test_the_lines_of_the_readme_do_what_they_say(self):
        text = (Path(main.__file__).parent / "README.md").read_text()
        section = text.partition("\n## By hand\n")[2].partition("\n## ")[0]
        lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
        self.assertLessEqual(sum(map(bool, lines)), 16)
        code = "\n".join(lines)
        self.assertIn("= 50, 2, (160, 576)", code)
        code = code.replace("= 50, 2, (160, 576)", "= 1, 5, (32, 96)")
        code = code.replace('Path("', f'Path("{self.folder}/')
        self.patch(helper, "download", mock.Mock())
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code, {})  # noqa: S102 (the lines of the README)
        self.assertRegex(said.getvalue(), "'epoch': 1, 'step': 3, 'loss': ")
        names = [f"{kind}_000000.png" for kind in ("um", "umm", "uu")]
        found = (self.folder / "runs/by-hand").glob("*.png")
        self.assertEqual(sorted(path.name for path in found), names)

    def test_three_classes_are_trained_and_never_scored_as_two(self):
        image_input, *pools = small_vgg("random", 0.5)
        model = keras.Model(image_input, main.layers(*pools, num_classes=3))
        step, _ = main.optimize(model, learning_rate=0.01)
        images, labels, weights = small_batch()
        labels[:, -4:] = 2
        weights[:] = 1 / (labels != VOID).sum()
        logits = model(images).numpy().reshape(-1, 3).astype(float)
        chosen = labels.ravel() != VOID
        logits, ids = logits[chosen], labels.ravel()[chosen]
        by_hand = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(ids)), ids]
        next(y for y in model.layers if "dropout" in y.name).rate = 0
        first = float(step(images, labels, weights)[0])
        self.assertAlmostEqual(first, by_hand.mean(), places=4)
        last = [float(step(images, labels, weights)[0]) for _ in range(20)][-1]
        self.assertLess(last, first)
        with self.assertRaisesRegex(ProgramError, "scores are for two classes"):
            main.evaluate(model, [(images, labels, weights)])
        with self.assertRaisesRegex(ProgramError, "are for two classes, .* not 3"):
            helper.Predictor(model, (32, 64))


# H.264, grey, 32x32, 50 frames of two fields each, which are packets of their own: no
# encoder that ffmpeg has makes such.
FIELDS = (
    b"T>t<81poj4|NsC0{{R4I{-I6?hgc$h$a|^^RHrX=&Q%Nfq~;-E;0!r~$({yYg}tOpo^4#O9F(Fz9"
    b"uKZg0wf&J11gt{&RHp;f(?DWfl?$%yL+N7oQBb|_gX0Yw|9E(a7Z<09dLa|Kq|kG_P__C)g1M~LJ"
    b"fnnplj~Oj!SUS16>}wuEX~iM}*zmQH7P;1uQ?~S%aS0#?Mv7bbC<lGGEpOWWR+Tsw*R_f(XjXe4P"
    b"<q)X*j1z)F}54rdl~zF5c0<C!893HT0lt112186k^I4K$t!(?N40xk?|If&I4&|M{X3Y5"
)


class Use(Program):
    """Images, videos and an exported model, with weights that were not trained long."""

    def setUp(self):
        super().setUp()
        self.noise = noise()
        run_dir = self.folder / "runs" / "0-0"
        shutil.copytree(self.half_road(), run_dir)
        self.weights = run_dir / "fcn8s.weights.h5"
        shutil.rmtree(self.folder / "data")
        for name in "maybe_download_kitti_road", "maybe_download_pretrained_vgg":
            self.patch(helper, name, mock.Mock(side_effect=AssertionError))

    @functools.cached_property
    def model(self):
        """The model of the weights."""
        return self.trained(self.folder / "runs" / "0-0")

    def use(self, *arguments):
        runs = ["--runs-dir", self.folder / "out"]
        return self.call("--weights", self.weights, *runs, *arguments)

    def export(self, *arguments):
        return self.call("--weights", self.weights, "--export", *arguments)

    def out(self):
        return max((self.folder / "out").glob("*"))

    def overlay(self, image):
        road = predict_road(self.model, image[None])[0]
        return helper.overlay(image, road)

    def pictures(self, *names):
        """Make a folder of images of noise."""
        for index, name in enumerate(names):
            path = self.folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(self.noise, index, axis=0)).save(path)
        return self.folder / "images"

    def test_no_other_worker_is_waited_for(self):
        cluster = {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}
        text = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}})
        waiting = mock.Mock(side_effect=AssertionError)
        self.patch(tf.distribute, "MultiWorkerMirroredStrategy", waiting)
        with mock.patch.dict(os.environ, TF_CONFIG=text):
            self.assertEqual(self.use("--predict", self.pictures("a.png"))[0], 0)

    def test_an_image_and_a_folder_keep_names_formats_and_sizes(self):
        images = self.folder / "images"
        images.mkdir()
        sizes = {"a.png": (90, 40), "b.PNG": (90, 40), "c.png": (31, 77)}
        for name, size in sizes.items():
            other = np.roll(self.noise, len(self.files(images)), axis=0)
            Image.fromarray(other).resize(size).save(images / name)
        Image.open(images / "a.png").save(images / "d.jpeg")
        Image.open(images / "a.png").save(images / "e.JPG")
        (images / "notes.txt").write_text("no image")
        (images / "._a.png").write_bytes(b"left by a Mac")
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        predictors = mock.Mock(side_effect=helper.Predictor)
        settings = "--batch-size=3", "--precision=float32"
        with (
            mock.patch.object(helper, "Predictor", predictors),
            mock.patch.object(helper, "compute_capability", return_value=(8, 0)),
        ):
            code, output, errors = self.use("--predict", images, *settings)
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(predictors.call_args.args[2], 3)
        self.assertIn(", float32\n", output)  # where "auto" is bfloat16
        self.assertIn(f"1 other file in {images} left alone\n", output)
        self.assertIn(f"building the network\nreading {self.weights}", output)
        self.assertRegex(output, r"5 overlays in .*-predict: .* a second")
        grey = [f"confidence/{name}.png" for name in "abcde"]
        expected = sorted([*sizes, "d.jpeg", "e.JPG", "confidence", *grey])
        self.assertEqual(self.files(self.out()), expected)
        road = predict_road(self.model, helper.read_image(images / "c.png")[None])[0]
        grey = np.asarray(Image.open(self.out() / "confidence/c.png"))
        np.testing.assert_array_equal(grey, np.round(255 * road))
        for name in sizes:
            expected = self.overlay(helper.read_image(images / name))
            np.testing.assert_array_equal(
                helper.read_image(self.out() / name), expected
            )
        for name in "d.jpeg", "e.JPG":
            self.assertEqual(Image.open(self.out() / name).format, "JPEG")
        changed = self.overlay(self.noise) != self.noise
        self.assertTrue(0.3 < changed.any(-1).mean() < 0.7)

    def test_files_folders_and_videos_go_together_and_none_meets_another(self):
        images = self.pictures("a.png", "x/a.png", "A.jpg", "y.png/b.png")
        os.mkfifo(images / "y.png" / "pipe.png")
        video = self.video(self.folder / "a.mkv", count=3)
        inputs = images, images / "x", images / "y.png", video
        result = self.use("--name", "mine", "--predict", *inputs)
        self.assert_line(result, "left out: .*pipe.png: not a regular file")
        self.assertEqual(self.out().name, "mine")
        names = ["A.jpg", "a-2.png", "a-3.png", "a-4.mp4", "b.png"]
        grey = [f"confidence/{name}.png" for name in ("A", "a-2", "a-3", "b")]
        self.assertEqual(self.files(self.out()), sorted([*names, "confidence", *grey]))

    def test_a_broken_image_is_named_at_the_end_and_the_rest_goes_on(self):
        images = self.folder / "images"
        images.mkdir()
        (images / "b.png").write_bytes(b"no image")
        for name in "a.png", "c.png":
            Image.new("RGB", (64, 32)).save(images / name)
        result = self.use("--predict", images)
        self.assert_line(result, "left out: .*b.png: not a readable image")
        self.assertIn("2 overlays", result[1])
        names = ["a.png", "c.png", "confidence/a.png", "confidence/c.png"]
        self.assertEqual(self.files(self.out()), sorted([*names, "confidence"]))

    def test_a_photograph_is_turned_upright(self):
        path = self.folder / "photograph.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held on its side
        picture = Image.new("RGB", (64, 32))
        picture.paste((255, 255, 255), (0, 0, 8, 8))
        picture.save(path, exif=exif, quality=100)
        upright = helper.read_image(path)
        self.assertEqual(upright.shape, (64, 32, 3))
        self.assertGreater(upright[3, 28, 0], 200)  # top left is now top right
        self.assertEqual(self.use("--predict", path)[0], 0)
        self.assertEqual(helper.read_image(self.out() / path.name).shape, (64, 32, 3))

    def video(self, path, size=(96, 48), rate=30, count=30, codec="libx264"):
        """Write a video whose frames grow brighter."""
        video = imageio_ffmpeg.write_frames(
            str(path),
            size,
            fps=rate,
            codec=codec,
            macro_block_size=1,
            pix_fmt_out="yuv444p",
            output_params=["-g", "10"],
        )
        video.send(None)
        for number in range(count):
            video.send(np.full((*size[::-1], 3), 8 * number % 240, np.uint8))
        video.close()
        return path

    def test_a_video_keeps_its_size_rate_and_number_of_frames(self):
        for size, rate, suffix in ((97, 43), 12.5, "avi"), ((96, 48), 30, "mkv"):
            path = self.video(self.folder / f"a:drive.{suffix}", size, rate)
            self.assertEqual(self.use("--predict", path)[0], 0)
            self.assertEqual(self.files(self.out()), ["a:drive.mp4"])
            target = str((self.out() / "a:drive.mp4").absolute())
            data, *frames = imageio_ffmpeg.read_frames(target)
            self.assertEqual((data["size"], data["fps"], len(frames)), (size, rate, 30))
            for brightness in 80, 160:  # in order, and tinted where the overlay is
                frame = np.full((*size[::-1], 3), brightness, np.uint8)
                ours = np.frombuffer(frames[brightness // 8], np.uint8)
                ours = ours.reshape(frame.shape).astype(float)
                self.assertLess(np.abs(ours - self.overlay(frame)).mean(), 12)

    def test_frames_that_are_missing_are_counted_and_what_is_there_is_kept(self):
        late = "video:10:6 -movflags faststart -output_ts_offset 5"
        for path in (
            self.video(self.folder / "cut.mkv", rate=10, count=60),
            self.ffmpeg("cut.mp4", late),
        ):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            result = self.use("--predict", path)
            said = rf"left out: .*{path.name}: \d+ of 60 frames are missing"
            self.assert_line(result, said)
            missing = int(re.search(r"(\d+) of 60", result[2])[1])
            self.assertTrue(10 < missing < 60)
            kept = helper.read_packets(str(self.out() / "cut.mp4"))[0]
            self.assertEqual(kept, 60 - missing)

    def test_a_video_that_breaks_off_keeps_all_frames_before(self):
        path, read = self.video(self.folder / "drive.mp4"), imageio_ffmpeg.read_frames

        def breaking(*args, **kwargs):
            """Give the facts and 20 frames, and fail as where ffmpeg is killed."""
            yield from itertools.islice(read(*args, **kwargs), 21)
            raise RuntimeError("Could not read frame 20:\nRead 8 bytes")

        self.patch(imageio_ffmpeg, "read_frames", breaking)
        said = "drive.mp4: it breaks off in .* a frame; .* 10 of 30 frames are missing"
        self.assert_line(self.use("--predict", path), said)
        kept = helper.read_packets(str(self.out() / "drive.mp4"))[0]
        self.assertEqual(kept, 20)

    def test_a_video_too_wide_for_mp4_is_named_at_the_end_and_the_rest_goes_on(self):
        wide = self.video(self.folder / "a.mkv", (16416, 32), count=1, codec="ffv1")
        broken = self.folder / "broken.png"
        broken.write_bytes(b"no image")
        good = self.video(self.folder / "b.mkv", count=3)
        result = self.use("--predict", broken, wide, good)
        said = "left out: .*broken.png: .*; .*a.mkv: 16416x32: .* 16,384 pixels a side"
        self.assert_line(result, said)
        self.assertEqual(self.files(self.out()), ["b.mp4"])

    def test_a_video_that_ffmpeg_leaves_half_written_is_not_kept(self):
        path, write = self.video(self.folder / "drive.mp4"), imageio_ffmpeg.write_frames

        def on_a_full_disk(target, *args, **kwargs):
            """Write all but the end, of which imageio_ffmpeg says nothing."""
            try:
                yield from write(target, *args, **kwargs)
            finally:
                os.truncate(target, os.path.getsize(target) // 2)

        self.patch(imageio_ffmpeg, "write_frames", on_a_full_disk)
        self.assert_line(
            self.use("--predict", path), r"drive.mp4: ffmpeg wrote 0 of 30 .*make room"
        )
        self.assertEqual(list((self.folder / "out").rglob("*.mp4")), [])

    def test_a_trimmed_video_has_the_frames_that_it_shows(self):
        self.video(self.folder / "whole.mp4", rate=10, count=60)
        # from 1.0 s on, the key frame before
        path = self.ffmpeg("trimmed.mp4", "-ss 1.8 -i whole.mp4 -t 1 -c copy")
        count = sum(1 for _ in imageio_ffmpeg.read_frames(str(path))) - 1
        self.assertTrue(9 <= count <= 13)
        self.assertEqual(self.use("--predict", path)[0], 0)
        data, *frames = imageio_ffmpeg.read_frames(str(self.out() / "trimmed.mp4"))
        self.assertEqual((data["fps"], len(frames)), (10, count))

    def ffmpeg(self, name, arguments):
        """Make a video; "video:10:2" is an input of 10 frames a second, 2 s long."""
        video = r"-f lavfi -i testsrc=size=96x48:rate=\1:duration=\2"
        arguments = re.sub(r"video:(\d+):(\d+)", video, arguments)
        arguments = re.sub(r"sound:(\d+)", r"-f lavfi -i sine=duration=\1", arguments)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error"]
        subprocess.run(
            [*command, *arguments.split(), name], check=True, cwd=self.folder
        )
        return self.folder / name

    def test_whole_videos_of_all_kinds_keep_their_rate_and_are_not_called_damaged(self):
        self.ffmpeg("film.mp4", "video:10:12 sound:12")
        self.ffmpeg("still.mp4", "video:10:2")
        self.ffmpeg("plain.mp4", "video:10:2 -bf 0")
        vp8 = "video:25:3 -c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -b:v 200k"
        self.ffmpeg("first.webm", f"{vp8} -pass 1")
        offsets = {"first.ts": 0, "second.ts": 1000}  # at which the joined clock jumps
        parts = [
            self.ffmpeg(name, f"video:10:2 -output_ts_offset {offset}").read_bytes()
            for name, offset in offsets.items()
        ]
        (self.folder / "joined.ts").write_bytes(b"".join(parts))
        fields = lzma.decompress(base64.b85decode(FIELDS))
        (self.folder / "fields.h264").write_bytes(fields)
        jitter = r"settb=1/1000,setpts=N*40+mod(N*7\,5) -enc_time_base 1:1000"
        early = r"if(eq(NEXT_PTS\,PTS)\,PTS-39\,PTS)"  # those right after the last
        trim = "-ss 5 -i film.mp4 -t 6 -c copy"  # from the key frame before on
        expected = {}  # of each: rate and number of frames
        for name, rate, arguments in (
            ("few.mp4", 5, "video:5:2"),  # whose B-frames are a large part of it
            ("slow.mp4", 1, "video:1:5"),
            ("sound.mp4", 10, "video:10:2 sound:4"),
            ("late.mkv", 10, "-itsoffset 2 -i still.mp4 -c copy"),
            ("doubled.mkv", 10, "-i plain.mp4 -c copy -r 5"),  # states half its rate
            ("two.mkv", 10, "video:10:2 video:10:4 -map 0 -map 1"),
            ("bound.mkv", 20.15, r"video:25:4 -vf select=mod(n+1\,5) -fps_mode vfr"),
            ("jitter.webm", 24.99, f"video:28:3 -vf {jitter} -fps_mode passthrough"),
            ("hidden.webm", 25, f"{vp8} -pass 2"),  # some of its packets show nothing
            ("vpxenc.webm", 25, f"-i hidden.webm -c copy -bsf:v setts=ts={early}"),
            ("trimmed.mp4", 10, trim),
            ("trimmed-mkv.mkv", 10, trim),
            ("trimmed-ts.ts", 10, trim),
            ("joined.ts", 10, None),
            ("fields.ts", 25, "-framerate 25 -i fields.h264 -c copy"),
        ):
            path = self.folder / name
            if arguments:
                self.ffmpeg(name, arguments)
            every = ["-map", "0:V:0", "-fps_mode", "passthrough"]
            frames = imageio_ffmpeg.read_frames(str(path), output_params=every)
            expected[path] = rate, sum(1 for _ in frames) - 1
        code, _, errors = self.use("--predict", *expected)
        self.assertEqual((code, errors), (0, ""))
        for path, facts in expected.items():
            with self.subTest(path.name):
                written = str(self.out() / f"{path.stem}.mp4")
                data, *frames = imageio_ffmpeg.read_frames(written)
                self.assertEqual((data["fps"], len(frames)), facts)

    def test_a_sound_that_cannot_be_copied_hinders_no_video(self):
        read = helper.read_packets

        def without_sound(path, *others):
            if others:
                raise ValueError("sample rate not set")
            return read(path)

        path = self.video(self.folder / "a.mkv", rate=10, count=20)
        self.patch(helper, "read_packets", without_sound)
        self.assertEqual(helper.seconds_lost(str(path), stated=5, end=2), 3)
        self.assertEqual(self.use("--predict", path)[0], 0)

    def test_a_video_has_its_colours_and_says_which_they_are(self):
        path, colours = self.folder / "a.mp4", np.eye(3, dtype=np.uint8) * 255
        frames = [np.broadcast_to(colour, (48, 96, 3)).copy() for colour in colours]
        helper.write_video(path, frames, (96, 48), 10)
        _, *found = imageio_ffmpeg.read_frames(str(path))
        for ours, frame in zip(found, frames, strict=True):
            ours = np.frombuffer(ours, np.uint8).reshape(frame.shape)
            np.testing.assert_allclose(ours, frame.astype(float), atol=4)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path]
        said = subprocess.run(command, capture_output=True, check=False).stderr
        self.assertIn(b"yuv420p(tv, bt709", said)

    def test_a_video_of_pixels_that_are_not_square_keeps_its_shape(self):
        turn = "-display_rotation 90 -i wide.mp4 -c copy"
        paths, sizes = [], []
        for name, size, arguments in (
            ("wide.mp4", (128, 48), "video:10:1 -vf setsar=4/3"),
            ("ntsc.mp4", (114, 48), "video:10:1 -vf setsar=32/27"),  # 113.8
            ("upright.mp4", (36, 96), turn),  # a pixel is 3/4 as wide as high by then
        ):
            paths.append(self.ffmpeg(name, arguments))
            sizes.append(size)
        self.assertEqual(self.use("--predict", *paths)[0], 0)
        for path, size in zip(paths, sizes):
            data, *frames = imageio_ffmpeg.read_frames(str(self.out() / path.name))
            self.assertEqual((data["size"], len(frames)), (size, 10))

    def test_a_video_that_cannot_be_written_leaves_the_others(self):
        names = ["n" * 252 + ".ts", "z.mkv"]  # an mp4's name would be too long
        paths = [self.video(self.folder / name) for name in names]
        result = self.use("--predict", *paths)
        self.assert_line(
            result, r"left out: .*n\.ts: cannot be written \(File name too long\)$"
        )
        self.assertEqual(self.files(self.out()), ["z.mp4"])

    def test_a_video_leaves_standard_input_to_others(self):
        ffmpeg = self.folder / "ffmpeg"  # it reads commands, where it takes a while
        lines = "#tb 0: 1/10", "0, 0, 0, 10, 5, 0x1"
        ffmpeg.write_text("\n".join(["#!/bin/sh", "cat >&2; cat <<E", *lines, "E\n"]))
        ffmpeg.chmod(0o755)
        self.patch(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(ffmpeg))
        inbox, outbox = os.pipe()
        os.write(outbox, b"next.mp4\n")
        os.close(outbox)
        saved = os.dup(0)
        try:
            os.dup2(inbox, 0)
            self.assertEqual(helper.read_packets("drive.mp4"), (1, 0, 1, 1))
        finally:
            os.dup2(saved, 0)
            os.close(saved)
        self.assertEqual(os.read(inbox, 100), b"next.mp4\n")
        os.close(inbox)

    def test_a_video_of_varying_rate_keeps_its_length(self):
        select = "select='not(mod(n,100))*lt(n,1500)+not(mod(n,250))'"
        path = self.ffmpeg("drive.webm", f"video:1000:3 -fps_mode vfr -vf {select}")
        expected = imageio_ffmpeg.count_frames_and_secs(str(path))
        self.assertEqual(self.use("--predict", path)[0], 0)
        ours = imageio_ffmpeg.count_frames_and_secs(str(self.out() / "drive.mp4"))
        self.assertEqual(ours[0], expected[0])
        self.assertAlmostEqual(ours[1], expected[1], delta=0.3)

    def test_a_full_disk_leaves_no_half_picture(self):
        def half(path, content):
            with path.open("wb") as file:
                file.write(content[:100])
            raise OSError(28, "No space left on device")

        self.patch(Path, "write_bytes", half)
        with self.assertRaises(OSError):
            helper.save_image(self.noise, self.folder / "x.png")
        self.assertEqual(list(self.folder.glob("*x.png")), [])

    def test_a_full_disk_ends_it_all(self):
        full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        self.patch(helper, "save_image", full)
        result = self.use("--predict", self.pictures("a.png", "b.png"))
        self.assert_line(result, "^the disk: No space left on device: make room")
        self.assertEqual(list((self.folder / "out").iterdir()), [])

    def test_what_cannot_be_used_is_refused_with_one_line(self):
        for path, said in (
            (self.folder / "none.mp4", "none.mp4: no such file"),
            (self.folder / f"{'a' * 300}.png", "aa.png: no such file"),
            (self.weights.parent / "run.json", "run.json: not .png, .jpg, .jpeg or a"),
            (self.folder, "no .png, .jpg, .jpeg or a video"),
        ):
            result = self.use("--predict", path)
            self.assert_line(result, re.escape(said))
            self.assertNotIn("building", result[1])  # before anything takes time
        many = [self.folder / f"{number}.mp4" for number in range(23)]
        images = self.pictures("a.png")
        self.assert_line(self.use("--predict", images, *many), "folder; and 3 more$")
        shutil.rmtree(self.folder / "out")
        result = self.use("--name=a/b", "--predict", self.pictures("a.png"))
        self.assert_line(result, "--name a/b: not the plain name of a folder")
        self.assertNotIn("building", result[1])
        self.assertEqual(list((self.folder / "out").glob("*")), [])
        for setting in "--demo", "--epochs=3", "--resume=runs":
            result = self.use("--predict", self.folder, setting)
            self.assert_line(result, f"{setting.partition('=')[0]} does not go with", 2)
        for setting in "--epochs=3", "--name=out", "--batch-size=3", "--runs-dir=runs":
            result = self.export(self.folder / "saved", setting)
            said = f"^{setting.partition('=')[0]} does not go with --export"
            self.assert_line(result, said, 2)
        result = self.call("--weights", self.folder, "--predict", self.folder)
        self.assert_line(result, "no such file: name a run's folder or its fcn8s.weig")
        for flag in "--predict", "--export":
            self.assert_line(self.call(flag, self.folder), "need --weights", 2)

    def test_weights_say_what_they_are_of_and_need_no_run_beside_them(self):
        images, alone = self.pictures("a.png"), self.folder / "copied.weights.h5"
        expected = self.overlay(helper.read_image(images / "a.png"))
        shutil.copy(self.weights, alone)
        for weights in alone, self.weights.parent:  # a run's folder does as well
            self.weights = weights
            self.assertEqual(self.use("--predict", images)[0], 0)
            ours = helper.read_image(self.out() / "a.png")
            np.testing.assert_array_equal(ours, expected)
        self.weights = alone

        def of(**settings):
            return {"config": WEIGHTS_OF | settings}

        for said, facts in (
            (
                r"its classes are \['cat', 'road'\]",
                {"network": {"classes": ["cat", "road"]}},
            ),
            (
                r"its pool_scales are None, not \[0.01, 0.1\]",  # of an older version
                {"network": {"classes": main.CLASSES}},
            ),
            (r"its input size is \(33, 96\)", of(image_height=33)),
            (r"its input size is \(32, '96'\)", of(image_width="96")),
            ("its hold-out fraction is 2", of(holdout_fraction=2)),
            ("'image_height'", {"config": {}}),
        ):
            save_weights(self.model, alone, **facts)
            self.assert_line(
                self.use("--predict", images), f"copied.weights.h5: not .*{said}"
            )
        self.model.save_weights(self.folder / "older.weights.h5")
        self.weights = self.folder / "older.weights.h5"
        said = "older.weights.h5: not .*does not say its input size.*: name the fcn"
        self.assert_line(self.use("--predict", images), said)

    def test_an_export_that_could_not_be_loaded_is_refused(self):
        for name in os.fsdecode(b"model\xff"), "model[1]":
            folder = self.folder / name
            self.assert_line(self.export(folder), "name another folder with --export")
            self.assertFalse(folder.exists())

    def test_an_exported_model_is_the_program_bit_for_bit(self):
        folder = self.folder / "saved"
        self.assertEqual(self.export(folder)[0], 0)
        loaded = tf.saved_model.load(folder)
        rng = np.random.default_rng(0)
        shapes = (1, 60, 40, 3), (1, 300, 200, 3), (2, 75, 131, 3), (1, 800, 100, 3)
        for shape in *shapes, (5, 300, 200, 3):
            images = rng.integers(0, 256, shape, np.uint8)
            ours = loaded.signatures["serving_default"](tf.constant(images))["road"]
            np.testing.assert_array_equal(ours, predict_road(self.model, images))
            self.assertEqual(ours.dtype, tf.float32)
        result = self.export(folder)
        self.assert_line(result, "saved: exists")
        self.assertNotIn("building", result[1])


# ------------------------------------------------------------------------ report


class Elements(html.parser.HTMLParser):
    """A page's elements (tag, attributes, text inside), in order; all are closed."""

    EMPTY = "meta", "img", "br", "path", "rect", "polyline"

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in self.EMPTY:
            self.open.append(self.found[-1])

    def handle_startendtag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        self.text += data
        for element in self.open:
            element[2] += data

    def all(self, tag, kind=None):
        """Return (attributes, text) of the elements of a tag, and of a class."""
        return [
            (attributes, text)
            for name, attributes, text in self.found
            if name == tag and kind in (None, *attributes.get("class", "").split())
        ]


def epochs(count):
    """Return a history of `count` epochs."""
    return [
        {"epoch": epoch, "step": 10 * epoch, "loss": 2.0 / epoch, "l2": 0.1}
        | {"gradient_norm": 50.0 / epoch, "seconds": 9.0, "images_per_second": 5.0}
        | {"holdout_loss": 1.0 / epoch, "MaxF": 90 - 20 / epoch, "accuracy": 97.0}
        | {"IoU": 80 - 20 / epoch, "learning_rate": 0.001 * (1 - epoch / 50)}
        for epoch in range(1, count + 1)
    ]


def a_record(**changes):
    """Return the record of a finished run of three epochs, with `changes`."""
    precision = np.linspace(40, 100, 256)
    recall = 100 - np.linspace(0, 9.9, 256) ** 2
    curve = np.stack([recall, precision], axis=-1)
    best = 200
    measures = {"images": 2, "MaxF": 87.654, "AP": 85.123, "PRE": curve[best, 1]}
    measures |= {"REC": curve[best, 0], "FPR": 1.5, "FNR": 2.5, "IoU": 78.901}
    measures |= {"threshold": 100 * best / 255, "IoU50": 77.7, "accuracy": 98.765}
    defaults = {"epochs": 50, "batch_size": 5, "image_height": 160, "image_width": 576}
    defaults |= {"l2": 0.001, "vgg": "downloaded", "weights": None, "xla": False}
    holdout = {
        "um_000001": {"category": "um", "IoU50": 90.5, "missed": 1.25, "false": 0.75},
        "uu_000002": {"category": "uu", "IoU50": 40.25, "missed": 33.5, "false": 2.5},
        "um_000003": {"category": "um", "IoU50": 70.0, "missed": 3.0, "false": 4.0},
    }
    record = {"state": "finished", "seconds": 3725.4}
    record |= {"trained": True, "seen_before": [], "seen_holdout": 0}
    record |= {"started": "2026-11-24 13:00:05", "updated": "2026-11-24 14:02:11"}
    record |= {"command": "python main.py --epochs 3", "peak_memory": 9_120_000_000}
    record |= {"config": defaults | {"epochs": 3, "l2": 0.5}, "defaults": defaults}
    record |= {"network": main.NETWORK, "versions": {"keras": "3.15.1"}}
    record["device"] = {"name": "TPU v9", "replicas": 2, "workers": 1, "xla": False}
    record |= {"data": {"training": 30, "holdout": 3, "test": 2}, "images": "0a1b"}
    record |= {"resumed": [20]}
    record |= {"history": epochs(3), "holdout": holdout}
    image = {"um": measures, "urban": measures}
    record["scores"] = {"image": image, "bev": {"um": measures}}
    record["curves"] = {"um": curve.tolist(), "urban": curve.tolist()}
    return record | changes


class Folder(Case):
    def setUp(self):
        super().setUp()
        self.folder = self.folder / "runs" / "20261124-130005"
        self.folder.mkdir(parents=True)

    def picture(self, name):
        """Write a picture into the run's folder."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 10)).save(self.folder / name)

    def page(self, **changes):
        return Elements(helper.report(self.folder, a_record(**changes)))


class Pictures(unittest.TestCase):
    def test_an_overlay_is_seen_on_everything_and_lets_it_through(self):
        road = np.zeros((20, 30), np.float32)
        road[4:16, 5:25] = 0.5
        found = road >= 0.5
        colours = (70, 110, 40), (150, 180, 60), (100, 100, 100), (5, 8, 5)
        for colour in *colours, (250, 250, 250), (130, 200, 255):
            image = np.full((20, 30, 3), colour, np.uint8)
            image[10, 15] += 5  # a lane mark
            result = helper.overlay(image, road)
            self.assertEqual(result.dtype, np.uint8)
            np.testing.assert_array_equal(result[~found], image[~found])
            change = np.abs(result.astype(int) - image).max(-1)
            self.assertGreater(change[found].min(), 50, colour)
            edge = (result == helper.ROAD).all(-1)
            expected = found.copy()
            expected[6:14, 7:23] = False  # two pixels
            np.testing.assert_array_equal(edge, expected)
            self.assertTrue((result[10, 15] != result[9, 15]).any())

    def test_an_overlay_takes_little_memory(self):
        image = np.zeros((375, 1242, 3), np.uint8)
        road = np.ones((375, 1242), np.float32)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        helper.overlay(image, road)
        peak = tracemalloc.get_traced_memory()[1]
        self.assertLess(peak, 4 * image.nbytes)

    def test_every_kind_of_error_looks_different(self):
        image = np.full((40, 60, 3), (90, 140, 60), np.uint8)
        label, found = np.zeros((40, 60), np.uint8), np.zeros((40, 60), bool)
        label[:, 20:40], label[:, 40:] = 1, VOID
        found[20:, 10:50] = True
        before = image.copy()
        picture = helper.error_picture(image, found, label)
        np.testing.assert_array_equal(image, before)
        self.assertEqual((picture.dtype, picture.shape), (np.uint8, image.shape))

        def colours(rows, columns):
            return set(map(tuple, picture[rows, columns].reshape(-1, 3).tolist()))

        top, low = slice(20), slice(20, None)
        right = {(90, 140, 60)}
        self.assertEqual(colours(top, slice(20)), right)
        self.assertEqual(colours(low, slice(10)), right)
        self.assertEqual(colours(low, slice(10, 20)), {helper.FALSE})
        self.assertEqual(colours(top, slice(21, 39)), {helper.MISSED})
        self.assertEqual(colours(low, slice(21, 39)), right)
        for column in 20, 39:
            self.assertEqual(colours(slice(None), column), {helper.TRUTH})
        void = colours(slice(None), slice(40, None))
        self.assertEqual(len(void), 2)  # hatched, whatever was found there
        self.assertFalse(void & {*right, helper.MISSED, helper.FALSE, helper.TRUTH})
        self.assertEqual(
            len({helper.MISSED, helper.FALSE, helper.TRUTH, helper.ROAD}), 4
        )

    def test_290_thumbnails_are_less_than_10_mb(self):
        image = helper.draw_scene("um", np.random.default_rng(0))[0]
        pixels = np.asarray(image)
        small = helper.thumbnail(pixels)
        self.assertEqual(small.dtype, np.uint8)
        self.assertGreaterEqual(small.shape[1], 400)
        ratio = pixels.shape[1] / pixels.shape[0]
        self.assertAlmostEqual(small.shape[1] / small.shape[0], ratio, delta=0.02)
        content = io.BytesIO()
        Image.fromarray(small).save(content, "JPEG", quality=92)
        self.assertLess(290 * len(content.getvalue()), 10e6)
        tiny = np.zeros((7, 20, 3), np.uint8)
        self.assertEqual(helper.thumbnail(tiny).shape, (7, 20, 3))
        self.assertEqual(helper.thumbnail(np.zeros((1, 9000, 3), np.uint8)).shape[0], 1)


class RunPage(Folder):
    def test_the_headline_says_what_came_out(self):
        cards = " ".join(text for _, text in self.page().all("dl", "cards"))
        for words in (
            "87.65 %",
            "78.90 %",
            "1:02:05",
            "9.12 GB",
            "Epochs3 of 3",
            "at MaxF's",
        ):
            self.assertIn(words, cards)
        facts = self.page().all("dl", "facts")[0][1]
        for words in (
            *("2026-11-24 13:00:05", "TPU v9, 2 replicas\nImages"),
            *("python main.py --epochs 3",),
            *("30 training, 3 hold-out, 2 test", "Resumed at step20"),
        ):
            self.assertIn(words, facts)

    def test_states_are_told_apart_and_only_a_running_page_reloads(self):
        for state in "running", "stopped", "failed", "finished":
            page = self.page(state=state)
            self.assertEqual([text for _, text in page.all("span", "state")], [state])
            self.assertEqual(len(page.all("span", state)), 1)
            refresh = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
            self.assertEqual(refresh, ["30"] * (state == "running"))
            self.assertEqual("--resume" in page.text, state != "finished")
            self.assertEqual("after a kill" in page.text, state == "running")

    def test_a_run_without_scores_shows_the_last_epoch_and_one_without_any_nothing(
        self,
    ):
        history = epochs(2)
        history[1] |= {"MaxF": 60.0, "IoU": 50.0}  # worse than the first
        page = self.page(scores={}, holdout={}, curves={}, history=history)
        cards = page.all("dl", "cards")[0][1]
        self.assertIn("60.00 %", cards)
        self.assertIn("50.00 %", cards)
        self.assertIn("at the network's size", cards)
        for history in [], [{"epoch": 1, "step": 9, "loss": 0.5, "gradient_norm": 2.0}]:
            page = self.page(scores={}, holdout={}, history=history)
            cards = page.all("dl", "cards")[0][1]
            self.assertIn("MaxF–", cards)
            self.assertIn(f"Epochs{len(history)} of 3", cards)
            self.assertEqual(len(page.all("polyline")), 2 * len(history))

    def test_every_measure_is_shown_and_explained(self):
        page = self.page()
        image, bev = (text for _, text in page.all("table", "scores"))
        for name, value in a_record()["scores"]["image"]["um"].items():
            self.assertIn(helper.MEASURES[name], image)
            self.assertIn(name, bev)
            self.assertIn(f"{value:.2f}" if name != "images" else "2", bev)
        self.assertIn("from above", page.text)

    def test_one_epoch_is_a_dot(self):
        page = self.page(history=epochs(1), curves={})
        dots = [a for a, _ in page.all("circle")]
        self.assertEqual(len(dots), 6)  # two losses, two shares, rate, norm
        axis = float(page.all("path", "grid")[0][0]["d"][1:].split()[0])
        for dot in dots:
            self.assertGreaterEqual(float(dot["r"]), 4)
            self.assertGreater(float(dot["cx"]) - float(dot["r"]), axis)

    def test_tick_labels_are_apart_and_differ(self):
        cases = [(0.5,), (0.0,), (0.001, 0.0009), (96.1, 96.1001), (1e-7, 1e20)]
        cases += [(3e38, 1e-12), (0.04, 0.7, 0.3), (1e-9,), tuple(range(1, 13))]
        cases += [tuple(range(1, count)) for count in (51, 100, 778)]
        for values in cases:
            for log in False, True:
                if max(values) > 1e9 and not log:
                    continue
                line = [(index + 1, value) for index, value in enumerate(values)]
                svg = Elements(helper.chart("t", {"a": line}, log))
                texts = [(float(a["x"]), float(a["y"]), a["class"], words)
                         for a, words in svg.all("text")]  # fmt: skip
                up = [(y, words) for _, y, kind, words in texts if kind == "end"][:-1]
                across = [(x, w) for x, y, k, w in texts if k == "middle" and y > 200]
                for places, room_for in (
                    (up, lambda _: 13),
                    (across, lambda w: 7 * len(w)),
                ):
                    words = [word for _, word in places]
                    self.assertEqual(len(set(words)), len(words), words)
                    places = sorted(places)
                    for (a, _), (b, word) in itertools.pairwise(places):
                        self.assertGreaterEqual(b - a, room_for(word) + 1, words)
                self.assertGreaterEqual(len(up), 2)
                self.assertGreaterEqual(len(across), 1)
                for dot, _ in svg.all("circle"):
                    self.assertTrue(20 < float(dot["cy"]) < 226, (values, dot))

    def test_curves_are_drawn_to_scale(self):
        for log, values in (False, (50, 100, 75)), (True, (1, 0.01, 0.1)):
            svg = helper.chart("t", {"a": list(zip((1, 2, 3), values))}, log)
            points = re.search('points="([^"]+)"', svg)[1].split()
            x, y = np.array([point.split(",") for point in points], float).T
            np.testing.assert_allclose(np.diff(x, 2), 0, atol=0.11)
            self.assertAlmostEqual(abs(y[2] - y[0]), abs(y[1] - y[0]) / 2, delta=0.11)
            self.assertEqual((y[1] < y[0], len(set(y))), (not log, 3))

    def test_epochs_without_hold_out_leave_a_gap_in_its_lines_only(self):
        history = epochs(4)
        del history[1]["MaxF"]
        lines = [
            len(a["points"].split())
            for a, _ in self.page(history=history, curves={}).all("polyline")
        ]
        self.assertEqual(lines, [4, 4, 3, 4, 4, 4])

    def test_precision_over_recall_has_a_line_a_category_and_maxf_on_it(self):
        record = a_record(history=[])
        page = Elements(helper.report(self.folder, record))
        lines = [a["points"].split() for a, _ in page.all("polyline")]
        self.assertEqual(len(lines), 2)
        self.assertEqual(len(lines[0]), 256)
        for (dot, words), line in zip(page.all("circle"), lines, strict=True):
            x, y = line[200].split(",")
            self.assertAlmostEqual(float(dot["cx"]), float(x), delta=0.11)
            self.assertAlmostEqual(float(dot["cy"]), float(y), delta=0.11)
            self.assertIn("dot at 78.4 %", words)
        measures = {"REC": 95.0, "PRE": 95.0, "threshold": 50.0}
        near = helper.recall_chart({"um": [[95.0, 95.0]]}, {"um": measures})
        self.assertLess(float(Elements(near).all("circle")[0][0]["cx"]), 400)
        bad = {"REC": 20.0, "PRE": 30.0, "threshold": 50.0}
        far = Elements(helper.recall_chart({"um": [[20.0, 30.0]]}, {"um": bad}))
        ticks = [text for _, text in far.all("text", "middle")]
        self.assertEqual(ticks[0], "0")  # there is no precision below
        self.assertEqual(len({a["class"] for a, _ in page.all("circle")}), 2)
        record["curves"]["um"][255] = [0.0, 0.0]  # nothing is found: no precision
        page = Elements(helper.report(self.folder, record))
        self.assertEqual(len(page.all("polyline")[0][0]["points"].split()), 255)

    def test_errors_come_from_worst_to_best_with_both_pictures(self):
        for name in a_record()["holdout"]:
            self.picture(f"errors/{name}.jpg")
            self.picture(f"errors/{name}_errors.jpg")
        page = self.page()
        worst_first = ["uu_000002", "um_000003", "um_000001"]
        sources = [a["src"] for a, _ in page.all("img")]
        ends = "", "_errors"
        self.assertEqual(
            sources, [f"errors/{n}{end}.jpg" for n in worst_first for end in ends]
        )
        captions = [text for _, text in page.all("figcaption") if "missed" in text]
        self.assertEqual([text[:9] for text in captions], worst_first)
        for words in "uu", "IoU 40.25 %", "33.50 % of the road", "2.50 % of the rest":
            self.assertIn(words, captions[0])
        keys = [a["style"] for a, _ in page.all("i") if "style" in a]
        for colour in helper.MISSED, helper.FALSE, helper.TRUTH, helper.ROAD:
            self.assertEqual(sum(str(colour) in key for key in keys), 1)
        self.assertTrue(any("gradient" in key for key in keys))

    def test_test_images_are_small_lazy_and_lead_to_the_png(self):
        self.picture("um_1.png")
        self.picture("um_2.png")
        self.picture("thumbnails/um_1.jpg")
        page = self.page()
        images = [(a["src"], a["loading"], a["width"]) for a, _ in page.all("img")]
        small = ("thumbnails/um_1.jpg", "lazy", "30")
        self.assertEqual(images, [small, ("um_2.png", "lazy", "30")])
        links = [a["href"] for a, _ in page.all("a")]
        self.assertEqual(links, ["um_1.png", "um_2.png"])

    def test_settings_that_differ_come_first_and_each_comes_once(self):
        self.assertEqual(helper.differing(a_record()), ["epochs", "l2"])
        page = self.page(device={"name": "x", "replicas": 1, "workers": 1, "xla": True})
        rows = [(a.get("class"), text) for a, text in page.all("div")]
        names = [*a_record()["config"]]
        rows = [row for row in rows if row[1].startswith(tuple(names))]
        self.assertEqual(len(rows), len(names))
        first = [(None, "epochs3 default 50"), (None, "l20.5 default 0.001")]
        self.assertEqual(rows[:2], first)
        self.assertEqual({kind for kind, _ in rows[2:]}, {"dim"})
        self.assertIn(("dim", "xlano, here yes"), rows)
        paths = a_record(config={"data": Path("x/y")}, defaults={"data": "x/y"})
        self.assertEqual(helper.differing(paths), [])

    def test_nothing_is_taken_for_html_and_all_is_in_the_file(self):
        evil = "<b>&\"'#?%"

        def spoil(value):
            if isinstance(value, dict):
                known = {*helper.MEASURES, "image", "bev", "urban"}
                return {
                    name if name in known else name + evil * (name in ("um", "l2"))
                    : spoil(inside)
                    for name, inside in value.items()
                }  # fmt: skip
            return value + evil if isinstance(value, str) else value

        record = spoil(a_record()) | {"state": "stopped"}
        record["holdout"] = {
            evil: {"category": evil, "IoU50": 1.0, "missed": 2.0, "false": 3.0}
        }
        broken = os.fsdecode(b"um_\xff")
        record["holdout"][broken] = record["holdout"][evil]
        self.folder = self.folder.rename(self.folder.with_name(f"run {evil}"))
        for name in evil, broken:
            for path in f"errors/{name}.jpg", f"{name}.png", f"thumbnails/{name}.jpg":
                self.picture(path)
        text = helper.report(self.folder, record)
        text.encode("utf-8")
        page = Elements(text)
        tags = {tag for tag, *_ in page.found}
        self.assertFalse(tags & {"script", "link", "iframe"})
        self.assertEqual(len(page.all("b")), 7)  # 5 charts and 2 settings
        names = [a for a, _ in page.all("img")]
        self.assertEqual(len(names), 4)
        self.assertEqual({a["alt"] for a in names}, {evil, "um_?"})
        self.assertEqual(page.text.count(f"l2{evil}"), 1)
        for attributes in names + [a for a, _ in page.all("a")]:
            address = attributes.get("src") or attributes["href"]
            self.assertNotRegex(address, r"[:#?<\"']")
            path = (
                os.fsencode(self.folder) + b"/" + urllib.parse.unquote_to_bytes(address)
            )
            self.assertTrue(os.path.isfile(path), path)


class Overview(Folder):
    def write(self, name, record):
        """Write a run's folder beside the others."""
        folder = self.folder.parent / name
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(
            record if isinstance(record, str) else json.dumps(record)
        )

    def rows(self):
        """Return the texts of the overview's cells, and the page."""
        page = helper.overview(self.folder.parent)
        page.encode("utf-8")
        page = Elements(page)
        cells = [text for _, text in page.all("td")]
        count = len(page.all("th"))
        return [cells[at : at + count] for at in range(0, len(cells), count)], page

    def test_runs_are_compared_the_newest_first(self):
        config = a_record()["config"]
        self.write("20261124-130005", a_record())
        other = {"batch_size": 10, "epochs": 40, "weights": "a/b.h5", "xla": True}
        self.write(
            "my run",
            a_record(
                state="stopped",
                scores={},
                config=config | other,
                started="2026-12-01 00:00:00",
            ),
        )
        self.write(
            "20261130-000000",
            a_record(state="failed", seconds=9, started="2026-11-30 00:00"),
        )
        (self.folder.parent / "20261201-111111").mkdir()  # predictions
        (self.folder.parent / "index.html").write_text("")
        rows, page = self.rows()
        self.assertEqual(
            rows,
            [
                ["my run", "stopped", "2026-12-01 00:00", "~83.33", "~73.33"]
                + ["3 of 40", "10", "160x576", "a/b.h5", "1:02:05", "l2 0.5, xla yes"],
                ["20261130-000000", "failed", "2026-11-30 00:00", "87.65", "78.90"]
                + ["3", "5", "160x576", "VGG-16", "0:00:09", "l2 0.5"],
                ["20261124-130005", "finished", "2026-11-24 13:00", "87.65", "78.90"]
                + ["3", "5", "160x576", "VGG-16", "1:02:05", "l2 0.5"],
            ],
        )
        links = [a["href"] for a, _ in page.all("a")]
        self.assertEqual(links[0], "my%20run/index.html")
        self.assertEqual(links[2], "20261124-130005/index.html")
        self.assertEqual(len(page.all("td")), 3 * len(page.all("th")))
        self.assertIn(helper.MEASURES["MaxF"], page.text)

    def test_a_page_of_the_users_own_stays(self):
        page = self.folder.parent / "index.html"
        page.write_text("my own")
        helper.write_overview(page.parent)
        self.assertEqual(page.read_text(), "my own")
        page.unlink()
        for name in "first", "second":
            self.write(name, a_record())
            helper.write_overview(page.parent)
            self.assertIn(f"{name}/index.html", page.read_text())
        for rest in b"", bytes(5000):  # what a power cut may leave of our own
            page.write_bytes(rest)
            helper.write_overview(page.parent)
            self.assertIn("second/index.html", page.read_text())

    def test_a_run_that_was_killed_is_not_called_running(self):
        record = a_record(state="running")
        for name in "at work", "killed", "copied":
            self.write(name, record)
        lock = self.folder.parent / "killed/checkpoint/.run.lock"
        lock.parent.mkdir()
        lock.touch()  # as a kill leaves it
        with helper.locked(self.folder.parent / "at work/checkpoint/run"):
            states = {name: state for name, state, *_ in self.rows()[0]}
        self.assertEqual(states.pop("at work"), "running")
        self.assertEqual(states, {"killed": "stopped", "copied": "stopped"})
        self.assertTrue(lock.exists())

    def test_a_run_that_ends_while_it_is_looked_at_is_not_called_stopped(self):
        record, read = a_record(state="running"), helper.read_run
        self.write("at work", record)
        lock = helper.locked(self.folder.parent / "at work/checkpoint/run")
        lock.__enter__()

        def end_after(path):
            before = read(path)
            self.write("at work", a_record())
            lock.__exit__(None, None, None)
            return before

        with mock.patch.object(helper, "read_run", end_after):
            self.assertEqual(self.rows()[0][0][1], "running")
        self.assertEqual(self.rows()[0][0][1], "finished")

    def test_a_damaged_record_is_a_grey_row(self):
        whole = json.dumps(a_record())
        texts = ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 10**5, whole[:-9]]
        texts.append(whole.replace("3725.4", "1" + "0" * 5000))
        texts.append(whole.replace('"epoch": 1', '"epoch": true'))
        texts += [
            json.dumps(a_record(state="<b>")),
            json.dumps(a_record(peak_memory=-1)),
        ]
        for index, text in enumerate(texts):
            self.write(f"d{index}", text)
        (self.folder / "run.json").write_bytes(b'{"state": "\xff"}')
        (self.folder.parent / "folder/run.json").mkdir(parents=True)
        (self.folder.parent / "lost").mkdir()
        (self.folder.parent / "lost/run.json").symlink_to("nowhere")
        rows, page = self.rows()
        self.assertEqual(len(rows), len(texts) + 3)
        self.assertEqual({row[1] for row in rows}, {"damaged"})
        self.assertEqual(len(page.all("tr", "damaged")), len(rows))

    def test_wrong_types_anywhere_never_raise(self):
        def places(value, path=()):
            """Return the paths to all that a record holds, of lists the first."""
            items = value.items() if isinstance(value, dict) else ()
            items = list(enumerate(value))[:1] if isinstance(value, list) else items
            for name, inside in items:
                yield (*path, name)
                yield from places(inside, (*path, name))

        whole = a_record(curves={"um": [[50.0, 60.0]]})
        wrongs = [], {}, [[]], {"a": []}, "x", -5, 10**400, None, float("nan")
        cases = list(itertools.product(places(whole), wrongs))
        for number, (path, wrong) in enumerate(cases):
            record = part = copy.deepcopy(whole)
            for name in path[:-1]:
                part = part[name]
            part[path[-1]] = wrong
            self.write(str(number), record)
        rows, _ = self.rows()
        self.assertEqual({row[0] for row in rows}, set(map(str, range(len(cases)))))
        self.assertLessEqual({row[1] for row in rows}, {"damaged", *helper.STATES})
        self.assertGreater(len(rows), 500)

    def test_names_and_settings_are_escaped(self):
        evil = "<b>&\"'#?%"
        record = a_record(started=evil)
        record["config"] |= {"vgg": evil, "l2": evil, evil: evil}
        record["defaults"] = record["defaults"] | {evil: ""}
        for name in evil, os.fsdecode(b"\xff"):
            self.write(name, record)
        rows, page = self.rows()
        self.assertEqual(len(page.all("b")), 2)
        self.assertEqual({row[0] for row in rows}, {evil, "?"})
        self.assertEqual({row[8] for row in rows}, {evil})
        addresses = {a["href"] for a, _ in page.all("a")}
        name = urllib.parse.quote(evil)
        self.assertEqual(addresses, {f"{name}/index.html", "%FF/index.html"})


class Report(Program):
    def page(self):
        """Return the last run's page; all its links lead to files."""
        run_dir = self.run_dirs()[-1]
        page = Elements((run_dir / "index.html").read_text())
        links = [a["src"] for a, _ in page.all("img")]
        links += [a["href"] for a, _ in page.all("a")]
        for link in links:
            self.assertFalse(set(":#?") & set(link), link)
            self.assertTrue((run_dir / urllib.parse.unquote(link)).is_file(), link)
        self.assertFalse(page.all("script") + page.all("link"))
        return page

    def test_a_finished_run_shows_scores_curves_and_pictures(self):
        data = self.folder / "data/data_road/testing/image_2"
        (data / "um_000000.png").rename(data / "um_<b>&'#1.png")
        start = "--weights", self.half_road(), "--learning-rate", 1e-5
        more = "--epochs", 3, "--holdout-fraction", 0.4
        self.assertEqual(self.main(*start, *more)[0], 0)
        run_dir, page, record = self.run_dirs()[0], self.page(), self.record()
        self.assertIn("um_<b>&'#1", page.text)
        self.assertIn("All runs", page.text)
        self.assertIn(f"{record['scores']['image']['urban']['AP']:.2f}", page.text)
        self.assertEqual(len(page.all("img")), 1 + 2 * 6 + 3)
        with Image.open(run_dir / "progress.gif") as gif:
            self.assertEqual((gif.n_frames, gif.size), (3, (96, 32)))
        overview = Elements((run_dir.parent / "index.html").read_text())
        self.assertIn(run_dir.name, overview.text)
        name = "uu_000005"
        image = self.folder / f"data/data_road/training/image_2/{name}.png"
        label = image.parent.parent / "gt_image_2" / "uu_road_000005.png"
        road = predict_road(self.trained(run_dir), helper.read_image(image)[None])[0]
        found, label = road >= 127.5 / 255, helper.read_label(label)
        self.assertTrue(0.1 < found.mean() < 0.99)
        both = (found & (label == 1)).sum()
        either = ((found & (label != VOID)) | (label == 1)).sum()
        ours = record["holdout"][name]
        self.assertEqual(ours["category"], "uu")
        self.assertAlmostEqual(ours["IoU50"], 100 * both / either, places=1)
        missed, false = ~found & (label == 1), found & (label == 0)
        share = missed.sum() / (label == 1).sum()
        self.assertAlmostEqual(ours["missed"], 100 * share, places=1)
        share = false.sum() / (label == 0).sum()
        self.assertAlmostEqual(ours["false"], 100 * share, places=1)
        errors = helper.read_image(run_dir / "errors" / f"{name}_errors.jpg")
        self.assertEqual(errors.shape, helper.read_image(image).shape)
        self.assertTrue(missed.any() and false.any())
        for wrong, colour in (missed, helper.MISSED), (false, helper.FALSE):
            self.assert_near(errors[wrong], colour, 45)  # and the outline
        right = (label != VOID) & ~missed & ~false
        self.assert_near(errors[right], helper.read_image(image)[right])
        for path in sorted(run_dir.glob("*.png")):
            small = helper.read_image(run_dir / "thumbnails" / f"{path.stem}.jpg")
            self.assert_near(small, helper.read_image(path))
        with Image.open(run_dir / "progress.gif") as gif:
            gif.seek(2)
            frame = np.asarray(gif.convert("RGB"))
        first = helper.read_image(image.with_name("um_000004.png"))
        first = helper.resize_image(first, (32, 96)).numpy()
        road = predictor_of(self.trained(run_dir)).network(first[None])[0].numpy()
        self.assert_near(frame[16:], helper.overlay(first, road)[16:])

    def assert_near(self, ours, theirs, most=12):
        """Check that two pictures are the same but for JPEG's or GIF's losses."""
        self.assertLess(np.abs(ours.astype(float) - theirs).mean(), most)

    def test_a_stopped_run_has_a_report_and_an_image_is_followed_without_holdout(self):
        result = self.stopped(4, self.main, "--holdout-fraction", 0)
        self.assertEqual(result[0], 143)
        page = self.page()
        self.assertTrue(page.all("span", "stopped"))
        self.assertIn("Epochs1 of 2", page.text)
        self.assertIn("progress.gif", [a["src"] for a, _ in page.all("img")])
        self.assertEqual(self.resume()[0], 0)
        self.assertTrue(self.page().all("span", "finished"))
        with Image.open(self.run_dirs()[0] / "progress.gif") as gif:
            self.assertEqual(gif.n_frames, 2)

    def test_the_progress_has_at_most_62_frames_and_ends_with_the_last(self):
        for epochs, count in (1, 1), (50, 50), (121, 42), (600, 61), (719, 61):
            followed = [
                n for n in range(1, epochs + 1) if helper.is_followed(n, epochs)
            ]
            self.assertEqual((len(followed), followed[-1]), (count, epochs))
        folder = self.folder / "checkpoint" / "frames"
        folder.mkdir(parents=True)
        for kept, shown in (62, 62), (100, 50):
            for number in range(1, kept + 1):
                frame = Image.new("RGB", (96, 32), (number, 0, 0))
                frame.save(folder / f"{number:09}.png")
            helper.write_progress(self.folder)
            with Image.open(self.folder / "progress.gif") as gif:
                self.assertEqual((gif.n_frames, gif.info["loop"]), (shown, 0))
                gif.seek(gif.n_frames - 1)
                self.assertEqual(gif.convert("RGB").getpixel((9, 9)), (kept, 0, 0))


# --------------------------------------------------------------------- benchmark


BENCHMARK = """
import sys, time
began, times = float(sys.argv.pop(1)), int(sys.argv.pop(1))
import helper, main
train_nn = main.train_nn

def measured(*args, **kwargs):
    sys.argv.append("--benchmark")  # leaves the GPU to it
    import project_tests
    call = project_tests.bound(train_nn, args, kwargs)
    project_tests.measure(began, times, **call)

main.train_nn = measured
helper.be_a_program(main.main)
"""


def layer_flop(model, image_shape):
    """Return the FLOP of an image in each layer of `model` that has a kernel.

    What fc6 multiplies with the padding above and below is left out, as it is on a CPU.
    """
    layers = [layer for layer in model.layers if hasattr(layer, "kernel")]
    ends = [x for layer in layers for x in (layer.input, layer.output)]
    image = keras.KerasTensor((1, *image_shape, 3), "uint8")
    shapes = keras.Model(model.input, ends).compute_output_spec(image)
    flop = []
    for layer, x, y in zip(layers, shapes[::2], shapes[1::2]):
        # a transposed convolution is one from its output to its input
        transposed = isinstance(layer, keras.layers.Conv2DTranspose)
        height, width = (x if transposed else y).shape[1:3]
        side = layer.kernel.shape[0]
        if isinstance(layer, main.FullyConnected):  # then each of its rows sees less
            seen = [max(height - abs(row - side // 2), 0) for row in range(side)]
            height = np.mean(seen)
        flop.append(2 * float(np.prod(layer.kernel.shape) * height * width))
    return flop


def seconds(function, times):
    """Return the median seconds of a call; short calls are timed several at once."""
    together = 1
    for _ in range(2):  # the first one traces
        start = time.perf_counter()
        function().numpy()
        together = max(int(0.3 / (time.perf_counter() - start)), 1)
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        for _ in range(together):
            result = function()
        result.numpy()  # waits for the device
        taken.append((time.perf_counter() - start) / together)
    return float(np.median(taken))


SIDES = [8192, 16384] if tf.config.list_physical_devices("GPU") else [2048, 4096]


def measure(began, times, *, batch_size, get_batches_fn, train_step, state, **_):
    """Measure in the place of main.train_nn, print JSON, and end the process."""
    batches = iter(get_batches_fn(batch_size).from_step(0))
    first = train_step(*next(batches)).numpy()
    results = {"first_step_s": time.time() - began, "first_loss": float(first[0])}
    results["train_s"] = seconds(lambda: train_step(*next(batches)), times)
    gpus = tf.config.list_logical_devices("GPU")
    results["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for index, _ in enumerate(gpus):
        memory = tf.config.experimental.get_memory_info(f"GPU:{index}")
        results[f"gpu{index}_peak_bytes"] = memory["peak"]

    def batch():  # of several replicas the first part
        return tf.nest.flatten(next(batches), expand_composites=True)[0]

    image_shape = tuple(batch().shape[1:3])
    results["batch_s"] = seconds(batch, times)
    with helper.host():
        images = tf.zeros((batch_size, 375, 1242, 3), tf.uint8)
    serve = helper.Predictor(state.model, image_shape).serve
    results["predict_s"] = seconds(lambda: serve(images)["road"][0, 0, 0], times)
    dtype = keras.config.dtype_policy().compute_dtype
    rates = []
    for side in SIDES:
        x = tf.cast(tf.random.normal((side, side)), dtype)
        product = functools.partial(helper.traced(lambda x: (x @ x)[0, 0]), x)
        rates.append(2 * side**3 / seconds(product, times))
    flop = layer_flop(state.model, image_shape)
    # backward: to the kernel and to the input, but for that of the first layer
    replicas = len(tf.nest.flatten(next(batches)[0], expand_composites=True))
    results["train_flop"] = batch_size * (3 * sum(flop) - flop[0]) / replicas
    results["predict_flop"] = 2 * batch_size * sum(flop)  # of mirror images too
    results["matmul_flop_per_s"] = max(rates)
    print(json.dumps(results), flush=True)
    os._exit(0)


def benchmark(argv):
    """Print how fast main.py is here with the settings `argv`: a table, then JSON.

    On drawn images and random weights, unless others are named. The yardstick is the
    best large matrix product of the same process in the same precision.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--benchmark", action="store_true")
    parser.add_argument("--benchmark-steps", type=int, default=5)
    ours, settings = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        if "--data-dir" not in " ".join(argv):
            draw(data, training=288, testing=6)
        paths = ["--vgg=random", f"--data-dir={data}", f"--runs-dir={folder}"]
        begin = [sys.executable, "-c", BENCHMARK, str(time.time())]
        command = [*begin, str(ours.benchmark_steps), *paths, *settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return done.returncode
    *said, text = done.stdout.splitlines()
    results = json.loads(text)
    batch_size = main.parse(settings).batch_size
    print("\n".join(said))
    for kind, title in ("train", "training step"), ("predict", "inference"):
        taken, flop = results[f"{kind}_s"], results[f"{kind}_flop"]
        share = results[f"{kind}_share"] = flop / taken / results["matmul_flop_per_s"]
        print(
            f"{title:22}{1000 * taken:10.1f} ms{batch_size / taken:10.2f} images/s"
            f"{flop / taken / 1e9:10.1f} GFLOP/s{100 * share:8.1f} % of the product"
        )
    rate = results["matmul_flop_per_s"] / 1e9
    print(f"{'matrix product':22}{rate:46.1f} GFLOP/s")
    times = results["train_s"] / results["batch_s"]
    print(f"{'input pipeline':22}{1000 * results['batch_s']:10.1f} ms", end=" ")
    print(f"a batch: {times:.0f} times faster than the step")
    print(f"{'to the first step':22}{results['first_step_s']:10.1f} s")
    for name, value in results.items():
        if name.endswith("_bytes"):
            print(f"{name[:-6].replace('_', ' '):22}{value / 1e9:10.2f} GB")
    print(json.dumps(results))
    return 0


JOB = """
import sys, time
began = time.time()
import helper, main
imported = time.time()
sys.argv.append("--benchmark")  # leaves the GPU to it
import project_tests
project_tests.play(began, imported)
"""
STAGES = {  # of the default job: what is waited for, and whose time it is
    "looking at the test images": (helper, "check_tests"),
    "checksums": (helper.Split, "digests"),
    "decoding": (helper, "gen_batch_function"),
    "building and loading VGG-16": (main, "fcn8s"),
    "the optimizer's state": (main, "optimize"),
    "tracing and the first step": (main.TrainStep, "__call__"),
    "epoch ends: hold-out": (main, "evaluate"),
    "epoch ends: followed image": (helper.Run, "keep_frame"),
    "epoch ends: run.json and pages": (helper, "write_run"),
    "weights": (helper, "write_weights"),
    "checkpoints": (helper, "write_checkpoint"),
    "scoring": (helper.Run, "score"),
    "overlays": (helper, "save_inference_samples"),
}


def timed(taken, title, function):
    """Return `function`, whose seconds are added to taken[title]."""

    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            taken[title] += time.perf_counter() - start

    return call


def play(began, imported):
    """Run main.py with a network of no cost; print where the time goes, as JSON.

    VGG-16 is built, loaded and traced as ever; then its steps return at once.
    """
    taken = dict.fromkeys(["imports", *STAGES], 0.0) | {"imports": imported - began}
    step, network = main.TrainStep.__call__, helper.Predictor._network
    sums = 1.0, np.full((2, 256), 9.0)  # of a hold-out batch

    def first_step_only(train_step, *batch):
        if train_step.step.numpy() == 0:
            return step(train_step, *batch)
        train_step.step.assign_add(1)
        return tf.constant([0.1, 0.1, 1.0])

    def constant_road(predictor, images):
        network(predictor, images[:0])  # traced, and not computed
        return tf.fill(tf.shape(images)[:3], 0.6)

    main.TrainStep.__call__ = first_step_only
    main.holdout_step = lambda *arguments: sums
    helper.Predictor._network = constant_road
    for title, (owner, name) in STAGES.items():
        setattr(owner, name, timed(taken, title, getattr(owner, name)))
    code = main.main(
        [argument for argument in sys.argv[1:] if argument != "--benchmark"]
    )
    print(json.dumps(taken | {"in all": time.time() - began}), flush=True)
    sys.exit(code)


def job(argv):
    """Print what the default job costs beside its steps: a table, then JSON."""
    with tempfile.TemporaryDirectory() as folder:
        data, vgg = Path(folder, "data"), Path(folder, "vgg.h5")
        draw(data, training=288, testing=291)
        write_vgg_weights(vgg, keras.applications.VGG16(weights=None))
        paths = [f"--vgg={vgg}", f"--data-dir={data}", f"--runs-dir={folder}"]
        done = subprocess.run(
            [sys.executable, "-c", JOB, *paths, *argv],
            env=ENVIRONMENT,  # with the GPU
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        return done.returncode
    text = done.stdout.splitlines()[-1]
    for title, seconds_taken in json.loads(text).items():
        print(f"{title:34}{seconds_taken:8.2f} s")
    print(text)
    return 0


# --------------------------------------------------------------------- all of it


FIRST = Devices, Resume, LoadVgg  # the longest: what begins last should be short


class Result(unittest.TestResult):
    """A result that counts and keeps as text, for another process."""

    def __init__(self):
        super().__init__()
        self.buffer, self.passed = True, 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def said(self):
        """Return what is to be said of each failure."""
        for test, trace in self.errors + self.failures:
            name = str(test).replace("__mp_main__.", "")
            yield "\n".join(filter(None, [name, test.shortDescription(), trace]))


def check(suite):
    """Run some tests; return how many passed, why others were left out, failures."""
    result = Result()
    suite.run(result)
    left_out = [f"{test}: {reason}" for test, reason in result.skipped]
    return result.passed, left_out, [*result.said()]


def portions(suite):
    """Return the tests of a suite, each alone, but those of a costly class together."""
    flat = [suite]
    while any(isinstance(part, unittest.TestSuite) for part in flat):
        flat = [each for part in flat for each in part]
    order = [*FIRST, *globals().values()]
    flat.sort(key=lambda test: order.index(type(test)))
    by_class = itertools.groupby(flat, type)
    return [
        unittest.TestSuite(tests)
        for kind, group in by_class
        for tests in ([group] if kind is LoadVgg else [[test] for test in group])
    ]


def check_all(names):
    """Run the tests of these names, or all, in parallel; return the exit code."""
    loader, module = unittest.defaultTestLoader, sys.modules[__name__]
    if names:
        suite = loader.loadTestsFromNames(names, module)
    else:
        suite = loader.loadTestsFromModule(module)
    if loader.errors:
        print(loader.errors[0], "0 passed, 1 failed", sep="\n")
        return 1
    count, parts, start = suite.countTestCases(), portions(suite), time.monotonic()
    passed, left_out, stages, thread = 0, 0, set(), threading.local()
    os.environ["PROJECT_TESTS_FOLDER"] = str(kept_folder())
    spawn = multiprocessing.get_context("spawn")  # TensorFlow cannot be forked

    def run(tests):
        """Have this thread's process check some tests, which fail where it crashes."""
        stage = type(next(iter(tests))).__name__
        if stage not in stages:
            stages.add(stage)
            print(stage, flush=True)
        if not hasattr(thread, "process"):
            process = ProcessPoolExecutor(1, spawn)
            thread.process = started.enter_context(process)
        try:
            passed, left_out, failures = thread.process.submit(check, tests).result()
        except BrokenProcessPool:
            del thread.process
            names = ", ".join(map(str, tests))
            passed, left_out, failures = 0, [], [f"{names}: the process crashed"]
        for failure in failures:
            print(f"{'=' * 70}\nFAILED {failure}", flush=True)
        for test in left_out:
            print(f"LEFT OUT {test}".replace("__mp_main__.", ""), flush=True)
        return passed, len(left_out)

    processes = min(helper.CORES, 16, len(parts))  # with more the longest test decides
    # Ended here: at the interpreter's own end each might speak after the last line.
    with (
        contextlib.ExitStack() as started,
        ThreadPoolExecutor(max(processes, 1)) as threads,
    ):
        for more, out in threads.map(run, parts):
            passed, left_out = passed + more, left_out + out
    seconds = time.monotonic() - start
    print(f"{count} tests took {seconds:.0f} s in {processes} processes")
    failed = count - passed - left_out
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or not passed)


if __name__ == "__main__":
    if "--benchmark" in sys.argv:
        sys.exit(benchmark(sys.argv[1:]))
    if "--benchmark-job" in sys.argv:
        sys.exit(job([each for each in sys.argv[1:] if each != "--benchmark-job"]))
    sys.exit(check_all(sys.argv[1:]))
