"""Check every stage of main.py and helper.py, in the order in which they run.

    python project_tests.py             all of it
    python project_tests.py LoadVgg     one stage
    python project_tests.py --benchmark [--benchmark-steps N] [settings of main.py]

No network but 127.0.0.1, nothing written outside temporary folders; a GPU is used by
the benchmark alone.
"""

import argparse
import contextlib
import functools
import hashlib
import html.parser
import http.server
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

if "--benchmark" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["NO_PROXY"] = "127.0.0.1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import imageio.v2 as imageio
import imageio_ffmpeg
import keras
import numpy as np
import requests
import tensorflow as tf
from PIL import Image

import helper
import main
from helper import VOID, ProgramError

CPU = tf.config.list_physical_devices("CPU")[0]
if "--benchmark" not in sys.argv:  # as main.py would, and two devices in place of one
    tf.config.threading.set_inter_op_parallelism_threads(1)
    pair = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(CPU, pair)
ONE = tf.distribute.get_strategy()
tf.get_logger().setLevel("ERROR")  # each test traces anew, and TensorFlow remarks on it


class Case(unittest.TestCase):
    """A test with a temporary folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def patch(self, target, name, value):
        patcher = mock.patch.object(target, name, value)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def files(self, folder=None):
        """Return the visible files and folders below `folder`, as sorted text."""
        found = (folder or self.folder).rglob("[!.]*")
        return sorted(str(path.relative_to(folder or self.folder)) for path in found)


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
        self.patch(helper, "READ_TIMEOUT", 0.3)
        whole, cut = answer(self.content), answer(self.content, sent=40_000)
        busy = answer(b"", resume=False, status=503)
        plans = {
            "a cut is resumed": ([cut, whole], [0, 40_000]),
            "two overloads are waited for": ([busy, busy, whole], [0, 0, 0]),
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
            with self.subTest(name), Server(*plan) as server:
                self.download(server)
                self.assert_whole()
                self.assertEqual(server.ranges, ranges)
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
        with Server(answer(self.content)) as server:
            self.download(server)
        self.assert_whole()
        self.assertEqual(server.ranges, [70_000])

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
        self.assertRegex(message, r"102400 bytes read, 97600 more|416")
        self.assertFalse(self.path.exists())

    def test_a_wrong_file_is_removed_and_both_sums_are_named(self):
        wrong = self.content[::-1]
        with Server(answer(wrong)) as server:
            message = self.failure(server)
        self.assertIn(hashlib.md5(wrong).hexdigest(), message)
        self.assertIn(self.md5, message)
        self.assertEqual(self.files(), ["data"])

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

    def test_without_network_one_line_says_what_to_do(self):
        message = self.failure(mock.Mock(url="http://127.0.0.1:9/file"))
        for part in "http://127.0.0.1:9/file", "refused", str(self.path), "--demo":
            self.assertIn(part, message)
        self.assertNotIn("\n", message)

    def test_a_full_disk_is_seen_before_a_byte_is_written(self):
        usage = mock.Mock(return_value=mock.Mock(free=50_000))
        self.patch(shutil, "disk_usage", usage)
        with Server(answer(self.content)) as server:
            self.assertIn("0 MB are free", self.failure(server))
        self.assertFalse(self.part.exists())

    def test_two_programs_fetch_a_file_once(self):
        slow = Server(answer(self.content, stall=0.5))
        with slow as server, ThreadPoolExecutor() as programs:
            list(programs.map(self.download, [server, server]))
        self.assert_whole()
        self.assertEqual(server.ranges, [0])

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
        with Server(answer(archive)) as server:
            self.patch(helper, "KITTI_URLS", [server.url])
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                helper.maybe_download_kitti_road(self.folder / "data")
                helper.maybe_download_kitti_road(self.folder / "data")
        self.assertIn("CC BY-NC-SA 3.0", output.getvalue())
        self.assertIn("1 training images, 1 road labels, 1 test", output.getvalue())
        self.assertEqual(len(server.ranges), 1)
        here = [name for name in self.files() if name.endswith(".png")]
        self.assertEqual(here, sorted(f"data/{name}" for name in self.kitti))
        self.assertFalse(list(self.folder.rglob("*evil*")))
        self.assertFalse(list(self.folder.rglob("*.zip")))

    def test_a_damaged_zip_leaves_neither_zip_nor_data(self):
        damaged = bytearray(self.archive(*self.kitti))
        damaged[damaged.rindex(b"content of")] ^= 1  # now its CRC is wrong
        locked = self.archive(*self.kitti).replace(
            b"PK\1\2\24\3\24\0\0", b"PK\1\2\24\3\24\0\1"
        )
        other = self.archive("other/file.png")
        for content in bytes(damaged), locked, b"no zip", other:
            with Server(answer(content)) as server:
                self.patch(helper, "KITTI_URLS", [server.url])
                with self.assertRaisesRegex(ProgramError, "damaged.*removed"):
                    helper.maybe_download_kitti_road(self.folder / "data")
            self.assertEqual(self.files(), ["data"])

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
    Image.new("RGB", size, label).save(path)
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
        self.assertEqual(ours.dtype, np.uint8)

    def test_the_holdout_of_the_full_set_is_val3(self):
        counts = {"um": 95, "umm": 96, "uu": 98}
        for kind, count in counts.items():
            for number in range(count):
                write_sample(self.folder, f"{kind}_{number:06}", (1, 1))
        samples, *_ = helper.find_images(self.folder, 0, 1)
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
        samples, *_ = helper.find_images(self.folder, 0, 1)
        image = self.folder / "data_road/training/image_2/um_000003.png"
        self.assertEqual(samples, [(image, road)])

    def test_a_missing_label_is_named(self):
        road = write_sample(self.folder, "um_000003")
        road.rename(road.with_name("um_lane_000003.png"))
        with self.assertRaises(ProgramError) as caught:
            helper.find_images(self.folder, 0, 1)
        self.assertIn(str(road), str(caught.exception))
        self.assertIn("um_lane_000003.png is another task", str(caught.exception))

    def test_a_data_set_without_images_is_refused(self):
        with self.assertRaisesRegex(ProgramError, "no images in .*image_2"):
            helper.find_images(self.folder, 0, 1)

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

    def test_a_label_of_another_size_is_refused(self):
        road = write_sample(self.folder, "um_000003")
        Image.new("RGB", (24, 40)).save(road)
        samples, *_ = helper.find_images(self.folder, 0, 1)
        with self.assertRaisesRegex(ProgramError, "is 24x40, its image 40x24"):
            helper.gen_batch_function(samples, (32, 32), ONE)

    def samples(self, count):
        for number in range(count):
            write_sample(
                self.folder, f"um_{number:06}", label=(255, 0, 255 * (number % 2))
            )
        return helper.find_images(self.folder, 0, 1)[0]

    def batches(self, count=7, seed=0, shape=(32, 64)):
        return helper.gen_batch_function(self.samples(count), shape, ONE, seed)

    def test_the_holdout_comes_whole_in_order_and_as_it_is(self):
        parts = zip(*self.batches()[0](3))
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
        one_image = itertools.islice(self.batches(1)[0](1, range(6)), 6)
        self.assertEqual(len({images.numpy().tobytes() for images, *_ in one_image}), 6)
        get_batches_fn, _ = self.batches()
        through = list(itertools.islice(get_batches_fn(3, range(6)), 6))
        for step, batch in zip(range(4, 6), get_batches_fn(3, range(4, 6))):
            for ours, theirs in zip(batch, through[step]):
                np.testing.assert_array_equal(ours, theirs)

    def test_batch_names_are_those_of_the_batch(self):
        get_batches_fn, names = self.batches()
        _, labels, _ = next(iter(get_batches_fn(3, range(5, 6))))
        odd = [int(name[3:9]) % 2 for name in names(3, 5)]
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
        self.assertTrue(10 < flipped.sum() < 30)

    def test_jitter_changes_brightness_and_contrast_of_each_image(self):
        images = np.tile(np.uint8([[[100], [150]]]), (40, 4, 1, 3))
        labels = np.zeros((40, 4, 2), np.uint8)
        draws = np.random.default_rng(0).uniform(size=(3, 40)).astype(np.float32)
        changed = helper.augment(images, labels, draws)[0].numpy().astype(float)
        means = changed.mean((1, 2, 3))
        contrasts = np.ptp(changed, axis=(1, 2, 3)) / 50
        self.assertTrue(100 <= means.min() < 110 and 140 < means.max() <= 150)
        self.assertTrue(0.78 <= contrasts.min() < 0.9 and 1.1 < contrasts.max() <= 1.22)

    def test_weights_spread_the_loss_over_the_valid_pixels(self):
        road = write_sample(self.folder, "um_000000", (64, 32))
        label = np.zeros((32, 64, 3), np.uint8)
        label[:, :16, 0] = 255  # a quarter is valid
        Image.fromarray(label).save(road)
        write_sample(self.folder, "um_000001", (64, 32))
        samples, *_ = helper.find_images(self.folder, 0, 1)
        ((_, labels, weights),) = helper.gen_batch_function(samples, (32, 64), ONE)[0](
            2
        )
        valid = (labels.numpy() != VOID).sum((1, 2))
        self.assertEqual(valid.tolist(), [512, 2048])
        np.testing.assert_allclose(weights, [1 / 2560] * 2)

    def test_replicas_share_a_batch_and_what_is_missing_is_void(self):
        samples = self.samples(7)
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        for steps in None, range(3, 5):
            get_one, _ = helper.gen_batch_function(samples, (32, 64), ONE, 5)
            get_two, _ = helper.gen_batch_function(samples, (32, 64), two, 5)
            for whole, parts in zip(
                get_one(5, steps), itertools.islice(get_two(5, steps), 2)
            ):
                parts = map(two.experimental_local_results, parts)
                images, labels, weights = (tf.concat(part, 0).numpy() for part in parts)
                self.assertEqual(len(images), 6)
                for ours, theirs in zip((images, labels, weights), whole):
                    np.testing.assert_array_equal(ours[:5], theirs)
                self.assertTrue((labels[5] == VOID).all() and weights[5] == 0)

    def test_a_set_too_large_for_memory_is_refused_before_decoding(self):
        samples = self.samples(7)
        self.patch(helper, "read_image", None)
        self.patch(helper, "free_memory", lambda: 4 * 7 * 32 * 64 - 1)
        said = "7 images of 64x32 take 0 MB of memory and 0 MB are free: lower --image"
        with self.assertRaisesRegex(ProgramError, said):
            helper.gen_batch_function(samples, (32, 64), ONE)

    def test_the_drawn_set_has_kittis_layout_and_is_drawn_once(self):
        helper.maybe_draw_kitti_road(self.folder, training=9, testing=3)
        samples, _, tests = helper.find_images(self.folder, 0, 1)
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
        helper.maybe_draw_kitti_road(self.folder)
        self.assertEqual(samples[0][0].read_bytes(), b"changed")

    def test_a_drawing_that_fails_leaves_nothing(self):
        self.patch(helper, "draw_scene", mock.Mock(side_effect=KeyboardInterrupt))
        with self.assertRaises(KeyboardInterrupt):
            helper.maybe_draw_kitti_road(self.folder, training=3, testing=3)
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
        del original
        original = keras.applications.VGG16(weights=str(cls.weights))
        cls.image = np.random.default_rng(0).integers(
            0, 256, (1, 224, 224, 3), np.uint8
        )
        x = keras.applications.vgg16.preprocess_input(cls.image.astype(np.float32))
        names = "block3_pool", "block4_pool", "fc2"
        outputs = [original.get_layer(name).output for name in names]
        cls.expected = [y.numpy() for y in keras.Model(original.input, outputs)(x)]
        cls.kernel = original.get_layer("block1_conv1").kernel.numpy()
        del original
        image_input, *pools = main.load_vgg(cls.weights, 0.8)
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

    def test_outputs_have_the_shapes_the_decoder_expects(self):
        pool3, pool4, fc7 = self.model(np.zeros((2, 64, 96, 3), np.uint8))
        self.assertEqual(pool3.shape, (2, 8, 12, 256))
        self.assertEqual(pool4.shape, (2, 4, 6, 512))
        self.assertEqual(fc7.shape, (2, 2, 3, 4096))
        self.assertEqual(self.model.count_params(), 134_260_544)

    def test_dropout_keeps_its_share_of_fc6_and_fc7_in_training_only(self):
        fc7 = [self.model(self.image, training=flag)[2].numpy() for flag in (0, 1, 1)]
        self.assertFalse(np.array_equal(fc7[1], fc7[2]))
        np.testing.assert_array_equal(fc7[0], self.model(self.image)[2])
        dropouts = [y for y in self.model.layers if isinstance(y, keras.layers.Dropout)]
        self.assertEqual([round(y.rate, 6) for y in dropouts], [0.2, 0.2])

    def test_a_product_is_the_convolution(self):
        x = np.random.default_rng(0).normal(size=(2, 5, 9, 6)).astype(np.float32)
        for side in 7, 1:
            ours = main.FullyConnected(4, side, padding="same", activation="relu")
            theirs = keras.layers.Conv2D(4, side, padding="same", activation="relu")
            for layer in ours, theirs:
                layer.build(x.shape)
            ours.bias.assign([1, 2, 0, -1])
            theirs.set_weights(ours.get_weights())
            np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)

    def test_pretrained_values_are_intact_when_training_begins(self):
        logits = main.layers(*self.model.outputs, 2)
        model = keras.Model(self.model.input, logits)
        variables = self.model.trainable_variables
        main.optimize(model, variables, 0.001, 0.0001, 2, 5, 0, ONE)
        kernel = model.get_layer("block1_conv1").kernel
        np.testing.assert_array_equal(kernel, self.kernel)
        with h5py.File(self.weights) as file:
            dense = file["fc1"]["fc1_W_1:0"][:512]  # the 512 channels of corner (0, 0)
        np.testing.assert_array_equal(model.get_layer("fc1").kernel[0, 0], dense)

    def test_random_weights_bring_fc7_to_order_1(self):
        keras.utils.set_random_seed(0)
        image_input, *pools = main.load_vgg("random", 0.5)
        fc7 = keras.Model(image_input, pools[2])(self.image).numpy()
        self.assertTrue(0.3 < fc7.std() < 3)
        kernel = keras.Model(image_input, pools[2]).get_layer("block3_conv2").kernel
        self.assertAlmostEqual(float(np.std(kernel)), (2 / 9 / 256) ** 0.5, delta=1e-3)

    def test_a_file_that_does_not_fit_is_named(self):
        whole = self.weights.open("rb").read(1 << 20)
        path = self.folder / "vgg.h5"
        other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="fc1")])
        notop = keras.applications.VGG16(weights=None, include_top=False)
        contents = {
            "empty": lambda: path.write_bytes(b""),
            "HTML": lambda: path.write_bytes(b"<html>log in</html>"),
            "truncated": lambda: path.write_bytes(whole),
            "missing": lambda: path.unlink(),
            "another network": lambda: write_vgg_weights(path, other),
            "no fc layers": lambda: write_vgg_weights(path, notop),
        }
        for name, write in contents.items():
            with self.subTest(name):
                write()
                with self.assertRaises(ProgramError) as caught:
                    main.load_vgg(path, 0.5)
                self.assertIn(f"{path}: not VGG-16 weights", str(caught.exception))
                self.assertNotIn("\n", str(caught.exception))
        self.patch(keras.Model, "load_weights", mock.Mock(side_effect=MemoryError))
        with self.assertRaises(MemoryError):  # no fault of the file
            main.load_vgg(path, 0.5)


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
        scales = {0: 0.0001, 1: 0.01, 2: 1}
        for index, name in enumerate(("pool3", "pool4", "fc7")):
            changed = list(pools)
            changed[index] = pools[index] + 1
            kernel = model.get_layer(f"score_{name}").kernel.numpy()
            expected = kernel.sum((0, 1, 2)) * scales[index]  # bilinear keeps constants
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

    def optimize(self, rate=0.001, vgg_rate=0.0001, epochs=3, steps=4, seed=0, **how):
        return main.optimize(
            self.model, self.vgg, rate, vgg_rate, epochs, steps, seed, ONE, **how
        )

    def five_steps(self, **how):
        """Return what five steps return, and the weights after them."""
        keras.utils.set_random_seed(0)
        self.model, self.vgg = small_model()
        next(y for y in self.model.layers if "dropout" in y.name).rate = 0
        step, _ = self.optimize(0.01, 0.01, **how)
        values = [step(*small_batch(seed=seed)).numpy() for seed in range(5)]
        return values, [w.numpy() for w in self.model.trainable_variables]

    def test_a_compiled_step_is_the_plain_one(self):
        for ours, theirs in zip(self.five_steps(xla=True)[0], self.five_steps()[0]):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    def test_what_xla_cannot_compile_goes_on_without_it(self):
        plain = self.five_steps()
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

    def test_a_scaled_step_is_an_unscaled_one(self):
        plain, scaled = self.five_steps(), self.five_steps(loss_scaling=True)
        np.testing.assert_array_equal(scaled[0], plain[0])
        for ours, theirs in zip(scaled[1], plain[1]):
            np.testing.assert_array_equal(ours, theirs)

    def test_a_step_that_overflows_is_left_out(self):
        step, state = self.optimize(loss_scaling=True)
        before = [w.numpy() for w in self.model.trainable_variables]
        scale = float(state.optimizer.dynamic_scale)
        images, labels, weights = small_batch()
        loss, _, norm = step(images, labels, weights * np.float32(1e37)).numpy()
        self.assertTrue(np.isfinite(loss))
        self.assertEqual((norm, int(state.step)), (0, 1))
        self.assertEqual(float(state.optimizer.dynamic_scale), scale / 2)
        for ours, theirs in zip(self.model.trainable_variables, before):
            np.testing.assert_array_equal(ours, theirs)
        self.assertGreater(step(images, labels, weights).numpy()[2], 0)

    def test_in_half_precision_only_the_encoder_computes(self):
        plain = self.five_steps()[0]
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        for precision in "bfloat16", "float16":
            keras.config.set_dtype_policy(f"mixed_{precision}")
            half = self.five_steps(loss_scaling=precision == "float16")[0]
            np.testing.assert_allclose(half, plain, rtol=0.05)
            self.assertFalse(np.array_equal(half, plain))
            pools = [y for y in self.model.layers if y.name.startswith("conv2d")]
            self.assertEqual({y.output.dtype for y in pools}, {precision})
            scores = [y for y in self.model.layers if "score" in y.name]
            self.assertEqual({y.output.dtype for y in scores}, {"float32"})
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
            self.patch(helper, "free_memory", lambda memory=memory: memory)
            self.assertEqual(main.largest_batch(self.model, (32, 96), 1), fits)
            self.assertEqual(main.largest_batch(self.model, (32, 96), 4), 4 * fits)

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

    def test_a_batch_of_nothing_but_void_gives_no_loss(self):
        images, labels, weights = small_batch()
        labels[:] = VOID
        loss, l2, norm = self.optimize()[0](images, labels, weights).numpy()
        self.assertEqual(loss, 0)
        self.assertTrue(np.isfinite([l2, norm]).all())

    def test_l2_is_in_what_is_minimised(self):
        images, labels, weights = small_batch()
        step, _ = self.optimize(epochs=100)
        first = [step(images, np.full_like(labels, VOID), weights) for _ in range(20)]
        self.assertLess(first[-1][1], first[0][1])

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

        step, state = self.optimize(rate=0.01, epochs=1, steps=4)  # warm-up only
        for _ in range(4):
            step(*small_batch())
        self.assertAlmostEqual(float(state.optimizer.learning_rate), 0.01, places=6)

    def test_dropout_is_a_function_of_seed_and_step(self):
        batch = small_batch()
        step, state = self.optimize(vgg_rate=0, rate=1e-12)
        first, second = step(*batch)[0], step(*batch)[0]
        state.step.assign(0)
        self.assertAlmostEqual(float(step(*batch)[0]), float(first), places=7)
        self.assertNotAlmostEqual(float(second), float(first), places=6)
        other, _ = self.optimize(vgg_rate=0, rate=1e-12, seed=1)
        self.assertNotAlmostEqual(float(other(*batch)[0]), float(first), places=6)


class Evaluate(Case):
    def test_loss_and_scores_are_those_of_all_valid_pixels(self):
        keras.utils.set_random_seed(0)
        model, _ = small_model()
        batches = [small_batch(2, seed=0), small_batch(1, seed=1)]
        images, labels = (np.concatenate(part) for part in list(zip(*batches))[:2])
        logits = model(images).numpy().astype(float)
        road = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
        found, is_road = (np.round(road * 255) >= 128), labels == 1
        valid = labels != VOID
        both = (found & is_road & valid).sum()
        either = ((found | is_road) & valid).sum()
        ours = main.evaluate(model, batches, ONE)
        loss = cross_entropy_by_hand(logits, labels)
        self.assertAlmostEqual(ours["holdout_loss"], loss, places=4)
        self.assertAlmostEqual(ours["IoU"], 100 * both / either, delta=0.05)
        right = 100 * (found == is_road)[valid].mean()
        self.assertAlmostEqual(ours["accuracy"], right, delta=0.05)

    def test_a_holdout_loss_that_is_not_finite_stops_the_run(self):
        model, _ = small_model()
        model.get_layer("score_fc7").bias.assign([np.nan, 0])
        with self.assertRaisesRegex(ProgramError, "hold-out loss is nan"):
            main.evaluate(model, [small_batch()], ONE)

    def test_without_images_there_are_no_scores(self):
        self.assertEqual(main.evaluate(None, [], ONE), {})


class TrainNn(Case):
    def train(self, values, epochs=2, steps=10):
        """Train on a train_step that answers `values`; return the epochs' records."""
        asked, records = [], []
        self.state = tf.train.Checkpoint(
            step=tf.Variable(0),
            epoch=tf.Variable(0),
            totals=tf.Variable(np.zeros(4)),
        )

        def get_batches_fn(batch_size, steps):
            asked.append((batch_size, steps))
            return [(step,) for step in steps]

        main.train_nn(
            epochs,
            3,
            get_batches_fn,
            lambda batch_size, step: [f"file {step}", "another"],
            lambda step: tf.constant(values[step]),
            steps,
            self.state,
            records.append,
            [],
        )
        self.assertEqual(asked, [(3, range(epochs * steps))])
        return records

    def test_a_record_is_the_mean_over_its_epoch(self):
        values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
        records = self.train(values)
        self.assertEqual([record["epoch"] for record in records], [1, 2])
        self.assertEqual([record["step"] for record in records], [10, 20])
        for record, part in zip(records, (values[:10], values[10:])):
            ours = [record[name] for name in ("loss", "l2", "gradient_norm")]
            np.testing.assert_allclose(ours, part.mean(0), rtol=1e-5)
            speed = 30 / record["seconds"]
            self.assertAlmostEqual(record["images_per_second"], speed)

    def test_a_loss_that_is_not_finite_stops_it_with_its_own_step(self):
        values = np.ones((20, 3), np.float32)
        values[13, 0] = np.nan
        values[14:] = np.nan
        seen = []
        with self.assertRaises(ProgramError) as caught:
            seen = self.train(values)
        self.assertRegex(
            str(caught.exception), r"step 14 gave \[nan.* on file 13, another"
        )
        self.assertIn("--learning-rate", str(caught.exception))
        self.assertEqual(seen, [])
        values[13, 0], values[14:] = 1, 1
        values[9, 2] = np.inf
        with self.assertRaisesRegex(ProgramError, r"step 10 gave \[1.0, 1.0, inf\]"):
            self.train(values)

    def test_losses_are_fetched_once_a_second_not_at_every_step(self):
        values = np.ones((50, 3), np.float32)
        clock = iter(np.arange(0, 1000, 0.1))
        self.patch(main.time, "perf_counter", lambda: next(clock))  # twice a step
        with mock.patch.object(tf, "stack", side_effect=tf.stack) as stack:
            self.train(values, epochs=1, steps=50)
        sizes = [len(call.args[0]) for call in stack.call_args_list]
        self.assertEqual(sum(sizes), 50)
        self.assertTrue(all(4 <= size <= 6 for size in sizes[:-1]), sizes)


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
            road = helper.predict_road(self.model, images, (32, 64)).numpy()
            self.assertEqual((road.shape, road.dtype), (images.shape[:3], np.float32))
            self.assertTrue(0 <= road.min() and road.max() <= 1)

    def test_it_is_the_softmax_at_network_size_resized_back(self):
        images = self.images(1, 64, 128)
        small = helper.resize_image(images, (32, 64))
        logits = self.model(small).numpy()[0].astype(float)
        road = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
        back = Image.fromarray(road.astype(np.float32)).resize(
            (128, 64), Image.Resampling.BILINEAR
        )
        ours = helper.predict_road(self.model, images, (32, 64)).numpy()[0]
        np.testing.assert_allclose(ours, np.asarray(back), atol=1e-5)

    def test_an_overlay_is_half_green_where_road_is_as_likely_as_not(self):
        image = np.uint8([[[10, 20, 30], [255, 255, 255], [100, 100, 101]]])
        road = np.float32([[0.49, 0.5, 1]])
        expected = [[[10, 20, 30], [127, 255, 127], [50, 177, 50]]]
        self.assertEqual(helper.overlay(image, road).tolist(), expected)

    def test_overlays_have_the_names_and_sizes_of_their_images(self):
        paths = []
        for index, size in enumerate([(90, 40), (80, 40), (80, 40), (90, 40)]):
            paths.append(self.folder / f"um_{index:06}.png")
            Image.new("RGB", size, (index, 0, 0)).save(paths[-1])
        out = self.folder / "out"
        out.mkdir()
        helper.save_inference_samples(out, self.model, paths, (32, 64), 3)
        self.assertEqual(self.files(out), [path.name for path in paths])
        for path in paths:
            image = helper.read_image(path)
            road = helper.predict_road(self.model, image[None], (32, 64)).numpy()[0]
            expected = helper.overlay(image, road)
            np.testing.assert_array_equal(helper.read_image(out / path.name), expected)

    def test_a_broken_test_image_leaves_no_overlay(self):
        paths = [self.folder / "a.png", self.folder / "b.png"]
        Image.new("RGB", (64, 32)).save(paths[0])
        paths[1].write_bytes(b"no image")
        out = self.folder / "out"
        out.mkdir()
        with self.assertRaisesRegex(ProgramError, "b.png"):
            helper.save_inference_samples(out, self.model, paths, (32, 64), 1)
        self.assertEqual(list(out.iterdir()), [])


class Scores(Case):
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
        view = helper.birds_eye(pixels, homography, VOID)
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
        view = helper.birds_eye(plane, homography, VOID)  # a pixel a cell, 1-based
        expected = np.full((800, 400), VOID, np.uint8)
        expected[1:799, 1:399] = plane[:798, :398]
        np.testing.assert_array_equal(view, expected)


# --------------------------------------------------------------------------- run


class Program(Case):
    """The whole program, in this process, on drawn data and the small encoder."""

    def setUp(self):
        super().setUp()
        self.patch(main, "load_vgg", small_vgg)
        helper.maybe_draw_kitti_road(self.folder / "data", training=18, testing=3)

    def main(self, *arguments):
        """Run main.py; return its exit code, stdout and stderr."""
        paths = ["--data-dir", self.folder / "data", "--runs-dir", self.folder / "runs"]
        small = ["--image-height=32", "--image-width=96", "--epochs=2", "--vgg=random"]
        return self.call(*paths, *small, *arguments)

    def call(self, *command):
        output, errors = io.StringIO(), io.StringIO()
        with (
            warnings.catch_warnings(action="ignore"),  # unittest shows Keras's own
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            mock.patch.object(os, "write"),  # what a signal's handler says
        ):
            try:
                code = main.main([str(part) for part in command])
            except SystemExit as leaving:
                code = leaving.code
        return code, output.getvalue(), errors.getvalue()

    def run_dirs(self):
        return sorted((self.folder / "runs").glob("*"))

    def record(self):
        return json.loads((self.run_dirs()[-1] / "run.json").read_text())

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


class Run(Program):
    def test_a_run_writes_what_the_readme_promises(self):
        code, output, errors = self.main("--learning-rate", "0.01")
        self.assertEqual((code, errors), (0, ""))
        (run_dir,) = self.run_dirs()
        tests = ["um_000000.png", "umm_000000.png", "uu_000000.png"]
        holdout = [f"{kind}_road_000005.png" for kind in ("um", "umm", "uu")]
        self.assertEqual(self.files(run_dir / "holdout"), holdout)
        names = {"best.weights.h5", "run.json", "holdout", *tests}
        names |= {"index.html", "progress.gif", "errors"}
        self.assertEqual({path.name for path in run_dir.iterdir()}, names)
        run = json.loads((run_dir / "run.json").read_text())
        self.assertTrue(run["finished"])
        self.assertEqual(run["config"]["learning_rate"], 0.01)
        self.assertEqual(run["config"]["batch_size"], 5)
        self.assertEqual(run["data"], {"training": 15, "holdout": 3, "test": 3})
        self.assertEqual(run["versions"]["tensorflow"], tf.__version__)
        self.assertEqual([epoch["step"] for epoch in run["history"]], [3, 6])
        best = max(run["history"], key=lambda epoch: epoch["MaxF"])
        self.assertEqual(run["best_epoch"], best["epoch"])
        for epoch in run["history"]:
            self.assertIn(f"MaxF {epoch['MaxF']:.5g}", output)
        self.assertIn("no GPU: an epoch takes about", output)
        self.assertIn(str(run_dir), output)

    def test_the_weights_are_those_of_the_best_epoch(self):
        scores = iter([{"MaxF": 50.0}, {"MaxF": 90.0}, {"MaxF": 70.0}])
        weights = []

        def evaluate(model, batches, strategy):
            weights.append(model.get_weights())
            return next(scores)

        self.patch(main, "evaluate", evaluate)
        save, used = helper.save_inference_samples, []

        def save_inference_samples(run_dir, model, *rest):
            used.extend(model.get_weights())
            save(run_dir, model, *rest)

        self.patch(helper, "save_inference_samples", save_inference_samples)
        self.assertEqual(self.main("--epochs", "3")[0], 0)
        (run_dir,) = self.run_dirs()
        model, _ = small_model()
        model.load_weights(run_dir / "best.weights.h5")
        for ours, theirs, shown in zip(model.weights, weights[1], used):
            if "seed_generator" not in ours.path:
                np.testing.assert_array_equal(ours, theirs)
                np.testing.assert_array_equal(shown, theirs)
        self.assertFalse(np.array_equal(weights[1][0], weights[2][0]))
        self.assertEqual(
            json.loads((run_dir / "run.json").read_text())["best_epoch"], 2
        )
        path = self.folder / "data/data_road/testing/image_2/um_000000.png"
        image = helper.read_image(path)
        road = helper.predict_road(model, image[None], (32, 96)).numpy()[0]
        overlay = helper.read_image(run_dir / path.name)
        np.testing.assert_array_equal(overlay, helper.overlay(image, road))

    def test_the_same_seed_gives_the_same_bits(self):
        for seed in 1, 1, 2:
            self.assertEqual(self.main("--seed", seed)[0], 0)
        weights, losses = [], []
        for run_dir in self.run_dirs():
            model, _ = small_model()
            model.load_weights(run_dir / "best.weights.h5")
            weights.append([v.numpy().tolist() for v in model.trainable_variables])
            history = json.loads((run_dir / "run.json").read_text())["history"]
            losses.append([(e["loss"], e["MaxF"], e["holdout_loss"]) for e in history])
        self.assertEqual(losses[0], losses[1])
        self.assertEqual(weights[0], weights[1])
        self.assertNotEqual(losses[0], losses[2])

    def test_deterministic_ops_are_asked_for_and_their_cost_is_told(self):
        with mock.patch.object(tf.config.experimental, "enable_op_determinism") as ask:
            self.assertEqual(self.main("--epochs", 0)[0], 0)
            ask.assert_not_called()
            output = self.main("--epochs", 0, "--deterministic")[1]
            ask.assert_called_once_with()
        self.assertIn("deterministic: the same bits on every run, at a lower", output)
        self.assertTrue(self.record()["config"]["deterministic"])

    def test_runs_of_one_second_do_not_collide(self):
        self.patch(helper.time, "strftime", lambda form: "20261122-141500")
        for _ in range(3):
            self.assertEqual(self.main("--epochs", "0")[0], 0)
        names = [path.name for path in self.run_dirs()]
        expected = ["20261122-141500", "20261122-141500-2", "20261122-141500-3"]
        self.assertEqual(names, expected)

    def test_without_holdout_it_trains_on_all_and_the_last_is_best(self):
        code, output, _ = self.main("--holdout-fraction", 0, "--keep-prob", 1)
        self.assertEqual(code, 0)
        self.assertIn("no hold-out", output)
        (run_dir,) = self.run_dirs()
        run = json.loads((run_dir / "run.json").read_text())
        self.assertEqual(run["data"]["training"], 18)
        self.assertEqual((run["best_epoch"], run["scores"]), (2, {}))
        self.assertNotIn("MaxF", run["history"][0])

    def test_the_demo_draws_its_own_data_and_settings_win_over_its_own(self):
        config = main.parse(["--demo", "--image-width", "96"])
        self.assertEqual((config.image_height, config.image_width), (64, 96))
        self.assertEqual((config.vgg, config.keep_prob), ("random", 1))
        self.assertEqual(main.parse([]).image_height, 160)
        data = self.folder / "data" / "data_road"
        shutil.rmtree(data)
        code, output, _ = self.main("--demo", "--epochs", "0")
        self.assertEqual(code, 0)
        self.assertIn("a demonstration on drawn roads", output)
        self.assertTrue((data.parent / "demo" / "data_road").is_dir())
        self.assertFalse(data.exists())

    def test_a_gpu_that_tensorflow_cannot_use_is_spoken_of(self):
        self.assertNotIn("NVIDIA", self.main("--epochs", 0)[1])
        self.patch(main.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
        code, output, _ = self.main("--epochs", 0)
        self.assertEqual(code, 0)
        self.assertRegex(output, "cannot use the NVIDIA GPU.*\n.*requirements.txt")

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

    def test_bad_data_ends_with_one_line_and_no_run(self):
        training = self.folder / "data" / "data_road" / "training"
        image = training / "image_2" / "umm_000004.png"
        label = training / "gt_image_2" / "umm_road_000004.png"
        self.assert_refused(1, "--batch-size", "16", said="16 is more than the 15")
        self.assert_refused(1, "--vgg", self.folder / "vgg", said="vgg: not a file")
        self.assert_refused(1, "--weights", training, said="training: not a file")
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
            self.assert_refused(
                1, said="runs: Can't write data .* errno = 28.: make room"
            )
        full = OSError(28, "No space left on device")
        with mock.patch.object(helper.os, "replace", side_effect=full):
            self.assert_refused(1, said="No space left on device: make room")
        self.assertEqual(self.run_dirs(), [])
        runs = self.folder / "link"
        runs.symlink_to(self.folder / "unmounted")
        self.assert_refused(1, "--runs-dir", runs, said=str(runs))

    def test_a_run_file_that_cannot_be_renamed_leaves_nothing_beside(self):
        self.assertEqual(self.main("--epochs", 0)[0], 0)
        run_dir, record = self.run_dirs()[0], self.record()
        before = sorted(run_dir.iterdir())
        with (
            mock.patch.object(helper.os, "replace", side_effect=OSError),
            self.assertRaises(OSError),
        ):
            helper.write_run(run_dir, record)
        self.assertEqual(sorted(run_dir.iterdir()), before)

    def test_a_failure_after_training_does_not_look_finished(self):
        full = mock.Mock(side_effect=tf.errors.ResourceExhaustedError(None, None, "\n"))
        self.patch(helper, "gen_test_output", full)
        code, _, errors = self.main()
        self.assertEqual(code, 1)
        self.assertRegex(errors, r"^out of memory: lower --batch-size.*\n$")
        (run_dir,) = self.run_dirs()
        here = sorted(path.name for path in run_dir.iterdir())
        names = ["best.weights.h5", "checkpoint", "index.html", "progress.gif"]
        self.assertEqual(here, [*names, "run.json"])
        self.assertFalse(json.loads((run_dir / "run.json").read_text())["finished"])

    def test_ctrl_c_ends_it_with_one_line(self):
        self.patch(main, "train_nn", mock.Mock(side_effect=KeyboardInterrupt))
        self.assert_refused(130, said="stopped by SIGINT")

    def test_a_process_says_no_more_than_its_line(self):
        """Once as a process, for what only shows there: import, exit code, signal."""
        main_py = Path(main.__file__)
        command = [
            sys.executable,
            str(main_py),
            "--data-dir",
            str(self.folder / "none"),
        ]
        command += ["--runs-dir", str(self.folder / "runs"), "--vgg", "random"]
        (self.folder / "none" / "data_road").mkdir(parents=True)
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        ours = [line for line in done.stderr.splitlines() if "no images in" in line]
        self.assertEqual(ours, done.stderr.splitlines()[-1:])
        self.assertNotIn("Traceback", done.stderr)
        command[3] = str(self.folder / "data")
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script would
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes)
        signal.signal(signal.SIGINT, previous)
        self.addCleanup(process.kill)
        process.stdout.readline()  # the program has begun
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=200)
        self.assertEqual(process.returncode, 130, errors)
        self.assertEqual(errors.splitlines()[-1], "stopped by SIGINT")
        self.assertNotIn("Traceback", errors)


def measures_by_hand(confidence, labels):
    """Return some of the scores of pixels (N,), threshold by threshold."""
    confidence, labels = confidence[labels != VOID], labels[labels != VOID]
    best, levels = {"MaxF": -1}, np.zeros(11)
    for k in range(256):
        found = confidence >= k
        tp, fp = (found & (labels == 1)).sum(), (found & (labels == 0)).sum()
        precision, recall = tp / (tp + fp + 1e-10), tp / (labels == 1).sum()
        f1 = 2 * precision * recall / (precision + recall + 1e-10)
        at = np.arange(11) / 10 <= recall
        levels[at] = np.maximum(levels[at], precision)
        if k == 128:
            iou50 = tp / ((labels == 1).sum() + fp)
        if f1 > best["MaxF"]:
            best = {"MaxF": f1, "PRE": precision, "REC": recall, "threshold": k / 255}
            best |= {"FPR": fp / (labels == 0).sum(), "IoU": f1 / (2 - f1)}
    best |= {"AP": levels.mean(), "FNR": 1 - best["REC"], "IoU50": iou50}
    return {name: 100 * value for name, value in best.items()}


class Score(Program):
    def test_scores_follow_from_the_files_in_holdout_alone(self):
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
                pairs["bev"] = [helper.birds_eye(x, homography, o) for x, o in sides]
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
                expected = measures_by_hand(x, y)
                self.assertEqual(set(found), set(expected))
                for name, value in expected.items():
                    self.assertAlmostEqual(found[name], value, places=5, msg=name)
                row = rf"{kind} +{len(pairs)} +{ours[plane][kind]['MaxF']:.2f}"
                self.assertRegex(output, row)
        image = self.folder / "data/data_road/training/image_2/uu_000005.png"
        model, _ = small_model()
        model.load_weights(run_dir / "best.weights.h5")
        road = helper.predict_road(model, helper.read_image(image)[None], (32, 96))[0]
        saved = np.asarray(Image.open(run_dir / "holdout" / "uu_road_000005.png"))
        self.assertLessEqual(np.abs(saved - 255.0 * road).max(), 0.5001)

    def test_trained_weights_are_scored_without_training(self):
        self.assertEqual(self.main("--epochs", 1, "--holdout-fraction", 0.4)[0], 0)
        weights = self.run_dirs()[0] / "best.weights.h5"
        shutil.rmtree(self.folder / "data/data_road/training/calib")
        self.patch(helper, "maybe_download_pretrained_vgg", None)
        arguments = "--epochs", 0, "--vgg", "downloaded", "--weights", weights
        code, output, errors = self.main(*arguments)
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("no hold-out image has a calibration", output)
        both = []
        for run_dir in self.run_dirs():
            model, _ = small_model()
            model.load_weights(run_dir / "best.weights.h5")
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
        model.save_weights(weights)
        self.assert_refused(1, *arguments, said="FCN-8s .not finite")
        shutil.copy(weights, self.folder / "x.keras")
        arguments = *arguments[:-1], self.folder / "x.keras"
        self.assert_refused(1, *arguments, said="x.keras: not weights")

    def test_a_label_of_another_size_is_not_scored(self):
        label = self.folder / "data/data_road/training/gt_image_2/um_road_000005.png"
        Image.new("RGB", (24, 40)).save(label)
        self.assert_refused(1, "--epochs", 0, said="um_road_000005.png is 24x40")

    def test_a_submission_is_what_the_benchmark_takes(self):
        self.assertEqual(self.main("--epochs", 0, "--submission")[0], 0)
        (run_dir,) = self.run_dirs()
        with zipfile.ZipFile(run_dir / "submission.zip") as archive:
            names = [f"{kind}_road_000000.png" for kind in ("um", "umm", "uu")]
            self.assertEqual(sorted(archive.namelist()), names)
            content = io.BytesIO(archive.read("uu_road_000000.png"))
        view = Image.open(content)
        self.assertEqual((view.size, view.mode), ((400, 800), "L"))
        path = self.folder / "data/data_road/testing/image_2/uu_000000.png"
        model, _ = small_model()
        model.load_weights(run_dir / "best.weights.h5")
        road = helper.predict_road(model, helper.read_image(path)[None], (32, 96))[0]
        expected = helper.birds_eye(
            np.uint8(np.round(255 * road)), helper.read_homography(path), 0
        )
        self.assertLessEqual(np.abs(np.asarray(view) - expected.astype(int)).max(), 1)
        (path.parent.parent / "calib" / "uu_000000.txt").unlink()
        said = "testing has no uu_000000.txt .1 of 3 are missing.: add"
        self.assert_refused(1, "--submission", said=said)
        self.assertEqual(len(self.run_dirs()), 1)


# ------------------------------------------------------------------------ resume


DRIVER = """
import os, sys, main, project_tests, tensorflow as tf
moment, signals = sys.argv.pop(1), [int(n) for n in sys.argv.pop(1).split()]
main.load_vgg = project_tests.small_vgg
with project_tests.kill_at(moment, signals):
    main.program()
"""


def kill_at(moment, signals):
    """Return a patch with which the program sends itself `signals` at a moment."""

    def kill(condition=True):
        for signum in signals if condition else ():
            os.kill(os.getpid(), signum)

    def with_kill(train_step, state):
        @functools.wraps(train_step)
        def step(*batch):
            result = train_step(*batch)
            kill(int(state.step.numpy()) == int(moment))
            return result

        return step, state

    def half_written(state, path):
        Path(f"{path}_temp").mkdir()
        Path(f"{path}_temp", "part-0").write_bytes(b"half")
        kill()

    optimize, evaluate = main.optimize, main.evaluate
    if moment.isdigit():
        new = main, "optimize", lambda *args: with_kill(*optimize(*args))
    elif moment == "evaluating":
        new = main, "evaluate", lambda *args: (kill(), evaluate(*args))[1]
    elif moment == "writing":
        new = tf.train.Checkpoint, "write", half_written
    else:
        new = helper, "save_inference_samples", lambda *args: kill()
    return mock.patch.object(*new)


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
            timeout=200,
        )
        return done.returncode, done.stdout, done.stderr

    def outcome(self, run_dir):
        """Return all that must be equal: weights, history, scores, pictures."""
        model, _ = small_model()
        model.load_weights(run_dir / "best.weights.h5")
        record = json.loads((run_dir / "run.json").read_text())
        self.assertTrue(record["finished"])
        self.assertFalse((run_dir / "checkpoint").exists())
        for epoch in record["history"]:
            self.assertGreater(epoch.pop("seconds"), 0)
            self.assertGreater(epoch.pop("images_per_second"), 0)
        return {
            "weights": [w.numpy().tobytes() for w in model.trainable_variables],
            **{name: record[name] for name in ("history", "best_epoch", "scores")},
            **{path.name: path.read_bytes() for path in run_dir.rglob("*.png")},
        }

    def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(self):
        self.assertEqual(self.main("--epochs", 3)[0], 0)
        expected = self.outcome(self.run_dirs()[0])
        moments = [
            (2, signal.SIGTERM, 143, 2),  # inside the first epoch
            (3, signal.SIGINT, 130, 3),  # at an epoch's end, before its scores
            ("evaluating", signal.SIGTERM, 143, 3),
            (8, signal.SIGTERM, 143, 8),
            (9, signal.SIGINT, 130, 9),  # the last step
        ]
        steps = []
        for moment, signum, code, step in moments:
            with self.subTest(moment):
                run = self.resume if steps else self.main
                result = self.stopped(moment, run, "--epochs", 3, signum=signum)
                name = signal.Signals(signum).name
                self.assert_line(result, f"^stopped by {name}$", code)
                output = result[1]
                self.assertIn(f"main.py --resume {self.run_dirs()[-1]}", output)
                if steps:
                    self.assertIn(f"resumed at step {steps[-1]} of 9", output)
                steps.append(step)
        self.assertEqual(self.resume()[0], 0)
        self.assertEqual(self.record()["resumed"], steps)
        self.assertEqual(self.outcome(self.run_dirs()[1]), expected)

    def test_a_process_survives_every_kill(self):
        self.assertEqual(self.main()[0], 0)
        expected = self.outcome(self.run_dirs()[0])
        begin = ["--data-dir", self.folder / "data", "--runs-dir", self.folder / "runs"]
        begin += ["--image-height=32", "--image-width=96", "--epochs=2", "--vgg=random"]
        begin.append("--checkpoint-minutes=0")
        moments = [
            ("2", "9", -9, 0),  # before any checkpoint
            ("writing", "9", -9, 0),  # the first checkpoint
            ("5", "9", -9, 3),
            ("5", "15 15", -15, 3),  # the second signal ends it at once
            ("4", "2", 130, 4),
            ("writing", "9", -9, 4),
            ("saving", "9", -9, 6),
        ]
        arguments, resumed = begin, []
        for moment, signals, code, step in moments:
            with self.subTest(f"{signals} at {moment}"):
                found, output, errors = self.process(moment, signals, *arguments)
                self.assertEqual(found, code, errors)
                if arguments is not begin:
                    self.assertIn(f"resumed at step {resumed[-1]} of 6", output)
                arguments = ["--resume", self.run_dirs()[-1]]
                resumed.append(step)
        self.assertEqual(self.resume()[0], 0)
        self.assertEqual(self.record()["resumed"], resumed)
        self.assertEqual(self.outcome(self.run_dirs()[1]), expected)

    def test_a_damaged_checkpoint_gives_way_to_the_one_before(self):
        self.assertEqual(self.main()[0], 0)
        expected = self.outcome(self.run_dirs()[0])
        self.assertEqual(self.stopped(5, self.main, "--checkpoint-minutes", 0)[0], 143)
        run_dir = self.run_dirs()[1]
        folder = run_dir / "checkpoint"
        whole = self.folder / "whole"
        shutil.copytree(run_dir, whole)
        data = folder / "ckpt-2.data-00000-of-00001"
        bytes_ = bytearray(data.read_bytes())
        bytes_[len(bytes_) // 2] ^= 1
        damages = {
            "a bit": lambda: data.write_bytes(bytes_),
            "cut": lambda: data.write_bytes(bytes_[:1000]),
            "gone": lambda: data.unlink(),
            "index": lambda: (folder / "ckpt-2.index").write_bytes(b"damaged"),
        }
        for name, damage in damages.items():
            with self.subTest(name):
                shutil.rmtree(run_dir)
                shutil.copytree(whole, run_dir)
                damage()
                code, output, _ = self.resume()
                self.assertEqual(code, 0)
                self.assertIn("ckpt-2: not a whole checkpoint", output)
                self.assertIn("resumed at step 3 of 6", output)
                self.assertEqual(self.outcome(run_dir), expected)
        shutil.rmtree(run_dir)
        shutil.copytree(whole, run_dir)
        for path in folder.glob("*.index"):
            path.write_bytes(b"damaged")
        code, _, errors = self.resume()
        self.assertEqual(code, 1)
        self.assertRegex(errors, "^.*no checkpoint can be restored: remove this.*\n$")

    def test_the_best_weights_are_those_of_the_checkpoint_that_counts(self):
        seen = []

        def evaluate(model, batches, strategy):
            seen.append([w.numpy() for w in model.trainable_variables])
            if len(seen) > 2:
                raise ProgramError("as if it were killed")
            return {"MaxF": 50.0 + len(seen)}

        self.patch(main, "evaluate", evaluate)
        self.main("--epochs", 3, "--checkpoint-minutes", 0)
        (run_dir,) = self.run_dirs()
        self.assertEqual(self.record()["best_epoch"], 2)
        (run_dir / "checkpoint/ckpt-2.index").write_bytes(b"damaged")
        self.assert_line(self.resume(), "as if it were killed")
        self.assertEqual(self.record()["best_epoch"], 1)
        model, _ = small_model()
        model.load_weights(run_dir / "best.weights.h5")
        for ours, theirs in zip(model.trainable_variables, seen[0]):
            np.testing.assert_array_equal(ours, theirs)

    def test_at_most_two_checkpoints_are_kept(self):
        kept = []
        evaluate = main.evaluate

        def count(*arguments):
            kept.append(len(helper.find_checkpoints(self.run_dirs()[-1])))
            return evaluate(*arguments)

        self.patch(main, "evaluate", count)
        with mock.patch.object(helper, "write_weights") as write:
            self.assertEqual(self.main("--epochs", 5, "--checkpoint-minutes", 0)[0], 0)
        self.assertEqual(kept, [0, 1, 2, 2, 2])
        best = [epoch["MaxF"] for epoch in self.record()["history"]]
        better = sum(
            value > max(best[:at], default=-1) for at, value in enumerate(best)
        )
        self.assertEqual(write.call_count, better)
        kept.clear()
        self.assertEqual(self.main("--epochs", 5)[0], 0)  # every 5 minutes
        self.assertEqual(kept, [0] * 5)
        for step in 2, 4, 5, 7:
            run = self.resume if step > 2 else self.main
            self.assertEqual(self.stopped(step, run, "--epochs", 5)[0], 143)
        folder = self.run_dirs()[-1] / "checkpoint"
        (folder / "ckpt-1.data-00000-of-00001").write_bytes(b"a kill left it")
        (folder / "ckpt-old.index").write_bytes(b"of another program")
        self.assertEqual(self.stopped(8, self.resume)[0], 143)
        names = {path.name.partition(".")[0] for path in folder.glob("ckpt*")}
        self.assertEqual(names, {"ckpt-4", "ckpt-5"})

    def test_a_checkpoint_is_all_that_a_resume_needs(self):
        self.assertEqual(self.main("--epochs", 0)[0], 0)
        weights = self.folder / "trained.weights.h5"
        shutil.move(self.run_dirs()[0] / "best.weights.h5", weights)
        self.assertEqual(self.stopped(4, self.main, "--weights", weights)[0], 143)
        weights.unlink()
        self.assertEqual(self.resume()[0], 0)

    def test_a_folder_that_tensorflow_would_not_find_is_refused_at_once(self):
        runs = self.folder / "runs[1]"
        self.assert_line(self.main("--runs-dir", runs), "name another --runs-dir")
        self.assertEqual(list(runs.iterdir()), [])

    def test_a_finished_run_is_left_as_it_is(self):
        self.assertEqual(self.main("--epochs", 1)[0], 0)
        (run_dir,) = self.run_dirs()
        before = [(path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")]
        code, output, errors = self.resume()
        self.assertEqual((code, errors), (0, ""))
        self.assertIn(f"is finished; its weights are {run_dir}/best", output)
        after = [(path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")]
        self.assertEqual(before, after)
        record = (run_dir / "run.json").read_bytes()
        self.patch(helper, "is_finished", lambda run_dir: False)  # as seen a while ago
        self.assert_line(self.resume(), "is finished: nothing to go on with")
        self.assertEqual((run_dir / "run.json").read_bytes(), record)

    def test_a_run_keeps_its_settings(self):
        rate = ["--learning-rate", "0.00123", "--keep-prob", "0.7", "--submission"]
        self.assertEqual(self.stopped(4, self.main, *rate)[0], 143)
        config = self.record()["config"]
        for flag in "--seed=0", "--learning-rate=0.00123", "--demo", "--vgg=random":
            self.assert_line(self.resume(flag), flag.partition("=")[0], 2)
        other = self.folder / "other"
        helper.maybe_draw_kitti_road(other, training=21, testing=3)
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

    def test_two_programs_do_not_work_on_one_run(self):
        self.assertEqual(self.stopped(4, self.main)[0], 143)
        with helper.locked(self.run_dirs()[0] / "checkpoint" / "run"):
            self.assert_line(self.resume(), "another program works on this run")
        self.assertEqual(self.resume()[0], 0)

    def test_what_is_no_run_is_named(self):
        for content in None, "", "{", "[]", "{}":
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

        def fill(state, path):
            if path.endswith("ckpt-2"):
                Path(f"{path}_temp").mkdir()
                raise full
            return write(state, path)

        patcher = mock.patch.object(tf.train.Checkpoint, "write", fill)
        with patcher:
            self.assert_line(
                self.main("--checkpoint-minutes", 0),
                "ckpt-2: No space left on device: .* is kept",
            )
        self.assertEqual(self.resume()[0], 0)
        self.assertEqual(self.record()["resumed"], [3])


# ----------------------------------------------------------- what was trained, used


class Devices(Program):
    """One device, two, and two processes: the same run."""

    settings = "--keep-prob", 1, "--checkpoint-minutes", 0

    def workers(self, kills, *arguments, command=(), signum=signal.SIGKILL):
        """Run a process for each of `kills`, the steps at which they get a signal.

        Returns exit code, stdout and stderr of each; `command` are other settings of
        the second.
        """
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in kills]
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        processes = []
        for index, moment in enumerate(kills):
            task = {"type": "worker", "index": index}
            cluster = {"cluster": {"worker": addresses}, "task": task}
            rest = map(str, (*arguments, *(command if index else ())))
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        DRIVER,
                        str(moment),
                        str(int(signum)),
                        *rest,
                    ],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=Path(main.__file__).parent,
                    env=os.environ | {"TF_CONFIG": json.dumps(cluster)},
                )
            )
        with ThreadPoolExecutor(len(kills)) as pool:  # none may wait for its pipe
            said = [*pool.map(lambda each: each.communicate(timeout=200), processes)]
        return [(each.returncode, *both) for each, both in zip(processes, said)]

    def small(self, runs):
        """Return the settings of self.main for a folder of runs of its own."""
        paths = "--data-dir", self.folder / "data", "--runs-dir", self.folder / runs
        size = "--image-height=32", "--image-width=96", "--epochs=2", "--vgg=random"
        return *paths, *size, *self.settings

    def outcome(self, runs):
        (run_dir,) = (self.folder / runs).iterdir()
        model, _ = small_model()
        model.load_weights(run_dir / "best.weights.h5")
        record = json.loads((run_dir / "run.json").read_text())
        self.assertTrue(record["finished"])
        return record, [w.numpy() for w in model.trainable_variables]

    def assert_same(self, ours, theirs, replicas, workers):
        (record, weights), (other, other_weights) = ours, theirs
        self.assertEqual(record["device"]["replicas"], replicas)
        self.assertEqual(record["device"]["workers"], workers)
        self.assertEqual([epoch["step"] for epoch in record["history"]], [3, 6])
        for epoch, expected in zip(record["history"], other["history"]):
            for name in "loss", "l2", "gradient_norm", "holdout_loss", "MaxF", "IoU":
                np.testing.assert_allclose(epoch[name], expected[name], rtol=1e-5)
        for value, expected in zip(weights, other_weights):
            error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
            self.assertLess(error, 1e-5)
        for plane in "image", "bev":
            for kind, measures in record["scores"][plane].items():
                for name, value in measures.items():
                    expected = other["scores"][plane][kind][name]
                    self.assertAlmostEqual(value, expected, delta=0.01)

    def test_two_replicas_and_two_workers_are_as_one(self):
        self.assertEqual(self.call(*self.small("one"))[0], 0)
        one = self.outcome("one")
        self.assert_same(one, one, 1, 1)
        two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), 1
        with mock.patch.object(main, "choose_strategy", lambda: two):
            self.assertEqual(self.call(*self.small("two"))[0], 0)
        self.assert_same(self.outcome("two"), one, 2, 1)
        ends = self.workers([0, 0], *self.small("workers"))
        self.assertEqual([end[0] for end in ends], [0, 0], ends)
        self.assert_same(self.outcome("workers"), one, 2, 2)
        self.assertIn("segmented test images", ends[0][1])
        self.assertNotIn("segmented", ends[1][1])  # only the chief writes

    def test_a_lost_worker_ends_the_others_and_any_number_of_them_goes_on(self):
        self.assertEqual(self.call(*self.small("one"))[0], 0)
        chief, lost = self.workers([0, 4], *self.small("two"))
        self.assertEqual((chief[0], lost[0]), (1, -9), chief)
        said = "another worker has ended: start all of them again, with --resume"
        self.assertEqual(own_lines(chief[2]), [said])
        (run_dir,) = (self.folder / "two").iterdir()
        self.assertIn(f"main.py --resume {run_dir}", chief[1])
        copy = self.folder / "alone" / run_dir.name
        shutil.copytree(run_dir, copy)
        ends = self.workers([0, 0], "--resume", run_dir)
        self.assertEqual([end[0] for end in ends], [0, 0], ends)
        self.assertEqual(self.call("--resume", copy)[0], 0)
        for runs, replicas in ("two", 2), ("alone", 1):
            ours = self.outcome(runs)
            self.assertEqual(ours[0]["resumed"], [3])
            self.assert_same(ours, self.outcome("one"), replicas, replicas)

    def test_workers_that_differ_are_refused(self):
        weights = self.folder / "other.weights.h5"
        small_model()[0].save_weights(weights)
        for command in ["--batch-size", 4], ["--weights", weights]:
            ends = self.workers([0, 0], *self.small("two"), command=command)
            for code, _, errors in ends:
                self.assertEqual(code, 1)
                self.assertRegex(own_lines(errors)[-1], "^another worker has (oth|end)")
            self.assertIn("other settings", "".join(end[2] for end in ends))
            self.assertEqual([*self.folder.glob("two/*")], [])

    def test_a_signal_to_one_worker_stops_all_with_a_checkpoint(self):
        self.assertEqual(self.call(*self.small("one"))[0], 0)
        settings = self.small("two")[:-1] + (9,)  # none is due
        for end in self.workers([0, 1], *settings, signum=signal.SIGTERM):
            self.assertEqual((end[0], own_lines(end[2])), (143, ["stopped by SIGTERM"]))
        (run_dir,) = (self.folder / "two").iterdir()
        self.assertEqual(self.call("--resume", run_dir)[0], 0)
        ours = self.outcome("two")
        self.assertEqual(ours[0]["resumed"], [3])
        self.assert_same(ours, self.outcome("one"), 1, 1)

    def test_a_cluster_that_is_none_is_refused_with_one_line(self):
        for text in "{", '{"cluster": 3}', '{"cluster": {"worker": ["a:1", "b:2"]}}':
            with mock.patch.dict(os.environ, TF_CONFIG=text):
                self.assert_refused(1, said="^TF_CONFIG: not a cluster .*: correct it")
        with mock.patch.dict(os.environ, TF_CONFIG="{}"):
            self.assertEqual(self.main("--epochs", 0)[0], 0)

    def test_the_precision_follows_the_gpu_and_is_kept(self):
        self.addCleanup(keras.config.set_dtype_policy, "float32")
        auto = ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((7, 5), "float32")
        for capability, precision in auto:
            self.patch(main, "compute_capability", functools.partial(tuple, capability))
            self.assertEqual(main.prepare_device("auto")["precision"], precision)
        self.patch(main, "compute_capability", lambda: (8, 0))
        said = self.stopped(2, self.main)[1]
        self.assertIn("precision bfloat16", said)
        self.patch(main, "compute_capability", lambda: (0, 0))
        self.assertIn("precision bfloat16", self.resume()[1])
        self.assertEqual(self.record()["device"]["precision"], "bfloat16")
        for epoch in self.record()["history"]:
            self.assertTrue(0 < epoch["loss"] < 1)
        self.assertEqual(self.main("--precision", "float16")[0], 0)
        self.assert_refused(2, "--precision", "int8", said="int8 is not auto, float32")

    def test_xla_is_left_out_where_it_does_not_work(self):
        for capability, used in ((9, 0), True), ((10, 0), False), ((12, 0), False):
            self.patch(main, "compute_capability", functools.partial(tuple, capability))
            code, said, _ = self.main("--xla", "--precision", "float32", "--epochs", 1)
            self.assertEqual((code, "XLA is off" in said), (0, not used))
            self.assertEqual(self.record()["device"]["xla"], used)

    def test_without_memory_the_batch_that_should_fit_is_named(self):
        def train_nn(*arguments):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM")

        self.patch(main, "train_nn", train_nn)
        said = "^out of memory with --batch-size 5: 4 should fit; set that, or lower"
        self.assert_refused(1, said=said)
        self.patch(main, "largest_batch", lambda *_: 0)
        self.assert_refused(1, said="^out of memory with --batch-size 5: too many: low")
        self.patch(main, "largest_batch", lambda *_: 2)
        self.assert_refused(1, said="^out of memory with --batch-size 5: 2 should fit")


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

    def test_it_prints_a_table_and_json(self):
        size = ["--image-height=32", "--image-width=96", "--benchmark-steps=1"]
        paths = ["--data-dir", self.folder / "data", "--batch-size=2"]
        done = subprocess.run(
            [sys.executable, __file__, "--benchmark", *size, *map(str, paths)],
            check=False,
            capture_output=True,
            text=True,
            timeout=200,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        *table, text = done.stdout.splitlines()
        results = json.loads(text)
        self.assertTrue(all(value > 0 for value in results.values()))
        self.assertTrue(0 < results["train_share"] < 1.2)
        shares = re.findall(r"([0-9.]+) % of the product", "".join(table))
        expected = (results["train_share"], results["predict_share"])
        for shown, share in zip(shares, expected, strict=True):
            self.assertAlmostEqual(float(shown), 100 * share, places=1)


class Use(Program):
    """Images, videos and an exported model, with weights that were not trained long."""

    def setUp(self):
        super().setUp()
        self.assertEqual(self.main("--epochs", 0)[0], 0)
        self.weights = self.run_dirs()[0] / "best.weights.h5"
        self.model, _ = small_model()
        self.model.load_weights(self.weights)
        self.noise = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
        road = helper.predict_road(self.model, self.noise[None], (32, 96)).numpy()
        middle = float(np.median(np.log(road / (1 - road))))  # so half of it is road
        self.model.get_layer("score_fc7").bias.assign([middle, 0])
        self.model.save_weights(self.weights)
        shutil.rmtree(self.folder / "data")
        for name in "maybe_download_kitti_road", "maybe_download_pretrained_vgg":
            self.patch(helper, name, mock.Mock(side_effect=AssertionError))

    def use(self, *arguments):
        runs = ["--runs-dir", self.folder / "out"]
        return self.call("--weights", self.weights, *runs, *arguments)

    def out(self):
        return max((self.folder / "out").glob("*"))

    def overlay(self, image):
        road = helper.predict_road(self.model, image[None], (32, 96)).numpy()[0]
        return helper.overlay(image, road)

    def test_an_image_and_a_folder_keep_names_formats_and_sizes(self):
        images = self.folder / "images"
        images.mkdir()
        sizes = {"a.png": (90, 40), "b.PNG": (90, 40), "c.png": (31, 77)}
        for name, size in sizes.items():
            other = np.roll(self.noise, len(self.files(images)), axis=0)
            Image.fromarray(other).resize(size).save(images / name)
        Image.open(images / "a.png").save(images / "d.jpeg")
        (images / "notes.txt").write_text("no image")
        code, output, errors = self.use("--predict", images)
        self.assertEqual((code, errors), (0, ""))
        self.assertRegex(output, r"4 overlays in .*: .* a second, of which the network")
        self.assertEqual(self.files(self.out()), sorted([*sizes, "d.jpeg"]))
        for name in sizes:
            expected = self.overlay(helper.read_image(images / name))
            np.testing.assert_array_equal(
                helper.read_image(self.out() / name), expected
            )
        self.assertEqual(Image.open(self.out() / "d.jpeg").format, "JPEG")
        changed = self.overlay(self.noise) != self.noise
        self.assertTrue(0.3 < changed.any(-1).mean() < 0.7)
        code, _, _ = self.use("--predict", images / "c.png")
        self.assertEqual((code, self.files(self.out())), (0, ["c.png"]))

    def test_a_broken_image_is_named_at_the_end_and_the_rest_goes_on(self):
        images = self.folder / "images"
        images.mkdir()
        (images / "b.png").write_bytes(b"no image")
        for name in "a.png", "c.png":
            Image.new("RGB", (64, 32)).save(images / name)
        result = self.use("--predict", images)
        self.assert_line(result, "1 of 3 left out: .*b.png: not a readable image")
        self.assertIn("2 overlays", result[1])
        self.assertEqual(self.files(self.out()), ["a.png", "c.png"])

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

    def test_a_video_keeps_its_size_rate_and_number_of_frames(self):
        for size, rate, suffix in ((97, 43), 12.5, "avi"), ((96, 48), 30, "mkv"):
            path = self.folder / f"drive.{suffix}"
            with imageio.get_writer(
                path,
                format="FFMPEG",
                fps=rate,
                codec="libx264",
                macro_block_size=1,
                pixelformat="yuv444p",
            ) as writer:
                for brightness in range(0, 240, 8):
                    writer.append_data(np.full((*size[::-1], 3), brightness, np.uint8))
            self.assertEqual(self.use("--predict", path)[0], 0)
            self.assertEqual(self.files(self.out()), ["drive.mp4"])
            with imageio.get_reader(self.out() / "drive.mp4", format="FFMPEG") as video:
                data = video.get_meta_data()
                frames = [frame for frame in video]
            self.assertEqual((data["size"], data["fps"], len(frames)), (size, rate, 30))
            for brightness in 80, 160:  # in order, and green where the overlay is
                frame = np.full((*size[::-1], 3), brightness, np.uint8)
                difference = frames[brightness // 8] - self.overlay(frame).astype(float)
                self.assertLess(np.abs(difference).mean(), 12)

    def test_a_video_of_varying_rate_keeps_its_length(self):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi"]
        command += ["-i", "testsrc=size=96x48:rate=1000:duration=3", "-fps_mode", "vfr"]
        path = self.folder / "drive.webm"
        select = "select='not(mod(n,100))*lt(n,1500)+not(mod(n,250))'"
        subprocess.run([*command, "-vf", select, path], check=True)
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

    def test_what_cannot_be_used_is_refused_with_one_line(self):
        for path, said in (
            (self.folder / "none.mp4", "none.mp4: no such file"),
            (self.weights.parent / "run.json", "run.json: not a readable video"),
            (self.folder, "no .png, .jpg, .jpeg in it"),
        ):
            self.assert_line(self.use("--predict", path), re.escape(said))
        self.assertEqual(list((self.folder / "out").glob("*")), [])
        for setting in "--demo", "--epochs=3", "--resume=runs":
            result = self.use("--predict", self.folder, setting)
            self.assert_line(result, f"{setting.partition('=')[0]} does not go with", 2)
        result = self.call("--weights", self.folder, "--predict", self.folder)
        self.assert_line(result, "no file: name a best.weights.h5")
        code, _, errors = self.call("--predict", self.folder)
        self.assertEqual(code, 2)
        self.assertIn("need --weights", errors)
        record = json.loads((self.weights.parent / "run.json").read_text())
        record["classes"] = ["cat", "dog"]
        (self.weights.parent / "run.json").write_text(json.dumps(record))
        code, _, errors = self.use("--predict", self.folder)
        self.assertRegex(errors, "run.json: classes .'cat', 'dog'.")
        (self.weights.parent / "run.json").unlink()
        self.assert_line(
            self.use("--predict", self.folder), "run.json: not the record of a run"
        )

    def test_an_exported_model_is_the_program_bit_for_bit(self):
        folder = self.folder / "saved"
        self.assertEqual(self.use("--export", folder)[0], 0)
        rng = np.random.default_rng(0)
        shapes = (1, 60, 40, 3), (1, 300, 200, 3), (2, 75, 131, 3), (1, 800, 100, 3)
        for index, shape in enumerate([*shapes, (5, 300, 200, 3)]):
            images = rng.integers(0, 256, shape, np.uint8)
            road = helper.predict_road(self.model, images, (32, 96))
            for name, tensor in ("images", tf.constant(images)), ("road", road):
                content = tf.io.serialize_tensor(tensor).numpy()
                (self.folder / f"{name}{index}").write_bytes(content)
        code = f"""
import tensorflow as tf
model = tf.saved_model.load({str(folder)!r})
for index in "01234":
    images, expected = (
        tf.io.parse_tensor(tf.io.read_file({str(self.folder)!r} + name + index), kind)
        for name, kind in (("/images", tf.uint8), ("/road", tf.float32))
    )
    ours = model.signatures["serving_default"](images)["road"]
    assert ours.dtype == tf.float32 and bool(tf.reduce_all(ours == expected))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assert_line(self.use("--export", folder), "saved: exists")


# ------------------------------------------------------------------------ report


class Page(html.parser.HTMLParser):
    """What a page holds: its tags, its links, its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [v for name, v in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "path", "polyline", "tr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in ("path", "polyline"):
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


class Report(Program):
    def page(self):
        """Return the last run's page; all its links lead to files."""
        run_dir = self.run_dirs()[-1]
        page = Page(run_dir / "index.html")
        for link in page.links:
            self.assertFalse(set(":#?") & set(link), link)
            self.assertTrue((run_dir / urllib.parse.unquote(link)).is_file(), link)
        self.assertEqual(page.open, [])
        self.assertFalse([tag for tag, _ in page.tags if tag in ("script", "link")])
        return page

    def test_a_finished_run_shows_scores_curves_and_pictures(self):
        data = self.folder / "data/data_road/testing/image_2"
        (data / "um_000000.png").rename(data / "um_<b>&'#1.png")
        rates = "--learning-rate", 0.2, "--vgg-learning-rate", 0.2
        self.assertEqual(
            self.main("--epochs", 3, "--holdout-fraction", 0.4, *rates)[0], 0
        )
        run_dir, page = self.run_dirs()[0], self.page()
        record = self.record()
        self.assertIn("finished", page.text)
        self.assertIn("um_<b>&'#1", page.text)
        self.assertNotIn("b", [tag for tag, _ in page.tags])
        for plane in "image", "bev":
            self.assertIn(f"{record['scores'][plane]['urban']['AP']:.2f}", page.text)
        self.assertIn(f"best: {record['best_epoch']}", page.text)
        worst_first = sorted(record["holdout"].values())
        self.assertGreater(len(set(worst_first)), 3)
        shown = re.findall(r"IoU (\d+\.\d\d)", page.text)
        self.assertEqual(shown, [f"{value:.2f}" for value in worst_first])
        lines = [a["points"].split() for tag, a in page.tags if tag == "polyline"]
        self.assertEqual([len(line) for line in lines], [3] * 4)
        lazy = [a.get("loading") for tag, a in page.tags if tag == "img"]
        self.assertEqual(lazy, ["lazy"] * (1 + 2 * 6 + 3))
        with Image.open(run_dir / "progress.gif") as gif:
            self.assertEqual((gif.n_frames, gif.size), (3, (96, 32)))
        image = self.folder / "data/data_road/training/image_2/uu_000005.png"
        label = image.parent.parent / "gt_image_2" / "uu_road_000005.png"
        model, _ = small_model()
        model.load_weights(run_dir / "best.weights.h5")
        road = helper.predict_road(model, helper.read_image(image)[None], (32, 96))[0]
        found, label = road.numpy() >= 0.5, helper.read_label(label)
        both = (found & (label == 1)).sum()
        either = ((found & (label != VOID)) | (label == 1)).sum()
        self.assertAlmostEqual(record["holdout"]["uu_000005"], 100 * both / either)

    def test_errors_have_their_colours(self):
        model, _ = small_model()
        model.get_layer("score_fc7").bias.assign([0.0, 50.0])  # all is road
        folder = self.folder / "data/data_road/training"
        pair = (
            folder / "image_2/um_000000.png",
            folder / "gt_image_2/um_road_000000.png",
        )
        for bias, label, colour in (50, 0, helper.FALSE), (-50, 1, helper.MISSED):
            model.get_layer("score_fc7").bias.assign([0.0, bias])
            helper.score_holdout(self.folder, model, [pair], (96, 320), 1)
            picture = helper.read_image(self.folder / "errors/um_000000_errors.jpg")
            truth = helper.resize_label(helper.read_label(pair[1]), (96, 320)).numpy()
            wrong = np.abs(picture - np.array(colour, float)).max(-1) < 60
            self.assertGreater((wrong == (truth == label)).mean(), 0.97)

    def test_a_stopped_run_has_a_report_and_an_image_is_followed_without_holdout(self):
        result = self.stopped(4, self.main, "--holdout-fraction", 0)
        self.assertEqual(result[0], 143)
        page = self.page()
        self.assertIn("not finished", page.text)
        self.assertIn("1 of 2 epochs", page.text)
        self.assertIn("progress.gif", page.links)
        self.assertEqual(self.resume()[0], 0)
        self.assertIn(": finished", self.page().text)
        with Image.open(self.run_dirs()[0] / "progress.gif") as gif:
            self.assertEqual(gif.n_frames, 2)

    def test_the_progress_has_at_most_60_frames_and_ends_with_the_last(self):
        model, _ = small_model()
        path = self.folder / "data/data_road/testing/image_2/um_000000.png"
        (self.folder / "checkpoint").mkdir()
        for epoch in range(1, 122):
            helper.keep_frame(self.folder, model, path, (32, 96), epoch, 121)
        frames = sorted((self.folder / "checkpoint/frames").iterdir())
        self.assertEqual(len(frames), 42)
        self.assertEqual(frames[-1].stem, "000000121")
        for number in range(200, 300):
            frame = Image.new("RGB", (96, 32), (number - 100, 0, 0))
            frame.save(frames[0].with_name(f"{number:09}.png"))
        helper.write_progress(self.folder)
        with Image.open(self.folder / "progress.gif") as gif:
            self.assertTrue(40 < gif.n_frames <= 60)
            gif.seek(gif.n_frames - 1)
            self.assertEqual(gif.convert("RGB").getpixel((9, 9)), (199, 0, 0))

    def test_curves_are_drawn_to_scale(self):
        for log, values in (False, (50, 100, 75)), (True, (1, 0.01, 0.1)):
            svg = helper.chart("t", {"a": list(zip((1, 2, 3), values))}, 2, log)
            points = re.search('points="([^"]+)"', svg)[1].split()
            x, y = np.array([point.split(",") for point in points], float).T
            np.testing.assert_allclose(np.diff(x, 2), 0, atol=0.11)
            self.assertAlmostEqual(abs(y[2] - y[0]), abs(y[1] - y[0]) / 2, delta=0.11)
            self.assertEqual((y[1] < y[0], len(set(y))), (not log, 3))
        one = helper.chart("t", {"a": [(1, 5.0)]}, 1)
        self.assertNotIn("nan", one)


# --------------------------------------------------------------------- benchmark


BENCHMARK = """
import sys, time
began, times = float(sys.argv.pop(1)), int(sys.argv.pop(1))
import main

def train_nn(*arguments):
    sys.argv.append("--benchmark")  # leaves the GPU to it
    import project_tests
    project_tests.measure(began, times, *arguments)

main.train_nn = train_nn
main.program()
"""


def layer_flop(model, image_shape):
    """Return the FLOP of an image in each layer of `model` that has a kernel."""
    layers = [layer for layer in model.layers if hasattr(layer, "kernel")]
    ends = [x for layer in layers for x in (layer.input, layer.output)]
    image = keras.KerasTensor((1, *image_shape, 3), "uint8")
    shapes = keras.Model(model.input, ends).compute_output_spec(image)
    flop = []
    for layer, x, y in zip(layers, shapes[::2], shapes[1::2]):
        # a transposed convolution is one from its output to its input
        transposed = isinstance(layer, keras.layers.Conv2DTranspose)
        places = np.prod((x if transposed else y).shape[1:3])
        flop.append(2 * float(np.prod(layer.kernel.shape) * places))
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


def measure(
    began, times, epochs, batch_size, get_batches_fn, _, train_step, steps, state, *rest
):
    """Measure in the place of main.train_nn, print JSON, and end the process."""
    batches = iter(get_batches_fn(batch_size, range(10**6)))
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
    images = np.zeros((batch_size, 375, 1242, 3), np.uint8)
    predict = helper.predict_road
    results["predict_s"] = seconds(
        lambda: predict(state.model, images, image_shape)[0, 0, 0], times
    )
    dtype = keras.config.dtype_policy().compute_dtype
    rates = []
    for side in (8192, 16384) if gpus else (2048, 4096):
        x = tf.cast(tf.random.normal((side, side)), dtype)
        product = functools.partial(tf.function(lambda x: (x @ x)[0, 0]), x)
        rates.append(2 * side**3 / seconds(product, times))
    flop = layer_flop(state.model, image_shape)
    # backward: to the kernel and to the input, but for that of the first layer
    replicas = len(tf.nest.flatten(next(batches)[0], expand_composites=True))
    results["train_flop"] = batch_size * (3 * sum(flop) - flop[0]) / replicas
    results["predict_flop"] = batch_size * sum(flop)
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
            helper.maybe_draw_kitti_road(data, training=288)
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


if __name__ == "__main__":
    if "--benchmark" in sys.argv:
        sys.exit(benchmark(sys.argv[1:]))
    program = unittest.main(exit=False, buffer=True)
    result = program.result
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    passed = result.testsRun - failed - len(result.skipped)
    print(f"{max(passed, 0)} passed, {failed} failed")
    sys.exit(failed > 0 or passed <= 0)
