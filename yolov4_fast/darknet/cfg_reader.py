"""Sections of a cfg -> layers: the meaning of every section and key, with Darknet's defaults.

Three things can happen to a key that is not simply a layer's setting: training keys of [net] and
[yolo] are kept verbatim, those of other sections are dropped and listed in one warning, and
everything else is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from yolov4_fast.darknet.sections import CfgError, Section
from yolov4_fast.network.layers import (
    ACTIVATIONS,
    IMAGE,
    NMS_KINDS,
    SHORTCUT_NORMALIZATIONS,
    SHORTCUT_WEIGHTS,
    Conv,
    Head,
    Layer,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shape,
    Shortcut,
    Upsample,
)

IOU_LOSSES = ("mse", "iou", "giou", "diou", "ciou")
# Darknet's second names for settings of a shortcut.
WEIGHTS_ALIASES = {"per_layer": "per_feature"}
NORMALIZATION_ALIASES = {"avg_relu": "relu"}

NET_TRAINING = frozenset(
    """batch subdivisions momentum decay angle aspect saturation exposure hue learning_rate
    learning_rate_min burn_in max_batches policy steps scales seq_scales step scale gamma power
    sgdr_cycle sgdr_mult adam B1 B2 eps mosaic mosaic_bound mixup cutmix blur gaussian_noise flip
    max_crop min_crop resize_step label_smooth_eps ema_alpha adversarial_lr attention max_chart_loss
    dynamic_minibatch optimized_memory workspace_size_limit_MB loss_scale use_cuda_graph try_fix_nan
    weights_reject_freq equidistant_point badlabels_rejection_percentage num_sigmas_reject_badlabels
    contrastive contrastive_jit_flip contrastive_color unsupervised track augment_speed
    sequential_subdivisions show_receptive_field""".split()
)
YOLO_TRAINING = frozenset(
    """jitter resize random truth_thresh max max_delta objectness_smooth label_smooth_eps focal_loss
    counters_per_class delta_normalizer iou_thresh_kind map show_details track_history_size
    sim_thresh dets_for_track dets_for_show track_ciou_norm uc_normalizer beta1""".split()
)
# Understood, and without effect on inference: dropped with a warning.
LAYER_TRAINING = frozenset(
    """stopbackward onlyforward dont_update burnin_update train_only_bn learning_rate clip
    dynamic_minibatch stream wait_stream""".split()
)
CONV_TRAINING = LAYER_TRAINING | frozenset(
    "assisted_excitation grad_centr dot reverse angle".split()
)
# Darknet's switches that change what a convolution computes or what its weights mean.
CONV_SWITCHES = (
    "antialiasing",
    "binary",
    "xnor",
    "bin_output",
    "sway",
    "rotate",
    "stretch",
    "stretch_sway",
    "flipped",
    "coordconv",
    "dontload",
    "dontloadscales",
)
REFUSED_SECTIONS = frozenset(
    """scale_channels crop cost detection region Gaussian_yolo local activation crnn gru lstm
    conv_lstm history rnn conn connected local_avg local_avgpool reorg3d reorg avg avgpool dropout
    lrn normalization batchnorm soft softmax contrastive empty silence implicit""".split()
)


class CfgReader:
    """Turns sections into layers one after the other, knowing the shapes of those before."""

    def __init__(self, net: Section) -> None:
        self.net = net
        self.width, self.height, self.channels = (
            net.integer(key, 0, minimum=1) for key in ("width", "height", "channels")
        )
        self.layers: list[Layer] = []
        self.shapes: list[Shape] = []
        self.ignored: list[str] = []

    def read(self, sections: Sequence[Section]) -> Network:
        net = self.net
        letter_box = net.flag("letter_box")
        if net.integer("time_steps", 1) != 1:
            net.fail("recurrent networks are not supported; only 1 is", "time_steps")
        size = self.width * self.height * self.channels
        if net.integer("inputs", size) != size:
            net.fail(f"width x height x channels is {size}; leave the line out", "inputs")
        training = net.rest(NET_TRAINING)
        if not sections:
            net.fail("no layers follow")
        for section in sections:
            self._append(section)
        if self.ignored:
            warnings.warn(
                f"{net.source}: ignored, as it cannot affect inference: {', '.join(self.ignored)}",
                stacklevel=3,
            )
        try:
            return Network(
                tuple(self.layers), self.width, self.height, self.channels, letter_box, training
            )
        except NetworkError as error:
            raise CfgError(f"{net.source}: {error}") from None

    def _append(self, section: Section) -> None:
        readers: dict[str, Callable[[Section], Layer]] = {
            "convolutional": self._convolutional,
            "shortcut": self._shortcut,
            "route": self._route,
            "maxpool": self._maxpool,
            "upsample": self._upsample,
            "sam": self._sam,
            "yolo": self._yolo,
        }
        if section.name not in readers:
            self._refuse(section, tuple(readers))
        try:
            layer = readers[section.name](section)
            shape = layer.output_shape(*(self._shape(i) for i in layer.inputs))
            if min(shape) < 1:
                raise NetworkError(f"its output would be {shape}")
        except CfgError:
            raise
        except NetworkError as error:
            section.fail(f"{error}{self._hint(section)}")
        if not isinstance(layer, Head):
            known = CONV_TRAINING if isinstance(layer, Conv) else LAYER_TRAINING
            self.ignored += [
                f"{key} (line {section.options[key].line}, [{section.name}])"
                for key, _ in section.rest(known)
            ]
        self.layers.append(layer)
        self.shapes.append(shape)

    def _refuse(self, section: Section, supported: tuple[str, ...]) -> None:
        if section.name == "net":
            section.fail("a cfg has one such section")
        if section.name in REFUSED_SECTIONS:
            section.fail(f"this layer is not supported; supported are {', '.join(supported)}")
        close = get_close_matches(section.name, supported, 1)
        hint = f"did you mean [{close[0]}]?" if close else f"layers are {', '.join(supported)}"
        section.fail(f"unknown section; {hint}")

    def _hint(self, section: Section) -> str:
        if section.name in ("route", "shortcut", "sam") and (self.width % 32 or self.height % 32):
            return (
                f" (width={self.width} and height={self.height} of [net] should be multiples of "
                "the network's largest stride, usually 32)"
            )
        return ""

    def _shape(self, index: int) -> Shape:
        return (self.channels, self.height, self.width) if index == IMAGE else self.shapes[index]

    def _last(self, section: Section) -> int:
        """The layer before, which most layers read."""
        last = len(self.layers) - 1
        if last >= 0 and isinstance(self.layers[last], Head):
            section.fail(
                f"it would read the [yolo] layer {last}; a [route] must come between them, as "
                "detections are the end of a branch"
            )
        return last

    def _sources(self, section: Section, key: str) -> tuple[int, ...]:
        """Layers named by number: from the front, or, where negative, back from here."""
        numbers = section.integers(key)
        if not numbers:
            section.fail(f"{key}= is missing; it says which layers to read")
        here = len(self.layers)
        sources = tuple(number if number >= 0 else here + number for number in numbers)
        for number, source in zip(numbers, sources, strict=True):
            if not 0 <= source < here:
                section.fail(f"{number} names no layer before this one, which is layer {here}", key)
            if isinstance(self.layers[source], Head):
                section.fail(f"{number} is a [yolo] layer, the end of a branch", key)
        return sources

    def _stride(self, section: Section) -> int:
        stride = section.integer("stride", 1, minimum=1)
        x, y = section.integer("stride_x", stride), section.integer("stride_y", stride)
        if x != y:
            section.fail(f"strides {x} and {y} differ by axis, which is not supported", "stride_x")
        return x

    def _convolutional(self, section: Section) -> Conv:
        section.off(CONV_SWITCHES)
        if "share_index" in section.options:
            section.fail("sharing weights is not supported; leave it out", "share_index")
        size = section.integer("size", 1, minimum=1)
        if section.integer("dilation", 1) != 1 and size > 1:
            section.fail("dilated convolutions are not supported; only 1 is", "dilation")
        padding = section.integer("padding", 0, minimum=0)
        normalized = section.flag("batch_normalize")
        return Conv(
            inputs=(self._last(section),),
            filters=section.integer("filters", 1, minimum=1),
            size=size,
            stride=self._stride(section),
            padding=size // 2 if section.flag("pad") else padding,
            groups=section.integer("groups", 1, minimum=1),
            batch_normalize=section.flag("cbn") or normalized,
            activation=section.choice("activation", "logistic", ACTIVATIONS),
        )

    def _shortcut(self, section: Section) -> Shortcut:
        weights = section.choice("weights_type", "none", (*SHORTCUT_WEIGHTS, *WEIGHTS_ALIASES))
        normalization = section.choice(
            "weights_normalization", "none", (*SHORTCUT_NORMALIZATIONS, *NORMALIZATION_ALIASES)
        )
        if weights == "none":
            normalization = "none"  # it is of no effect
        return Shortcut(
            inputs=(self._last(section), *self._sources(section, "from")),
            activation=section.choice("activation", "linear", ACTIVATIONS),
            weights=WEIGHTS_ALIASES.get(weights, weights),
            normalization=NORMALIZATION_ALIASES.get(normalization, normalization),
        )

    def _route(self, section: Section) -> Route:
        return Route(
            inputs=self._sources(section, "layers"),
            groups=section.integer("groups", 1),
            group=section.integer("group_id", 0),
        )

    def _maxpool(self, section: Section) -> MaxPool:
        section.off(("maxpool_depth", "antialiasing", "maxpool_zero_nonmax"))
        section.text("out_channels", None)  # belongs to maxpool_depth
        stride = self._stride(section)
        size = section.integer("size", stride, minimum=1)
        padding = section.integer("padding", size - 1, minimum=0)
        return MaxPool(inputs=(self._last(section),), size=size, stride=stride, padding=padding)

    def _upsample(self, section: Section) -> Upsample:
        if section.number("scale", 1) != 1:
            section.fail("scaling the values is not supported; only 1 is", "scale")
        return Upsample(
            inputs=(self._last(section),), stride=section.integer("stride", 2, minimum=1)
        )

    def _sam(self, section: Section) -> Sam:
        section.choice("activation", "linear", ("linear",))
        sources = self._sources(section, "from")
        if len(sources) != 1:
            section.fail(f"one layer is multiplied with the one before, not {len(sources)}", "from")
        return Sam(inputs=(self._last(section), *sources))

    def _yolo(self, section: Section) -> Head:
        if "embedding_layer" in section.options:
            section.fail("embeddings for tracking are not supported", "embedding_layer")
        classes = section.integer("classes", 20, minimum=1)
        anchors = self._anchors(section)
        mask = section.integers("mask") or tuple(range(len(anchors)))
        for number in mask:
            if not 0 <= number < len(anchors):
                last = len(anchors) - 1
                section.fail(f"{number} names no anchor; num={last + 1} has 0 to {last}", "mask")
        source = self._last(section)
        channels, height, width = self._shape(source)
        filters = len(mask) * (5 + classes)
        if channels != filters:
            section.fail(
                f"classes={classes} with {len(mask)} anchors in mask reads {filters} channels but "
                f"the layer before gives {channels}; set filters={filters} in that "
                "[convolutional] section, or correct classes or mask"
            )
        stride = self.height // height
        if (height * stride, width * stride) != (self.height, self.width):
            self.net.fail(
                f"width={self.width} and height={self.height} do not fit the [yolo] section in "
                f"line {section.line}, whose map is {width}x{height}; both must be multiples of "
                "its stride"
            )
        return Head(
            inputs=(source,),
            all_anchors=anchors,
            mask=mask,
            num_classes=classes,
            stride=stride,
            scale_x_y=section.number("scale_x_y", 1.0),
            new_coords=section.flag("new_coords"),
            nms_kind=section.choice("nms_kind", "default", NMS_KINDS),
            beta_nms=section.number("beta_nms", 0.6),
            ignore_thresh=section.number("ignore_thresh", 0.5),
            iou_thresh=section.number("iou_thresh", 1.0),
            iou_loss=section.choice("iou_loss", "mse", IOU_LOSSES),
            iou_normalizer=section.number("iou_normalizer", 0.75),
            obj_normalizer=section.number("obj_normalizer", 1.0),
            cls_normalizer=section.number("cls_normalizer", 1.0),
            training=section.rest(YOLO_TRAINING | LAYER_TRAINING),
        )

    def _anchors(self, section: Section) -> tuple[tuple[float, float], ...]:
        count = section.integer("num", 1, minimum=1)
        sides = section.numbers("anchors")
        if len(sides) != 2 * count:
            section.fail(
                f"num={count} asks for {2 * count} numbers (width and height of each anchor), "
                f"but there are {len(sides)}",
                "anchors",
            )
        return tuple(zip(sides[::2], sides[1::2], strict=True))
