"""Train FCN-8s on VGG-16 for KITTI Road and segment the benchmark's test images.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation",
CVPR 2015. The file reads from top to bottom in the order in which the program runs.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Annotated, get_type_hints

if __name__ == "__main__":  # the imports take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, by the import

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import helper
from helper import VOID, ProgramError

CLASSES = ["background", "road"]

# ------------------------------------------------------------------------ config

SIDE = "a multiple of 32 in [32, 65536]"
PRECISIONS = "auto, float32, bfloat16 or float16"
ALLOWED = {
    "anything": lambda value: True,
    "in [0, 2^31)": lambda value: 0 <= value < 2**31,
    "in [1, 2^31)": lambda value: 1 <= value < 2**31,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0.01, 1]": lambda value: 0.01 <= value <= 1,
    "in [1e-9, 1]": lambda value: 1e-9 <= value <= 1,
    SIDE: lambda value: value in range(32, 65537, 32),
    PRECISIONS: lambda value: value in PRECISIONS.replace(",", "").split(),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings: type, allowed values, meaning, default."""

    demo: Annotated[bool, "anything", "drawn data, small images, no download"] = False
    epochs: Annotated[int, "in [0, 2^31)", "passes over the training images"] = 50
    batch_size: Annotated[int, "in [1, 2^31)", "images in a step"] = 5
    learning_rate: Annotated[float, "in [1e-9, 1]", "Adam's, for the decoder"] = 0.001
    vgg_learning_rate: Annotated[float, "in [0, 1)", "Adam's, for VGG-16"] = 0.0001
    keep_prob: Annotated[float, "in [0.01, 1]", "share that dropout keeps"] = 0.5
    l2: Annotated[float, "in [0, 1)", "weight of the decoder's L2 term"] = 0.001
    image_height: Annotated[int, SIDE, "rows of the input, a multiple of 32"] = 160
    image_width: Annotated[int, SIDE, "columns of the input, likewise"] = 576
    holdout_fraction: Annotated[float, "in [0, 1)", "share kept for scoring"] = 0.1667
    seed: Annotated[int, "in [0, 2^31)", "of weights, order, jitter and dropout"] = 0
    deterministic: Annotated[bool, "anything", "same bits on a GPU, slower"] = False
    precision: Annotated[str, PRECISIONS, "of the encoder"] = "auto"
    xla: Annotated[bool, "anything", "compile the step, on one GPU"] = False
    vgg: Annotated[str, "anything", "VGG-16 weight file, or random"] = "downloaded"
    data_dir: Annotated[Path, "anything", "where data and VGG-16 are"] = Path("data")
    runs_dir: Annotated[Path, "anything", "where runs write"] = Path("runs")
    resume: Annotated[Path, "anything", "folder of the run to go on with"] = None
    checkpoint_minutes: Annotated[float, "in [0, 2^31)", "between checkpoints"] = 5.0
    weights: Annotated[Path, "anything", "a run's best.weights.h5 to start from"] = None
    predict: Annotated[Path, "anything", "image, folder or video to segment"] = None
    export: Annotated[Path, "anything", "new folder for a SavedModel"] = None
    submission: Annotated[bool, "anything", "write the benchmark's zip"] = False


GROUPS = {  # of --help, by their first setting
    "demo": "try it without data",
    "epochs": "train; runs/<time>/index.html shows what came out",
    "resume": "go on with a run that was stopped",
    "weights": "use what was trained; with --epochs 0 it is scored",
    "submission": "submit to the benchmark",
}
SIZES = "image_height", "image_width"
DEMO = "--epochs 6 --image-height 64 --image-width 192 --keep-prob 1 --vgg random"


def parse(argv):
    """Return the Config of a command line; a bad one exits with one line and code 2."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.description = __doc__.partition("\n")[0]
    parser.error = lambda message: parser.exit(2, f"{message}: see main.py --help\n")

    def checked(kind, allowed):
        def convert(text):
            value = kind(text)
            if not ALLOWED[allowed](value):
                raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
            return value

        convert.__name__ = kind.__name__  # for argparse: invalid int value: 'x'
        return convert

    hints = get_type_hints(Config, include_extras=True)
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        kind = hints[field.name].__origin__
        allowed, meaning = hints[field.name].__metadata__
        how = {"action": "store_true"}
        if kind is not bool:
            metavar = {int: "N", float: "X", str: "NAME"}.get(kind, "PATH")
            how = {"type": checked(kind, allowed), "metavar": metavar}
            meaning += f" ({field.default})" if field.default is not None else ""
        group.add_argument(flag(field.name), help=meaning, **how)
    given = vars(parser.parse_args(argv))
    before = DEMO.split() if "demo" in given else []
    if given.keys() & {"predict", "export"}:
        if "weights" not in given:
            parser.error("--predict and --export need --weights")
        useful = {"weights", "predict", "export", "runs_dir", "batch_size"}
        useful |= {"precision", *SIZES}
        if idle := given.keys() - useful:
            parser.error(f"{flag(min(idle))} does not go with --predict or --export")
        if not given["weights"].is_file():
            raise ProgramError(f"{given['weights']}: no file: name a best.weights.h5")
        recorded = helper.read_run(given["weights"].parent)["config"]
        before = [f"{flag(name)}={recorded[name]}" for name in SIZES]
    elif "resume" in given:
        fixed = given.keys() - {"resume", "epochs", "data_dir", "runs_dir"}
        if fixed:
            parser.error(f"{flag(min(fixed))} is that of the run: leave it out")
        for name, value in helper.read_run(given["resume"])["config"].items():
            if value is True:
                before.append(flag(name))
            elif value is not None and value is not False:
                before.append(f"{flag(name)}={value}")
    return Config(**vars(parser.parse_args(before + argv)))  # the last one counts


def flag(name):
    """Return the flag of a Config field."""
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------- network


class FullyConnected(keras.layers.Conv2D):
    """A "same" convolution of odd side as one matrix product.

    On a CPU fc6 takes half the time so, as its 411 MB need not be reordered.
    """

    def call(self, x):
        side, half = self.kernel_size[0], self.kernel_size[0] // 2
        height, width = tf.unstack(tf.shape(x)[1:3])
        x = tf.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
        places = [(row, column) for row in range(side) for column in range(side)]
        x = tf.concat([x[:, r : r + height, c : c + width] for r, c in places], axis=-1)
        kernel = tf.reshape(self.kernel, (-1, self.filters))
        return self.activation(tf.tensordot(x, kernel, 1) + self.bias)


def load_vgg(vgg_path, keep_prob):
    """Return image_input, layer3_out, layer4_out, layer7_out of a convolutional VGG-16.

    Input (B, H, W, 3) RGB 0..255, H and W multiples of 32; outputs (B, H/8, W/8, 256),
    (B, H/16, W/16, 512), (B, H/32, W/32, 4096). `vgg_path` is a weight file of
    keras.applications.VGG16 with its top, or "random" (He normal). Dropout keeps
    `keep_prob` of fc6 and fc7. Raises ProgramError if the file does not fit.
    """
    image_input = keras.Input((None, None, 3), dtype="uint8", name="image_input")
    x = keras.ops.cast(image_input, "float32")
    x = keras.applications.vgg16.preprocess_input(x)  # to BGR, minus ImageNet's mean
    vgg = keras.applications.VGG16(include_top=False, weights=None, input_tensor=x)
    x = vgg.output  # (B, H/32, W/32, 512)
    for name, side in ("fc1", 7), ("fc2", 1):  # Keras's names of fc6 and fc7
        how = {"padding": "same", "activation": "relu", "kernel_initializer": "zeros"}
        x = FullyConnected(4096, side, name=name, **how)(x)  # the zeros are replaced
        x = keras.layers.Dropout(1 - keep_prob, name=f"{name}_dropout")(x)
    encoder = keras.Model(image_input, x)
    weighted = [layer for layer in encoder.layers if layer.weights]
    if vgg_path == "random":
        for layer in weighted:
            # Pixels are of order 60, not 1: fc6 takes that out, so that fc7 is of
            # order 1 as in the pretrained network.
            scale = 2 / 60**2 if layer.name == "fc1" else 2
            he_normal = keras.initializers.VarianceScaling(scale, "fan_in")
            layer.kernel.assign(he_normal(layer.kernel.shape))
    else:
        advice = "name another with --vgg, or remove this one and leave --vgg out"
        with helper.blaming(vgg_path, "VGG-16 weights with the fc layers", advice):
            original = keras.applications.VGG16(weights=Path(vgg_path))
        for layer in weighted:
            # A dense kernel holds the numbers of the convolution that covers its whole
            # input, in the same order: fc1 (25088, 4096) is (7, 7, 512, 4096).
            values = original.get_layer(layer.name).get_weights()
            layer.set_weights(
                [value.reshape(w.shape) for value, w in zip(values, layer.weights)]
            )
    pools = (vgg.get_layer(f"block{block}_pool").output for block in (3, 4))
    return image_input, *pools, encoder.output


def layers(layer3_out, layer4_out, layer7_out, num_classes, l2=0.001):
    """Return the FCN-8s logits (B, H, W, num_classes) of VGG's pool3, pool4 and fc7.

    Every kernel carries the L2 term l2 * sum(w^2). Computes in float32, whatever the
    precision of the pools.
    """
    decay = {"kernel_regularizer": keras.regularizers.L2(l2), "dtype": "float32"}
    layer3_out, layer4_out = (
        keras.ops.cast(x, "float32") for x in (layer3_out, layer4_out)
    )
    normal = keras.initializers.RandomNormal(stddev=0.01)

    def score(x, name):
        name = f"score_{name}"
        return keras.layers.Conv2D(
            num_classes, 1, kernel_initializer=normal, name=name, **decay
        )(x)

    def bilinear(shape, dtype=None):
        """Kernel (k, k, C, C) that upsamples each channel by k / 2, bilinearly."""
        side, factor = shape[0], shape[0] // 2
        ramp = 1 - np.abs(np.arange(side) - (side - 1) / 2) / factor
        kernel = np.outer(ramp, ramp)[:, :, None, None] * np.eye(shape[2])
        return tf.constant(kernel, dtype)

    def upscore(x, factor, name):
        return keras.layers.Conv2DTranspose(
            num_classes,
            2 * factor,
            factor,
            "same",
            use_bias=False,
            kernel_initializer=bilinear,
            name=f"upscore_{name}",
            **decay,
        )(x)

    # Activations shrink from pool3 to fc7. The authors' net that trains all skips at
    # once scales the early ones down, so that fc7 leads and they refine.
    x = score(layer7_out, "fc7")  # (B, H/32, W/32, C)
    x = upscore(x, 2, "fc7") + score(layer4_out * 0.01, "pool4")  # (B, H/16, W/16, C)
    x = upscore(x, 2, "pool4") + score(layer3_out * 0.0001, "pool3")  # (B, H/8, W/8, C)
    return upscore(x, 8, "pool3")  # (B, H, W, C)


def load_weights(model, path):
    """Load a best.weights.h5; raise ProgramError if it is not one of this network."""
    with helper.blaming(path, "weights of this FCN-8s", "name a best.weights.h5"):
        model.load_weights(path)
        if not all(np.isfinite(w).all() for w in model.trainable_variables):
            raise ValueError("not finite")


# ---------------------------------------------------------------------- training


def cross_entropy(logits, labels):
    """Return the cross entropy (B,) summed over each image's valid pixels."""
    valid = labels != VOID
    pixels = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(valid, tf.cast(labels, tf.int32), 0), logits
    )
    return tf.reduce_sum(tf.where(valid, pixels, 0), axis=(1, 2))


class Adam(keras.optimizers.Adam):
    """Adam with a factor on the rate for each variable, in their order at build."""

    factors = ()

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        # The fused kernel, in place of ten copies of fc6's 411 MB; and each replica
        # updates its own copy, as the gradients are summed already.
        step = tf.cast(self.iterations + 1, tf.float32)
        moments = self._momentums, self._velocities
        parts = zip(grads, trainable_variables, *moments, self.factors, strict=True)
        for gradient, variable, m, v, factor in parts:
            tf.raw_ops.ResourceApplyAdam(
                var=variable.value.handle,
                m=m.value.handle,
                v=v.value.handle,
                beta1_power=self.beta_1**step,
                beta2_power=self.beta_2**step,
                lr=learning_rate * factor,
                beta1=self.beta_1,
                beta2=self.beta_2,
                epsilon=self.epsilon,
                grad=gradient,
            )


def optimize(
    model,
    vgg_variables,
    learning_rate,
    vgg_learning_rate,
    epochs,
    steps,
    seed,
    strategy,
    loss_scaling=False,
    xla=False,
):
    """Return train_step and the run's state, as a tf.train.Checkpoint.

    train_step(images, labels, weights) minimises the cross entropy over the batch's
    valid pixels plus the L2 term and returns both and the gradient's norm, (3,)
    float32. `vgg_variables` learn at `vgg_learning_rate`, the decoder at
    `learning_rate`. Rates rise in a line over the first of `epochs` of `steps`, then
    fall in a half cosine to 0; the gradient is clipped to norm 1. The replicas of
    `strategy` share a batch. `loss_scaling` is for float16: a step whose gradient
    overflows is left out, with norm 0. With `xla` the step is compiled; where that
    fails, train_step.xla becomes False.
    The state has also what train_nn counts, `epoch`, those that are over, and `totals`
    of the one that is not (loss, L2, gradient norm, seconds), and the `best` weights.
    """
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / steps,
        decay_steps=max((epochs - 1) * steps, 1),
        warmup_target=learning_rate,
        warmup_steps=steps,
    )
    slow = {variable.path for variable in vgg_variables}
    variables = model.trainable_variables
    factor = vgg_learning_rate / learning_rate
    with strategy.scope():
        optimizer = Adam(schedule)
        optimizer.factors = [factor if v.path in slow else 1.0 for v in variables]
        if loss_scaling:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(variables)
        step = tf.Variable(0, dtype=tf.int64)
    dropouts = [y for y in model.layers if hasattr(y, "seed_generator")]
    replicas = strategy.num_replicas_in_sync

    def replica_step(images, labels, weights):
        replica = tf.distribute.get_replica_context()
        for index, layer in enumerate(dropouts):  # masks are a function of the step
            mask = (step * len(dropouts) + index) * replicas
            mask += tf.cast(replica.replica_id_in_sync_group, tf.int64)
            layer.seed_generator.state.assign([seed, mask])
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_sum(weights * cross_entropy(logits, labels))
            l2 = tf.add_n(model.losses) / replicas
            total = optimizer.scale_loss(loss + l2)
        sums = [loss, l2, *tape.gradient(total, variables)]
        loss, l2, *gradients = replica.all_reduce("SUM", sums)
        # Keras would clip before the sum, each replica for itself
        scale = optimizer.scale_loss(1.0)
        gradients, norm = tf.clip_by_global_norm(gradients, scale)
        optimizer.apply(gradients, variables)
        norm /= scale
        if loss_scaling:
            norm = tf.where(tf.math.is_finite(norm), norm, 0)
        return tf.stack([loss, l2, norm])

    def whole_step(*batch):
        results = strategy.run(replica_step, args=batch)
        step.assign_add(1)
        return strategy.experimental_local_results(results)[0]

    functions = [tf.function(whole_step, jit_compile=jit) for jit in (None, True)]

    def train_step(*batch):
        try:
            return functions[train_step.xla](*batch)
        except tf.errors.OpError as error:
            memory = isinstance(error, tf.errors.ResourceExhaustedError)
            if not train_step.xla or memory:
                raise
            print(f"XLA failed ({helper.first_line(error)}): going on without it")
            train_step.xla = False
            return train_step(*batch)

    train_step.xla = xla
    with tf.device("CPU"):  # a second set of weights would crowd a GPU
        progress = {
            "epoch": tf.Variable(0, dtype=tf.int64),
            "totals": tf.Variable(tf.zeros(4, tf.float64)),
            "best": [tf.Variable(tf.convert_to_tensor(v)) for v in variables],
        }
    state = tf.train.Checkpoint(model=model, optimizer=optimizer, step=step, **progress)
    return train_step, state


@tf.function(reduce_retracing=True)
def holdout_step(model, strategy, images, labels):
    """Return a batch's summed cross entropy and its confidence histogram, float64."""

    def replica_step(images, labels):
        logits = model(images, training=False)
        confidence = helper.to_confidence(tf.nn.softmax(logits)[..., 1])
        histogram = helper.confidence_histogram(confidence, labels)
        sums = tf.reduce_sum(cross_entropy(logits, labels)), histogram
        return [tf.cast(part, tf.float64) for part in sums]

    parts = strategy.run(replica_step, args=(images, labels))
    return [strategy.reduce("SUM", part, axis=None) for part in parts]


def evaluate(model, batches, strategy):
    """Return the hold-out's loss and scores at network size, {} without images."""
    results = [holdout_step(model, strategy, *batch[:2]) for batch in batches]
    if not results:
        return {}
    loss, histogram = (np.sum(part, axis=0) for part in zip(*results))
    if not np.isfinite(loss):
        raise ProgramError(f"the hold-out loss is {loss}: lower --learning-rate")
    measures = helper.scores(histogram)
    names = {"MaxF": "MaxF", "IoU": "IoU50", "accuracy": "accuracy"}
    shown = {name: measures[measure] for name, measure in names.items()}
    return {"holdout_loss": loss / max(histogram.sum(), 1), **shown}


def train_nn(
    epochs, batch_size, get_batches_fn, names, train_step, steps, state, end_epoch, stop
):
    """Train from `state` on to `epochs` epochs of `steps` steps.

    get_batches_fn and names are those of gen_batch_function, train_step and state those
    of optimize; end_epoch gets a record of each epoch's means and speed. Returns after
    the step in which `stop` becomes true. Raises ProgramError at a loss that is not
    finite, with the step it first happened in and its files; end_epoch never sees that
    epoch.
    """
    first = step = int(state.step.numpy())
    batches = iter(get_batches_fn(batch_size, range(first, epochs * steps)))
    for epoch in range(int(state.epoch) + 1, epochs + 1):
        last = epoch * steps
        pending, totals = [], state.totals.numpy()
        fetched = time.perf_counter()
        bar = tqdm(None, f"epoch {epoch}", steps, False, disable=None)
        with bar:
            bar.update(step - last + steps)
            while step < last:
                before = time.perf_counter()
                pending.append(train_step(*next(batches)))
                now = time.perf_counter()
                step += 1
                if step == first + 2 and not tf.config.list_physical_devices("GPU"):
                    minutes = (now - before) * steps / 60
                    bar.write(f"no GPU: an epoch takes about {minutes:.1f} minutes")
                if now - fetched < 1 and step < last and not stop:
                    continue
                # the host waits for the device here, hence once a second, not each step
                values = tf.stack(pending).numpy().astype(float)
                for bad, value in enumerate(values, step - len(pending)):
                    if not np.isfinite(value).all():
                        files = ", ".join(names(batch_size, bad))
                        raise ProgramError(
                            f"step {bad + 1} gave {value.tolist()} (loss, L2, gradient "
                            f"norm) on {files}: look at these, or lower --learning-rate"
                        )
                    totals[:3] += value
                now = time.perf_counter()
                totals[3] += now - fetched
                state.totals.assign(totals)
                pending, fetched = [], now
                bar.update(len(values))
                bar.set_postfix(loss=f"{value[0]:.4f}")
                if stop:
                    return
        loss, l2, norm = totals[:3] / steps
        record = {"epoch": epoch, "step": step, "loss": loss, "l2": l2}
        record |= {"gradient_norm": norm, "seconds": totals[3]}
        record["images_per_second"] = steps * batch_size / totals[3]
        state.epoch.assign(epoch)
        state.totals.assign(tf.zeros_like(totals))
        end_epoch(record)
        if stop:
            return


# ----------------------------------------------------------------------- program


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; its number is the argument."""


SIGNALS = signal.SIGINT, signal.SIGTERM


def interrupt(signum, frame):
    """End the program where it is."""
    raise Stopped(signum)


@contextlib.contextmanager
def handling_signals(handler):
    """Have `handler` handle the signals."""
    before = [signal.signal(each, handler) for each in SIGNALS]
    try:
        yield
    finally:
        for each, old in zip(SIGNALS, before):
            signal.signal(each, old)


@contextlib.contextmanager
def noting_signals():
    """Yield the list of signals that came; a second one ends the program at once."""
    noted = []

    def note(signum, frame):
        noted.append(signum)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.write(1, b"stopping after this step, several workers after this epoch; ")
            os.write(1, b"a second signal stops at once\n")

    with handling_signals(note):
        yield noted


def prepare_device(precision):
    """Set the precision; return it and the device's name, as run.json has them.

    "auto" is bfloat16 on GPUs that compute with it, float32 elsewhere. Speaks of a GPU
    that TensorFlow cannot use.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if not gpus:  # one convolution after the other, each on all cores
        tf.config.threading.set_inter_op_parallelism_threads(1)
    if not gpus and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        print("TensorFlow cannot use the NVIDIA GPU, so the CPU works. To mend it: pip")
        print(
            "install -r requirements.txt in a new environment; nvidia-smi lists the GPU"
        )
    if precision == "auto":
        precision = "bfloat16" if compute_capability() >= (8, 0) else "float32"
    mixed = "" if precision == "float32" else "mixed_"
    keras.config.set_dtype_policy(mixed + precision)
    name = f"CPU ({os.cpu_count()} cores)"
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        name = details.get("device_name", gpus[0].name)
    return {"name": name, "precision": precision}


def compute_capability():
    """Return the lowest compute capability of the GPUs, (0, 0) without one."""
    gpus = tf.config.list_physical_devices("GPU")
    details = map(tf.config.experimental.get_device_details, gpus)
    found = [each.get("compute_capability", (0, 0)) for each in details]
    return min(found, default=(0, 0))


def choose_strategy():
    """Return the strategy for this machine's GPUs and TF_CONFIG's, and its workers."""
    if "TF_CONFIG" in os.environ:
        advice = "correct it, or unset it to train on this machine alone"
        with helper.blaming("TF_CONFIG", "a cluster", advice):
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            jobs = resolver.cluster_spec().as_dict()
            workers = len(jobs.get("chief", [])) + len(jobs.get("worker", []))
            if workers > 1:
                print(f"waiting until all {workers} workers are there", flush=True)
                with handling_signals(signal.SIG_DFL):  # it waits where no Python runs
                    return tf.distribute.MultiWorkerMirroredStrategy(), workers
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy(), 1
    return tf.distribute.get_strategy(), 1


def mean(strategy, value):
    """Return the mean of a number over all workers, which wait for each other here."""
    own = tf.constant(value, tf.float64)
    return float(strategy.reduce("MEAN", strategy.run(lambda: own), axis=None))


def agree(strategy, facts):
    """Raise ProgramError unless `facts` are the same on all workers."""
    own = zlib.crc32(repr(facts).encode())
    if mean(strategy, own) != own:
        raise ProgramError(
            f"another worker has other settings or data than this one, {facts}: give "
            "all of them the same command, data, weights and, with --resume, run folder"
        )


def largest_batch(model, image_shape, replicas):
    """Return the batch size that should fit into the memory that is free now.

    Beside weights and moments a step holds the gradient twice, for the clipping, and
    for each image 1.5 times what the layers put out, as measured on a CPU.
    """
    room = helper.free_memory()
    if tf.config.list_logical_devices("GPU"):  # what was had before it ran out
        memory = tf.config.experimental.get_memory_info("GPU:0")
        room = memory["peak"] - memory["current"]
    image = keras.KerasTensor((1, *image_shape, 3), "uint8")
    outputs = keras.Model(model.input, [layer.output for layer in model.layers])
    sizes = [np.prod(x.shape) * tf.as_dtype(x.dtype).size for x in outputs(image)]
    return max(int((room - 8 * model.count_params()) / sum(sizes) / 1.5), 0) * replicas


def run(config):
    """Train as `config` says, score, and return the run's folder."""
    if config.resume and helper.is_finished(config.resume):
        return config.resume
    device = prepare_device(config.precision)  # first of all: before any use of it
    strategy, workers = choose_strategy()
    replicas, chief = strategy.num_replicas_in_sync, strategy.extended.should_checkpoint
    device |= {"replicas": replicas, "workers": workers}
    device["xla"] = config.xla and replicas == 1 and compute_capability() < (10, 0)
    if config.xla and not device["xla"]:
        print("XLA is off: it works on one replica, and not on Blackwell GPUs")
    print(", ".join(f"{name} {value}" for name, value in device.items()))
    if config.deterministic:
        print("deterministic: the same bits on every run, at a lower speed on a GPU")
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)
    data_dir = config.data_dir
    restored = config.resume and helper.find_checkpoints(config.resume)
    weights = None if restored else config.weights
    vgg_path = "random" if restored or weights else config.vgg  # until replaced
    named = weights or vgg_path
    if named not in ("downloaded", "random") and not Path(named).is_file():
        raise ProgramError(f"{named}: not a file: correct --weights or --vgg")
    if config.demo:
        print("a demonstration on drawn roads; the real run is: python main.py")
        data_dir = data_dir / "demo"
        helper.maybe_draw_kitti_road(data_dir)
    else:
        helper.maybe_download_kitti_road(data_dir)
    if vgg_path == "downloaded":
        vgg_path = helper.maybe_download_pretrained_vgg(config.data_dir)
    split = helper.find_images(
        data_dir, config.holdout_fraction, config.batch_size, config.submission
    )
    training, holdout, test_paths = split
    epochs, batch_size, seed = config.epochs, config.batch_size, config.seed
    image_shape = config.image_height, config.image_width
    rates = config.learning_rate, config.vgg_learning_rate
    steps = len(training) // batch_size  # an epoch
    facts = {
        "config": {  # good in any folder
            name: value.absolute() if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(config).items()
            if name != "resume"
        }
        | {"precision": device["precision"]},  # of a resumed run too
        "classes": CLASSES,
        "device": device,
        "data": dict(zip(("training", "holdout", "test"), map(len, split))),
    }
    if workers > 1:
        own = {"vgg": vgg_path == "random", "checkpoint_minutes": None}
        same = facts["config"] | {**device, "name": None} | facts["data"] | own
        agree(strategy, {k: v for k, v in same.items() if not isinstance(v, Path)})
    folder = helper.run_folder(config.runs_dir, config.resume, facts, chief)
    with folder as (run_dir, record):
        with strategy.scope():
            image_input, *pools = load_vgg(vgg_path, config.keep_prob)
            model = keras.Model(image_input, layers(*pools, len(CLASSES), config.l2))
        if weights:
            load_weights(model, weights)
        vgg_variables = keras.Model(image_input, pools).trainable_variables
        how = strategy, device["precision"] == "float16", device["xla"]
        train_step, state = optimize(
            model, vgg_variables, *rates, epochs, steps, seed, *how
        )
        checkpoints = helper.Checkpoints(run_dir, record, state, chief)
        kept = 3 - len(restored or ()) if epochs else 0  # two, and a new one
        size = (8 + 16 * kept) * model.count_params() + 10**6 * len(test_paths)
        if chief:
            helper.need_space(run_dir, size, "a run")
        if epochs or config.resume:
            batches = helper.gen_batch_function(training, image_shape, strategy, seed)
            get_holdout_fn, _ = helper.gen_batch_function(
                holdout, image_shape, strategy
            )
            if config.resume:
                checkpoints.restore(epochs * steps)
            if workers > 1:
                total = sum(zlib.crc32(w.numpy()) for w in model.trainable_variables)
                agree(strategy, {"weights": total, "step": int(state.step.numpy())})
            shown = next((image for image, *_ in [*holdout, *zip(test_paths)]), None)

            def end_epoch(epoch):
                epoch |= evaluate(model, get_holdout_fn(batch_size), strategy)
                device["xla"] = train_step.xla
                epoch["learning_rate"] = float(state.optimizer.learning_rate)
                print(*(f"{name} {value:.5g}" for name, value in epoch.items()))
                if chief:
                    at = epoch["epoch"], epochs
                    helper.keep_frame(run_dir, model, shown, image_shape, *at)
                    helper.write_epoch(run_dir, record, epoch, state)
                    checkpoints.save(60 * config.checkpoint_minutes)
                if workers > 1 and mean(strategy, len(noted)):  # all stop, or none
                    stop.append(noted[0] if noted else signal.SIGTERM)

            with noting_signals() as noted:
                stop = noted if workers == 1 else []
                parts = *batches, train_step, steps, state, end_epoch, stop
                try:
                    train_nn(epochs, batch_size, *parts)
                except (MemoryError, tf.errors.ResourceExhaustedError) as error:
                    fits = largest_batch(model, image_shape, replicas)
                    fits = min(fits, batch_size - 1)
                    found = f"{fits} should fit; set that, or" if fits else "too many:"
                    raise ProgramError(
                        f"out of memory with --batch-size {batch_size}: {found} lower "
                        "--image-height and --image-width"
                    ) from error
                checkpoints.save()
            if stop:
                raise Stopped(stop[0])
        if not chief:
            return None
        helper.copy_weights(model.trainable_variables, state.best)
        if not record["history"]:
            helper.write_weights(run_dir, state)
        if holdout:
            record["scores"], record["holdout"] = helper.score_holdout(
                run_dir, model, holdout, image_shape, batch_size
            )
            helper.print_scores(record["scores"])
            helper.write_run(run_dir, record)
        helper.save_inference_samples(
            run_dir, model, test_paths, image_shape, batch_size, config.submission
        )
    print(f"{len(test_paths)} segmented test images and the weights are in {run_dir}")
    return run_dir


def use(config):
    """Segment images with trained weights, or export them."""
    if config.predict and not config.predict.exists():
        raise ProgramError(f"--predict {config.predict}: no such file or folder")
    prepare_device(config.precision)
    record = helper.read_run(config.weights.parent)
    if record.get("classes") != CLASSES:
        raise ProgramError(
            f"{config.weights.parent}/run.json: classes {record.get('classes')}, not "
            f"{CLASSES}: these weights are of another program"
        )
    image_input, *pools = load_vgg("random", 1)
    model = keras.Model(image_input, layers(*pools, len(CLASSES)))
    load_weights(model, config.weights)
    image_shape = config.image_height, config.image_width
    if config.export:
        helper.export(model, config.export, image_shape)
        print(
            f"{config.export} is a SavedModel: tf.saved_model.load(...).serve(images)"
        )
    if config.predict:
        run_dir = helper.new_folder(config.runs_dir)
        try:
            helper.predict(
                run_dir, model, config.predict, image_shape, config.batch_size
            )
        finally:
            with contextlib.suppress(OSError):
                run_dir.rmdir()  # where nothing came into it


def main(argv=None):
    """Run the program on a command line; return its exit code."""
    code = 1
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        use(config) if config.predict or config.export else run(config)
        return 0
    except ProgramError as error:
        message = error
    except (MemoryError, tf.errors.ResourceExhaustedError):
        message = "out of memory: lower --batch-size, --image-height or --image-width"
    except OSError as error:
        place = error.filename or f"{config.data_dir} or {config.runs_dir}"
        reason = " ".join(str(error.strerror or error).split())  # h5py's has two lines
        message = f"{place}: {reason}: make room, or set --data-dir and --runs-dir"
    except (tf.errors.UnavailableError, tf.errors.AbortedError):
        message = "another worker has ended: start all of them again, with --resume"
    except KeyboardInterrupt as stopped:
        signum = signal.Signals(*stopped.args or [signal.SIGINT])
        message, code = f"stopped by {signum.name}", 128 + signum
    print(message, file=sys.stderr)
    return code


def program():
    """Be the program: handle signals, and exit with its code."""
    for each in SIGNALS:  # scripts may start it with SIGINT ignored
        signal.signal(each, interrupt)
    sys.stdout.reconfigure(line_buffering=True)  # also where it goes to a file
    sys.exit(main())


if __name__ == "__main__":
    program()
