"""Train FCN-8s on VGG-16 for KITTI Road and segment the benchmark's test images.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation",
CVPR 2015. The file reads from top to bottom in the order in which the program runs;
everything around the network is in helper.py.
"""

import argparse
import dataclasses
import functools
import gc
import os
import threading
import time
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import helper  # first: it brings TensorFlow up without its remarks
from helper import VOID, ProgramError

# isort: split
import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

CLASSES = ["background", "road"]
POOL3_SCALE, POOL4_SCALE = 0.01, 0.1
NETWORK = {  # what weights must be of
    "classes": CLASSES,
    "pool_scales": [POOL3_SCALE, POOL4_SCALE],
}

# ---------------------------------------------------------------------- settings


class Range(NamedTuple):
    """The numbers that a setting allows: from `low` to `high`, multiples of `step`."""

    low: float
    high: float = 2**31 - 1
    step: int | None = None

    def read(self, kind, text):
        """Return `text` as a number of `kind`; an argparse type but for `kind`."""
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")  # which is in no range
        if self.low <= value <= self.high and not (self.step and value % self.step):
            return value
        what = "a whole number" if kind is int else "a number"
        if self.step:
            what = f"a multiple of {self.step}"
        raise argparse.ArgumentTypeError(
            f"{text} is not {what} in [{self.low}, {self.high}]"
        )


SIDE = Range(32, 65504, step=32)  # progress.gif ends at 65,535
PRECISIONS = ["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings: type, allowed values, meaning, default."""

    demo: Annotated[bool, None, "drawn data, small images, no download"] = False
    epochs: Annotated[int, Range(0), "passes over the training images"] = 50
    batch_size: Annotated[int, Range(1), "images in a step"] = 2
    learning_rate: Annotated[float, Range(1e-9, 1), "Adam's, for the decoder"] = 0.001
    vgg_learning_rate: Annotated[float, Range(0, 1), "Adam's, for VGG-16"] = 0.0001
    keep_prob: Annotated[float, Range(0.01, 1), "share that dropout keeps"] = 0.5
    l2: Annotated[float, Range(0, 1), "weight of the decoder's L2 term"] = 0.001
    image_height: Annotated[int, SIDE, "rows of the input, a multiple of 32"] = 160
    image_width: Annotated[int, SIDE, "columns of the input, likewise"] = 576
    holdout_fraction: Annotated[float, Range(0, 0.99), "share kept to score"] = 0.1667
    seed: Annotated[int, Range(0), "of weights, order, jitter and dropout"] = 0
    deterministic: Annotated[bool, None, "same bits on a GPU, slower"] = False
    precision: Annotated[str, PRECISIONS, "of the encoder"] = "auto"
    xla: Annotated[bool, None, "compile the step, on one device"] = False
    vgg: Annotated[str, None, "VGG-16 weight file, or random"] = "downloaded"
    data_dir: Annotated[Path, None, "where data and VGG-16 are"] = Path("data")
    runs_dir: Annotated[Path, None, "where runs write"] = Path("runs")
    name: Annotated[str, None, "of the folder in there (the time)"] = None
    checkpoint_minutes: Annotated[float, Range(0), "between checkpoints"] = 5.0
    resume: Annotated[Path, None, "folder of the run to go on with"] = None
    weights: Annotated[Path, None, "a run or its fcn8s.weights.h5 to start from"] = None
    predict: Annotated[list, None, "images, folders and videos to segment"] = None
    export: Annotated[Path, None, "new folder for a SavedModel"] = None
    submission: Annotated[bool, None, "write the benchmark's zip"] = False

    @property
    def image_shape(self):
        """The network's input, (H, W)."""
        return self.image_height, self.image_width


GROUPS = {  # of --help, by their first setting
    "demo": "try it without data",
    "epochs": "train; runs/<time>/index.html shows what came out",
    "resume": "go on with a run that was stopped",
    "weights": "use what was trained; with --epochs 0 it is scored",
    "submission": "submit to the benchmark",
}
DEMO = {  # its defaults
    "epochs": 4,
    "image_height": 64,
    "image_width": 192,
    "keep_prob": 1.0,
    "vgg": "random",
}
EXPORTING = {  # what goes with --export
    "weights",
    "export",
    "image_height",
    "image_width",
    "precision",
}
PREDICTING = EXPORTING | {"predict", "runs_dir", "name", "batch_size"}
NO_FILE = "downloaded", "random"  # of --vgg: all else is the path of one
RESUMING = {"resume", "epochs", "data_dir"}  # what goes with --resume


def flag(name):
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def settings_parser():
    """Return the parser of a command line, made of Config."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False
    )

    def error(message):  # in one line, whatever was typed
        message = helper.printable(" ".join(message.splitlines()))
        parser.exit(2, f"{message}: see main.py --help\n")

    parser.error = error
    metavars = {int: "N", float: "X", str: "NAME", Path: "PATH", list: "PATH"}
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        kind, allowed, meaning = get_args(field.type)
        if kind is bool:
            group.add_argument(flag(field.name), action="store_true", help=meaning)
            continue
        argument = {"type": kind, "metavar": metavars[kind]}
        if kind is list:
            argument |= {"type": Path, "nargs": "+"}
        elif isinstance(allowed, Range):
            argument["type"] = functools.partial(allowed.read, kind)
        elif allowed:
            argument = {"choices": allowed}
        if field.default is not None:
            meaning += " (%(default)s)"
        group.add_argument(
            flag(field.name), default=field.default, help=meaning, **argument
        )
    return parser


def parse(argv):
    """Return the Config of a command line; a bad one exits with one line and code 2.

    What is not given is Config's default, or what the demo, the weights or the resumed
    run say. Raises ProgramError for weights or a run that cannot say it.
    """
    parser = settings_parser()
    fields = [field.name for field in dataclasses.fields(Config)]
    unset = argparse.Namespace(**dict.fromkeys(fields))
    parsed = vars(parser.parse_args(argv, unset))  # to see what is given
    given = {name for name, value in parsed.items() if value is not None}
    if "demo" in given:
        parser.set_defaults(**DEMO)
    if given & {"predict", "export"} and "weights" not in given:
        parser.error("--predict and --export need --weights")
    if "predict" in given and (idle := given - PREDICTING):
        parser.error(f"{flag(min(idle))} does not go with --predict")
    if "export" in given and "predict" not in given and (idle := given - EXPORTING):
        parser.error(f"{flag(min(idle))} does not go with --export")
    if "resume" in given and (fixed := given - RESUMING):
        parser.error(f"{flag(min(fixed))} is that of the run: leave it out")
    if "weights" in given:
        if parsed["vgg"] not in (None, *NO_FILE):
            parser.error("--weights replaces VGG-16 too: leave --vgg out")
        settings = helper.read_weights_settings(parsed["weights"], NETWORK)
        parser.set_defaults(**settings)
    if "resume" in given:
        parser.set_defaults(**recorded_settings(parsed["resume"]))
    config = Config(**vars(parser.parse_args(argv)))
    if config.vgg not in NO_FILE:
        config = dataclasses.replace(config, vgg=str(Path(config.vgg).absolute()))
    return config


def recorded_settings(run_dir):
    """Return the settings in a run's run.json; raise ProgramError for impossible ones.

    They are read as if they had been typed, so that what they allow stands in Config
    alone.
    """
    path = run_dir / "run.json"
    record = helper.read_run(run_dir)
    recorded, expected = record["config"], record["defaults"]  # of its own version
    parser = settings_parser()

    def refuse(message):
        message = " ".join(message.splitlines())
        raise ProgramError(f"{path}: config: {message}: correct it, or start anew")

    parser.error = refuse
    if lost := expected.keys() - recorded.keys() - {*helper.NOT_RECORDED}:
        refuse(f"no {min(lost)}")
    # What "auto" came to there: here it may come to something else.
    if not record["device"].get("precision"):
        refuse("no precision of the device")
    recorded["precision"] = record["device"]["precision"]
    typed = []
    for name, value in recorded.items():
        if value is None or value is False:
            continue
        if name in (*helper.NOT_RECORDED, "help"):
            refuse(f"{name} is no setting of a run")
        if "\0" in str(value):
            refuse(f"a zero byte in {name}")
        typed.append(flag(name) if value is True else f"{flag(name)}={value}")
    settings = vars(parser.parse_args(typed))
    return {name: value for name, value in settings.items() if name in recorded}


# ----------------------------------------------------------------------- network


@tf.custom_gradient
def product(x, kernel):
    """Return x kernel, (N, K) times (K, M), as tf.matmul; its gradient is faster.

    TensorFlow's own has the kernel as second factor, and copies all of fc6's to
    transpose it.
    """

    def gradients(dy):
        dx = tf.transpose(tf.matmul(kernel, dy, transpose_b=True))
        return dx, tf.matmul(x, dy, transpose_a=True)

    return tf.matmul(x, kernel), gradients


class FullyConnected(keras.layers.Conv2D):
    """A "same" convolution of odd side, on a CPU as one matrix product for each row.

    There fc6 takes half the time so: its 411 MB need not be reordered, and nothing is
    multiplied with the padding above and below, at 160x576 a third of all. On a GPU the
    parts would be some hundred launches in place of three.
    """

    def call(self, x):
        if tf.config.list_physical_devices("GPU"):
            return super().call(x)
        side, half = self.kernel_size[0], self.kernel_size[0] // 2
        batch, height, width, _ = tf.unstack(tf.shape(x))
        x = tf.pad(x, ((0, 0), (0, 0), (half, half), (0, 0)))
        x = tf.concat([x[:, :, c : c + width] for c in range(side)], axis=-1)
        y = 0.0
        for offset, kernel in enumerate(tf.unstack(self.kernel), start=-half):
            # y's row i sees x's row i + offset; these of y see padding alone:
            above = tf.minimum(max(-offset, 0), height)
            below = tf.minimum(max(offset, 0), height)
            kernel = tf.reshape(kernel, (-1, self.filters))
            seen = tf.reshape(x[:, below : height - above], (-1, kernel.shape[0]))
            part = tf.reshape(product(seen, kernel), (batch, -1, width, self.filters))
            y += tf.pad(part, ((0, 0), (above, below), (0, 0), (0, 0)))
        return self.activation(y + self.bias)


def load_vgg(vgg_path, keep_prob):
    """Return image_input, layer3_out, layer4_out, layer7_out of a convolutional VGG-16.

    Input (B, H, W, 3) RGB 0..255, H and W multiples of 32; outputs (B, H/8, W/8, 256),
    (B, H/16, W/16, 512), (B, H/32, W/32, 4096). `vgg_path` is a weight file of
    keras.applications.VGG16 with its top, "random" (He normal), or None where weights
    follow that replace all. Dropout keeps `keep_prob` of fc6 and fc7. Raises
    ProgramError if the file does not fit.
    """
    image_input = keras.Input((None, None, 3), dtype="uint8", name="image_input")
    x = keras.ops.cast(image_input, "float32")
    x = keras.applications.vgg16.preprocess_input(x)  # to BGR, minus ImageNet's mean
    vgg = keras.applications.VGG16(include_top=False, weights=None, input_tensor=x)
    x = vgg.output  # (B, H/32, W/32, 512)
    for name, side in ("fc1", 7), ("fc2", 1):  # Keras's names of fc6 and fc7
        x = FullyConnected(
            4096,
            kernel_size=side,
            padding="same",
            activation="relu",
            kernel_initializer="zeros",  # which take no time; they are replaced
            name=name,
        )(x)
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
    elif vgg_path:
        advice = "name another with --vgg, or remove this one and leave --vgg out"
        with helper.blaming(vgg_path, "VGG-16 weights with the fc layers", advice):
            original = keras.applications.VGG16(weights=Path(vgg_path))
            helper.check_finite(original)
        for layer in weighted:
            # A dense kernel holds the numbers of the convolution that covers its whole
            # input, in the same order: fc1 (25088, 4096) is (7, 7, 512, 4096).
            values = original.get_layer(layer.name).get_weights()
            layer.set_weights(
                [value.reshape(w.shape) for value, w in zip(values, layer.weights)]
            )
        del original
        gc.collect()  # Keras's models are cycles; this one's 553 MB may be a GPU's
    pools = (vgg.get_layer(f"block{block}_pool").output for block in (3, 4))
    return image_input, *pools, encoder.output


def bilinear(shape, dtype=None):
    """Return a kernel (k, k, C, C) that upsamples each channel by k / 2, bilinearly."""
    side, factor = shape[0], shape[0] // 2
    ramp = 1 - np.abs(np.arange(side) - (side - 1) / 2) / factor
    kernel = np.outer(ramp, ramp)[:, :, None, None] * np.eye(shape[2])
    return tf.constant(kernel, dtype)


def layers(layer3_out, layer4_out, layer7_out, num_classes, l2=0.001):
    """Return the FCN-8s logits (B, H, W, num_classes) of VGG's pool3, pool4 and fc7.

    Every kernel carries the L2 term l2 * sum(w^2). Computes in float32, whatever the
    precision of the pools; in TensorFloat-32 on GPUs that have it.
    """
    decay = {"kernel_regularizer": keras.regularizers.L2(l2), "dtype": "float32"}
    normal = {"kernel_initializer": keras.initializers.RandomNormal(stddev=0.01)}
    normal |= decay

    def score(x, name):
        return keras.layers.Conv2D(num_classes, 1, name=f"score_{name}", **normal)(x)

    def upscore(x, factor, name):
        return keras.layers.Conv2DTranspose(
            x.shape[-1],
            kernel_size=2 * factor,
            strides=factor,
            padding="same",
            use_bias=False,
            kernel_initializer=bilinear,
            name=f"upscore_{name}",
            **decay,
        )(x)

    layer3_out = keras.ops.cast(layer3_out, "float32")
    layer4_out = keras.ops.cast(layer4_out, "float32")
    # The early activations are scaled down, so that fc7 leads and they refine. The
    # authors' net that trains all skips at once has 0.0001 and 0.01, for a loss that is
    # a sum over pixels; beside a mean, L2 would keep pool3 out: a place of it has a norm
    # of 290, so that at 0.0001 a logit of 1 takes |w|^2 = 1189, which costs 1.2 nats.
    layer3_out *= POOL3_SCALE
    layer4_out *= POOL4_SCALE
    x = score(layer7_out, "fc7")  # (B, H/32, W/32, C)
    x = upscore(x, 2, "fc7") + score(layer4_out, "pool4")  # (B, H/16, W/16, C)
    x = upscore(x, 2, "pool4") + score(layer3_out, "pool3")  # (B, H/8, W/8, C)
    return upscore(x, 8, "pool3")  # (B, H, W, C)


def fcn8s(vgg_path, keep_prob, l2=0.001):
    """Return the whole network: images (B, H, W, 3) uint8 to logits (B, H, W, 2)."""
    image_input, layer3_out, layer4_out, layer7_out = load_vgg(vgg_path, keep_prob)
    logits = layers(layer3_out, layer4_out, layer7_out, len(CLASSES), l2)
    return keras.Model(image_input, logits)


# ---------------------------------------------------------------------- training


def cross_entropy(logits, labels):
    """Return the cross entropy (B,) summed over each image's valid pixels.

    The labels are int64, as a GPU sends int32 to the host and back to flatten it.
    """
    valid = labels != VOID
    pixels = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(valid, tf.cast(labels, tf.int64), 0), logits
    )
    return tf.reduce_sum(tf.where(valid, pixels, 0), axis=(1, 2))


class Adam(keras.optimizers.Adam):
    """Adam with a factor on the rate for each variable, in their order at build."""

    def __init__(self, learning_rate, factors):
        super().__init__(learning_rate)
        self.factors = factors

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        # The fused kernel, in place of ten copies of fc6's 411 MB; and each replica
        # updates its own copy, as the gradients are summed already.
        step = tf.cast(self.iterations + 1, tf.float32)
        for gradient, variable, m, v, factor in zip(
            grads,
            trainable_variables,
            self._momentums,
            self._velocities,
            self.factors,
            strict=True,
        ):
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

    def update_step(self, gradient, variable, learning_rate):
        # a Keras that does not know the method above would call this
        raise ProgramError(
            f"Keras {keras.__version__} would train all at one rate: pip install -r "
            "requirements.txt"
        )


def warm_up_and_cosine(learning_rate, epochs, steps):
    """Return the rate's schedule over `epochs` of `steps`.

    It rises in a line over the first epoch, then falls in a half cosine to 0.
    """
    return keras.optimizers.schedules.CosineDecay(
        learning_rate / steps,
        decay_steps=max((epochs - 1) * steps, 1),
        warmup_target=learning_rate,
        warmup_steps=steps,
    )


# Gradients are summed in packs, while those of the layers before are computed.
PACKS = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=2**25)


class TrainStep:
    """One step of training: train_step(images, labels, weights).

    Minimises the cross entropy over the batch's valid pixels plus the L2 term, and
    returns both and the gradient's norm before clipping to 1, (3,) float32. The
    replicas of the device share a batch. In float16 the loss is scaled; a step whose
    gradient overflows is left out, with norm 0. Where XLA fails it goes on without.
    """

    def __init__(self, model, optimizer, seed, device):
        self.model, self.optimizer = model, optimizer
        self.seed, self.device = seed, device
        self.dropouts = [y for y in model.layers if hasattr(y, "seed_generator")]
        with device.strategy.scope():
            self.step = tf.Variable(0, dtype=tf.int64)
        self.plain = helper.traced(self.on_all_replicas)
        self.compiled = helper.traced(self.on_all_replicas, jit_compile=True)

    def __call__(self, *batch):
        if not self.device.xla:
            return self.plain(*batch)
        try:
            return self.compiled(*batch)
        except tf.errors.ResourceExhaustedError:
            raise
        except tf.errors.OpError as error:
            print(f"XLA failed ({helper.first_line(error)}): going on without it")
            self.device.xla = False
            return self.plain(*batch)

    def on_all_replicas(self, *batch):
        strategy = self.device.strategy
        results = strategy.run(self.on_one_replica, args=batch)
        self.step.assign_add(1)
        return strategy.experimental_local_results(results)[0]

    def on_one_replica(self, images, labels, weights):
        replica = tf.distribute.get_replica_context()
        for index, layer in enumerate(self.dropouts):  # masks: a function of the step
            mask = (self.step * len(self.dropouts) + index) * self.device.replicas
            mask += tf.cast(replica.replica_id_in_sync_group, tf.int64)
            layer.seed_generator.state.assign([self.seed, mask])
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            loss = tf.reduce_sum(weights * cross_entropy(logits, labels))
            l2 = tf.add_n(self.model.losses) / self.device.replicas
            total = self.optimizer.scale_loss(loss + l2)
        sums = [loss, l2, *tape.gradient(total, variables)]
        loss, l2, *gradients = replica.all_reduce("SUM", sums, options=PACKS)
        # Keras would clip before the sum, each replica for itself
        loss_scale = self.optimizer.scale_loss(1.0)  # which the gradients carry
        gradients, norm = tf.clip_by_global_norm(gradients, loss_scale)
        self.optimizer.apply(gradients, variables)
        norm /= loss_scale
        if self.device.precision == "float16":
            norm = tf.where(tf.math.is_finite(norm), norm, 0)
        return tf.stack([loss, l2, norm])


def optimize(model, learning_rate, vgg_factor=1.0, seed=0, device=None):
    """Return train_step and the run's state, as a tf.train.Checkpoint.

    Adam learns the decoder at `learning_rate`, a number or a schedule of Keras, and
    VGG-16 at `vgg_factor` times that; see TrainStep. Dropout's masks are a function of
    `seed` and the step. Beside model, optimizer and step the state has `epoch`, the
    number of epochs that are over, and `totals` of the open one, over its steps: loss,
    L2, gradient norm, seconds; and how many steps these are of.
    """
    device = device or helper.Device()
    variables = model.trainable_variables
    decoder = {
        variable.path
        for layer in model.layers
        if layer.name.startswith(("score_", "upscore_"))
        for variable in layer.variables
    }
    factors = [1.0 if v.path in decoder else vgg_factor for v in variables]
    with device.strategy.scope():
        optimizer = Adam(learning_rate, factors)
        if device.precision == "float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(variables)
    train_step = TrainStep(model, optimizer, seed, device)
    state = tf.train.Checkpoint(
        model=model,
        optimizer=optimizer,
        step=train_step.step,
        epoch=tf.Variable(0, dtype=tf.int64),
        totals=tf.Variable(tf.zeros(5, tf.float64)),
    )
    return train_step, state


@helper.traced(reduce_retracing=True)
def holdout_step(model, strategy, images, labels):
    """Return a batch's summed cross entropy and its confidence histogram, float64."""

    def on_one_replica(images, labels):
        logits = model(images, training=False)
        confidence = helper.to_confidence(tf.nn.softmax(logits)[..., 1])
        histogram = helper.confidence_histogram(confidence, labels)
        sums = tf.reduce_sum(cross_entropy(logits, labels)), histogram
        return [tf.cast(value, tf.float64) for value in sums]

    values = strategy.run(on_one_replica, args=(images, labels))
    return [strategy.reduce("SUM", value, axis=None) for value in values]


def evaluate(model, batches, device=None):
    """Return the hold-out's loss and scores at network size, {} without images.

    Called after every epoch, so without the mirror image. `batches` are images, labels
    and weights; `model` has two classes.
    """
    helper.need_two_classes(model, "scores")
    strategy = (device or helper.Device()).strategy
    bar = tqdm(batches, "hold-out", leave=False, disable=None)  # seconds, on a CPU
    results = [
        holdout_step(model, strategy, images, labels) for images, labels, _ in bar
    ]
    if not results:
        return {}
    loss, histogram = (np.sum(values, axis=0) for values in zip(*results))
    if not np.isfinite(loss):
        raise ProgramError(f"the hold-out loss is {loss}: lower --learning-rate")
    measures = helper.scores(histogram)
    kept = {name: measures[name] for name in ("MaxF", "IoU", "accuracy")}
    return {"holdout_loss": loss / max(histogram.sum(), 1)} | kept


def fetch(pending, step, batches):
    """Return the results (N, 3) of the `pending` steps, the last before `step`.

    The host waits for the device here. Raises ProgramError at a result that is not
    finite, with the step and its files.
    """
    values = tf.stack(pending).numpy().astype(float)
    for row, value in enumerate(values, step - len(pending)):
        if not np.isfinite(value).all():
            raise ProgramError(
                f"step {row + 1} gave {value.tolist()} (loss, L2, gradient norm) on "
                f"{', '.join(batches.files(row))}: look at these, or lower "
                "--learning-rate; where a resume gets past it, neither was the cause"
            )
    return values


def train_nn(
    epochs,
    batch_size,
    get_batches_fn,
    train_step,
    state,
    end_epoch=print,
    stop=None,
):
    """Train from `state` on until `epochs` epochs are over.

    get_batches_fn is that of gen_batch_function, train_step and state are those of
    optimize. end_epoch gets a record of each epoch's means and speed. Returns after
    the step in which the threading.Event `stop` is set. Raises ProgramError at a loss
    that is not finite; end_epoch never sees that epoch.
    """
    stop = stop or threading.Event()
    batches = get_batches_fn(batch_size)
    steps = len(batches)  # an epoch
    step = int(state.step.numpy())
    timed = step + 2  # the first steps trace; then their time is told
    upcoming = iter(batches.from_step(step))
    for epoch in range(int(state.epoch) + 1, epochs + 1):
        end = epoch * steps
        pending, totals = [], state.totals.numpy()
        since = time.perf_counter()
        with tqdm(
            desc=f"epoch {epoch}",
            total=steps,
            initial=step - end + steps,
            leave=False,
            disable=None,
        ) as bar:
            while step < end:
                pending.append(train_step(*next(upcoming)))
                step += 1
                now = time.perf_counter()
                stopping = stop.is_set()
                # The results are waited for once a second, not at every step.
                due = now - since > 1 or step <= timed or step == end or stopping
                if not due:
                    continue
                values = fetch(pending, step, batches)
                for value in values:  # one by one: the sum's bits do not depend on
                    totals[:3] += value  # when they are fetched
                now = time.perf_counter()
                if step == timed:
                    left = epochs * steps - step
                    bar.write(helper.forecast(now - since, steps, left))
                totals[3] += now - since
                totals[4] += len(values)
                state.totals.assign(totals)
                pending, since = [], now
                bar.update(len(values))
                bar.set_postfix(loss=f"{values[-1][0]:.4f}")
                if stopping:
                    return
        # over fewer steps where a notebook was interrupted
        loss, l2, norm = totals[:3] / totals[4]
        record = {
            "epoch": epoch,
            "step": step,
            "loss": loss,
            "l2": l2,
            "gradient_norm": norm,
            "seconds": totals[3],
            "images_per_second": totals[4] * batches.batch_size / totals[3],
        }
        state.epoch.assign(epoch)
        state.totals.assign(tf.zeros_like(totals))
        end_epoch(record)
        if stop.is_set():
            return


# ----------------------------------------------------------------------- program


def prepare(config):
    """Return the Split of the data and VGG-16's path; download or draw what lacks."""
    vgg_path = config.vgg
    run_dir = config.resume
    goes_on = run_dir and helper.has_weights(run_dir, helper.read_run(run_dir))
    if config.weights or goes_on:
        vgg_path = None
    elif vgg_path not in NO_FILE and not Path(vgg_path).is_file():
        raise ProgramError(
            f"{vgg_path}: not a file: put it there, or start with another --vgg"
        )
    data_dir = config.data_dir
    if config.demo:
        print("a demonstration on drawn roads; the real run is: python main.py")
        data_dir = data_dir / "demo"
        helper.maybe_draw_kitti_road(data_dir)
    else:
        helper.maybe_download_kitti_road(data_dir)
    if vgg_path == "downloaded":
        vgg_path = helper.maybe_download_pretrained_vgg(config.data_dir)
    if vgg_path not in (None, "random"):
        print(f"VGG-16 is {vgg_path}")
        helper.read_ahead(vgg_path)  # while the test images are looked at
    split = helper.find_images(data_dir, config.holdout_fraction, config.submission)
    return split, vgg_path


def train(config, this_run, train_step, model):
    """Train `model` on the images of `this_run`, which keeps every epoch."""
    split, device = this_run.split, this_run.device
    get_batches_fn = helper.gen_batch_function(
        split.training, config.image_shape, config.seed, device
    )
    get_holdout_fn = helper.gen_batch_function(
        split.holdout, config.image_shape, device=device
    )
    holdout = get_holdout_fn(config.batch_size).in_order()
    score = functools.partial(evaluate, model, holdout, device)
    with this_run.training() as stop:
        train_nn(
            config.epochs,
            config.batch_size,
            get_batches_fn,
            train_step,
            this_run.state,
            end_epoch=functools.partial(this_run.end_epoch, score),
            stop=stop,
        )


def run(config):
    """Train as `config` says, score the hold-out, segment the test images."""
    if config.resume and helper.leave_if_finished(config.resume):
        return
    helper.check_place(config)
    batch = config.batch_size, *config.image_shape
    device = helper.prepare_device(
        config.precision, config.xla, config.deterministic, batch
    )
    keras.utils.set_random_seed(config.seed)
    split, vgg_path = prepare(config)
    if config.epochs:
        helper.check_batch_size(config.batch_size, split.training, device.replicas)
    steps = max(len(split.training) // config.batch_size, 1)  # an epoch
    with helper.open_run(config, NETWORK, split, device) as this_run:
        print("building the network")
        with device.strategy.scope():
            model = fcn8s(vgg_path, config.keep_prob, config.l2)
        if config.weights and not this_run.has_weights:
            helper.load_weights(model, config.weights)
        train_step, state = optimize(
            model,
            warm_up_and_cosine(config.learning_rate, config.epochs, steps),
            vgg_factor=config.vgg_learning_rate / config.learning_rate,
            seed=config.seed,
            device=device,
        )
        per_replica = max(config.batch_size // device.replicas, 1)  # it works on one
        predictor = helper.Predictor(model, config.image_shape, per_replica)
        this_run.begin(state, predictor, total_steps=config.epochs * steps)
        if this_run.to_train:
            train(config, this_run, train_step, model)
        if device.chief:
            if not config.epochs:
                this_run.write_weights()
            this_run.score()
            helper.save_inference_samples(
                this_run.path, predictor, split.test, config.submission
            )


def use(config):
    """Segment images with trained weights, or export them."""
    os.environ.pop("TF_CONFIG", None)  # no other worker is needed, or waited for
    helper.check_name(config.name)
    if config.export:
        helper.check_export(config.export)
    if config.predict:
        files, problems = helper.find_inputs(config.predict)
    helper.prepare_device(config.precision)
    print("building the network")
    model = fcn8s(vgg_path=None, keep_prob=1)
    helper.load_weights(model, config.weights)
    predictor = helper.Predictor(model, config.image_shape, config.batch_size)
    if config.export:
        helper.export(predictor, config.export)
    if config.predict:
        helper.predict(files, problems, predictor, config.runs_dir, config.name)


def main(argv=None):
    """Run the program on a command line; return its exit code."""
    try:
        config = parse(argv)
        if config.predict or config.export:
            use(config)
        else:
            run(config)
        return 0
    except helper.EXPECTED as error:
        return helper.explain(error)


if __name__ == "__main__":
    helper.be_a_program(main)
