"""Augmentation as a pure function of (seed, view, stream, sample key).

Needs torch and no other file of `common`, and scipy to mix images.  A batch is augmented at once on the device that it
lies on, each sample with parameters of its own:

    params = sample_parameters(policy, seed, view, key, sizes)   # dict of (B, ...) tensors, relative to the image
    student = render(images, sizes, params, 32)                  # (B, 3, 32, 32) in 0..1
    teacher = render(images, sizes, params, 224)                 # the same crop, flip, rotation and colour

View 0 is the plain image.  Nothing here depends on the batch's size, on workers, on the order of samples or on the
number of processes: on a CPU the same sample gives the same bits in every batch.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

CROPS = ("none", "pad", "resized")
CROP_MODES = ("center", "squash")
COLOURS = ("brightness", "contrast", "saturation", "hue")
EFFECTS = ("grayscale", "blur", "solarize", "random_erasing")  # after the colours, in this order
CROP_TRIES = 10  # at a random resized crop that fits into the image
EFFECTS_STREAM = 1000  # above that of the view, for the draws of the effects
MIXING_STREAM = 3000  # for those of mixing
BLUR = (0.1, 2.0)  # standard deviations, in pixels of an output of BLUR_SIDE pixels
BLUR_SIDE = 224
POSITION_STEPS = 1024  # source positions are rounded to 1/1024 pixel, see `render`
# of images and of their fine samples, resampled together by one core of a CPU (measured on AMD EPYC)
PIXELS_A_CORE = 400_000


class PolicyError(ValueError):
    """An augmentation setting out of its range (a user's mistake)."""

    exit_code = 2


@dataclass(frozen=True)
class Policy:
    """What is drawn for a view.  Probabilities and strengths as in torchvision; 0, "none" and (1, 1) are off."""

    crop: str = "none"  # "pad": shift by whole source pixels, up to padding * side; "resized": random resized crop
    padding: float = 0.125  # share of the side: 4 pixels of 32
    crop_scale: tuple = (0.25, 1.0)  # area of the resized crop, share of the image; aspect ratio 3/4 to 4/3
    # What is not square: "center", its central square, as resizing the shorter side and a centre crop show it;
    # "squash", the whole image at another aspect ratio.  A "resized" crop starts from the whole image in either case.
    crop_mode: str = "center"
    hflip: float = 0.0  # probability
    vflip: float = 0.0  # probability
    rotation: float = 0.0  # degrees, uniform in +-rotation
    scale: tuple = (1.0, 1.0)  # zoom about the centre, uniform; above 1 enlarges
    brightness: float = 0.0  # factor uniform in 1 +- brightness
    contrast: float = 0.0  # the same
    saturation: float = 0.0  # the same
    hue: float = 0.0  # uniform in +-hue turns of the colour circle, at most 0.5
    grayscale: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian blur, see BLUR
    solarize: float = 0.0  # probability: what is brighter than 0.5 is inverted
    random_erasing: float = 0.0  # probability of a black box, 2 to 33 % of the area, aspect ratio 0.3 to 3.3
    mixup: float = 0.0  # alpha, see `sample_mixing`; where both are given, either is as likely
    cutmix: float = 0.0  # the same
    mix_probability: float = 1.0  # that a view is mixed

    def __post_init__(self):
        for flag, value, choices in (("crop", self.crop, CROPS), ("crop-mode", self.crop_mode, CROP_MODES)):
            if value not in choices:
                raise PolicyError(f"--{flag} {value} is not one of {', '.join(choices)}")
        shares = ("padding", "hflip", "vflip", *COLOURS, *EFFECTS, "mix_probability")
        # of an alpha of 100 all shares are close to 1/2
        most = {**dict.fromkeys(shares, 1), "hue": 0.5, "rotation": 180, "mixup": 100, "cutmix": 100}
        for name, limit in most.items():
            if not 0 <= getattr(self, name) <= limit:
                unit = " degrees" if name == "rotation" else ""
                raise PolicyError(f"--{name.replace('_', '-')} {getattr(self, name)} is not in 0 to {limit}{unit}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise PolicyError(f"--scale {self.scale[0]} {self.scale[1]} must be positive and ascend")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise PolicyError(f"--crop-scale {self.crop_scale[0]} {self.crop_scale[1]} must ascend within 0 to 1")
        if self.mix_probability != 1 and not self.mixes:
            raise PolicyError(f"--mix-probability {self.mix_probability} needs --mixup ALPHA or --cutmix ALPHA")

    @property
    def mixes(self) -> bool:
        """Whether a view may show two images."""
        return bool(self.mixup or self.cutmix)

    def to_dict(self) -> dict:
        """Plain types, for a checkpoint or a store's meta."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> Policy:
        """What `to_dict` gave; an unknown setting is refused, for without it stored views could not be made again."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise PolicyError(f"the augmentation policy has the unknown setting {', '.join(unknown)}")
        arguments: dict[str, Any] = {"crop_mode": "squash"}  # as it was before there was a choice
        arguments.update((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())
        return cls(**arguments)


PRESETS = {
    # skin lesions have no upright; the camera's distance, light and white balance vary
    "derm": Policy(
        hflip=0.5, vflip=0.5, rotation=30, scale=(0.8, 1.2), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2
    ),
}


# ---------------------------------------------------------------------------------------------- counter-based random


def hash_id(sample_id: str) -> int:
    """64-bit key of a sample's id (str) as a signed int: BLAKE2b, so that an added file shifts no other sample."""
    name = sample_id.encode(errors="surrogateescape")  # a file's name need not be UTF-8
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def _signed(value):
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x):
    """Finalizer of splitmix64 (Steele et al. 2014) on int64 tensors, whose products wrap as unsigned ones do."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)  # >> keeps the sign: mask it away
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(seed: int, view: int | Tensor, stream: int, key: Tensor, count: int = 1) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the arguments alone.

    seed, stream: int; view: int or (B,) int64; key: (B,) int64, see `hash_id`.  Returns (B, count) float64 of 53
    random bits, on key's device.
    """
    view = torch.as_tensor(view, dtype=torch.int64, device=key.device)
    state = _mix(key + _signed(0x9E3779B97F4A7C15 * (2 * seed + 1)))
    state = _mix(state ^ _mix(view + _signed(0xD1B54A32D192ED03 * (2 * stream + 1))))  # (B,)
    counter = torch.arange(1, count + 1, device=key.device) * _signed(0x9E3779B97F4A7C15)
    bits = (_mix(state[:, None] + counter) >> 11) & ((1 << 53) - 1)  # (B, count)
    return bits.double() * 2.0**-53


# --------------------------------------------------------------------------------------------------------- parameters


def _resized_crop(scale, draws, size):
    """Sides (2, B) of random resized crops in whole pixels, and whether a try fits (B,), else they are central.

    As torchvision's RandomResizedCrop: the first try that fits into the image counts; where none does, the largest crop
    of an allowed aspect ratio.  draws: (B, 2 * tries), of area and aspect ratio (3/4 to 4/3) in turn; size: (2, B),
    width and height.
    """
    area = (scale[0] + draws[:, ::2] * (scale[1] - scale[0])) * size.prod(0)[:, None]  # (B, tries)
    ratio = torch.exp((draws[:, 1::2] * 2 - 1) * math.log(4 / 3))
    sides = torch.stack([torch.sqrt(area * ratio), torch.sqrt(area / ratio)]).round()  # (2, B, tries)
    fits = ((sides > 0) & (sides <= size[:, :, None])).all(0)
    first = fits.int().argmax(1).expand(2, -1)[:, :, None]
    central = torch.minimum(size, (size.flip(0) * 4 / 3).round())
    return torch.where(fits.any(1), sides.gather(2, first)[:, :, 0], central), fits.any(1)


def sample_parameters(
    policy: Policy, seed: int, view: Tensor, key: Tensor, sizes: Tensor, stream: int = 0
) -> dict[str, Tensor]:
    """Draw what happens to each sample of a batch; a few numbers a sample, computed on the CPU.

    view: (B,) int64, 0 gives the plain image; key: (B,) int64; sizes: (B, 2) height and width in pixels; all on the
    CPU.  Returns a dict of tensors, relative so that they serve any resolution: `matrix` (B, 2, 2) and `shift` (B, 2)
    float32 map output positions (x, y in -1..1) to source positions of that range, `border` (B, 2) float32 is where
    in -1..1 the crop's outermost pixels have their centres, `extent` (B, 2) float64 are the source pixels that lie
    across and down the output, and, where the policy has them, `brightness`, `contrast`, `saturation`, `hue`,
    `grayscale`, `blur`, `solarize` (B,) and `random_erasing` (B, 4) float32, see `_colour`.
    """
    # each draw has a number of its own, so that a flag changes that alone
    u = uniform(seed, view, stream, key, 12 + (2 * CROP_TRIES - 2) * (policy.crop == "resized")).unbind(1)
    plain = torch.as_tensor(view) == 0
    height, width = sizes.double().unbind(1)
    one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])

    # output -> source: flip, zoom and rotation about the centre, then the crop's place and size
    flip_x = torch.where(u[0] < policy.hflip, -one, one)
    flip_y = torch.where(u[1] < policy.vflip, -one, one)
    angle = (u[2] * 2 - 1) * math.radians(policy.rotation)
    zoom = policy.scale[0] + u[3] * (policy.scale[1] - policy.scale[0])
    size = torch.stack([width, height])
    base = size.amin(0).expand(2, -1) if policy.crop_mode == "center" else size  # sides of what is shown, in pixels
    plain_crop, plain_centre = base / size, (2 * ((size - base) / 2).floor() + base) / size - 1  # of whole pixels
    (crop_w, crop_h), (centre_x, centre_y) = plain_crop, plain_centre
    if policy.crop == "pad":  # whole pixels of the source, so that a shift alone does not blur
        reach = (policy.padding * base).round()
        centre_x, centre_y = plain_centre + (torch.floor(torch.stack(u[4:6]) * (2 * reach + 1)) - reach) * 2 / size
    elif policy.crop == "resized":
        sides, fits = _resized_crop(policy.crop_scale, torch.stack([*u[6:8], *u[12:]], 1), size)
        start = torch.floor(torch.where(fits, torch.stack(u[4:6]) * (size - sides + 1), (size - sides) / 2))
        (crop_w, crop_h), (centre_x, centre_y) = sides / size, (2 * start + sides) / size - 1

    # rotation turns pixels, not relative units: height / width puts the aspect back
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    matrix = torch.stack(
        [
            torch.stack([cos * crop_w * flip_x, sin * (height / width) * crop_h * flip_y], 1),
            torch.stack([-sin * (width / height) * crop_w * flip_x, cos * crop_h * flip_y], 1),
        ],
        1,
    )
    shift = torch.stack([centre_x, centre_y], 1)
    plain_matrix = torch.diag_embed(plain_crop.T)
    crop = torch.where(plain, base, size * torch.stack([crop_w, crop_h])).T
    params = {  # computed in float64: the same bits in any batch after rounding
        "matrix": torch.where(plain[:, None, None], plain_matrix, matrix).float(),
        "shift": torch.where(plain[:, None], plain_centre.T, shift).float(),
        "border": (1 - 1 / crop).clamp(min=0).float(),
        "extent": crop / torch.where(plain, one, zoom)[:, None],
    }
    for i, name in ((8, "brightness"), (9, "contrast"), (10, "saturation")):
        if getattr(policy, name):
            params[name] = torch.where(plain, one, 1 + (u[i] * 2 - 1) * getattr(policy, name)).float()
    if policy.hue:
        params["hue"] = torch.where(plain, zero, (u[11] * 2 - 1) * policy.hue).float()
    if any(getattr(policy, name) for name in EFFECTS):
        params.update(_effects(policy, uniform(seed, view, stream + EFFECTS_STREAM, key, len(EFFECTS) + 5), plain))
    return params


def _effects(policy, draws, plain):
    """Parameters of the effects that the policy has; draws: (B, 9), who gets which, and how much of it."""
    params, values = {}, {"random_erasing": _box(*draws.T[5:])}  # (B, 4)
    values["blur"] = ((BLUR[0] + draws[:, 4] * (BLUR[1] - BLUR[0])) / BLUR_SIDE)[:, None]
    for i, name in enumerate(EFFECTS):
        chance = getattr(policy, name)
        if chance:
            on = ((draws[:, i] < chance) & ~plain).double()[:, None]
            params[name] = (on * values.get(name, 1.0)).float()
    return params


def _box(area, ratio, left, top):
    """(B, 4): left, top, right and bottom of boxes in shares of the side, as torchvision's RandomErasing draws them."""
    area, ratio = 0.02 + area * 0.31, torch.exp(math.log(0.3) + ratio * math.log(3.3 / 0.3))
    height, width = torch.sqrt(area * ratio).clamp(max=1), torch.sqrt(area / ratio).clamp(max=1)
    left, top = left * (1 - width), top * (1 - height)
    return torch.stack([left, top, left + width, top + height], 1)


# ------------------------------------------------------------------------------------------------------------- mixing


def sample_mixing(
    policy: Policy, seed: int, view: Tensor, key: Tensor, index: Tensor, by_key: Tensor, stream: int = 0
) -> dict[str, Tensor]:
    """Draw with which image of its split each sample of a batch is mixed, and how; computed on the CPU.

    view, key, index: (B,) int64, the last its row in the split; by_key: (N,) int64, the split's rows in the order of
    their keys, so that the order of files does not matter.  Returns a dict of (B, ...) tensors: `partner` int64, a row;
    `weight` float32 of the sample outside `box` (B, 4) float32, which shows the partner alone: left, top, right and
    bottom in shares of the side; `share` float32 of the sample in all that shows.  What is not mixed, as view 0, is its
    own partner.

    MixUp: share from Beta(alpha, alpha), Zhang et al. 2018, arXiv:1710.09412.  CutMix: 1 - share is the area of a box
    around a uniform centre before it is clipped at the image, Yun et al. 2019, arXiv:1905.04899.
    """
    from scipy.special import betaincinv

    mixed, kind, row, quantile, x, y = uniform(seed, view, stream + MIXING_STREAM, key, 6).unbind(1)
    mixed = (mixed < policy.mix_probability) & (view != 0)
    cut = kind < (0.5 if policy.mixup and policy.cutmix else float(policy.cutmix > 0))
    alpha = torch.full_like(quantile, policy.mixup).masked_fill(cut, policy.cutmix)
    weight = torch.from_numpy(betaincinv(alpha.numpy(), alpha.numpy(), quantile.numpy()))  # inverse of Beta's CDF
    half = torch.where(mixed & cut, torch.sqrt(1 - weight) / 2, torch.zeros_like(weight))  # of the box's side
    box = torch.stack([x - half, y - half, x + half, y + half], 1).clamp(0, 1)
    weight = torch.where(mixed & ~cut, weight, torch.ones_like(weight))
    share = weight * (1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]))
    partner = torch.where(mixed, by_key[(row * len(by_key)).long()], index)
    return {"partner": partner, "weight": weight.float(), "box": box.float(), "share": share.float()}


def mix_labels(labels: Tensor, others: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, others, share) of mixed images, in which the first label is that of the larger share.

    labels, others: int64 of samples and partners, -1 is none, and then the mixed image has none; share: of the sample.
    """
    larger, unknown = share >= 0.5, (labels < 0) | (others < 0)
    first, second = torch.where(larger, labels, others), torch.where(larger, others, labels)
    return first.masked_fill(unknown, -1), second.masked_fill(unknown, -1), torch.where(larger, share, 1 - share)


def mix(images: Tensor, weight: Tensor, box: Tensor) -> Tensor:
    """Mix samples and their partners, one half of (2 * B, 3, R, R) and the other -> (B, 3, R, R).

    weight: (B, 1, 1, 1); box: (B, 4, 1, 1); see `sample_mixing`.  A pixel at the box's edge shows the partner by the
    part that the box covers, so that the mean over pixels is the area of the box at any resolution.
    """
    own, other = images.chunk(2)
    side = images.shape[-1]
    edges = (box * side - _centres(side, images.device) + 0.5).clamp_(0, 1)  # (B, 4, 1, R): what lies left of, above it
    across, down = (edges[:, 2:] - edges[:, :2]).unbind(1)  # (B, 1, R)
    return _blend(own, other, weight * (1 - down.mT * across)[:, None])


# ------------------------------------------------------------------------------------------------------------- render


def source_geometry(params: dict[str, Tensor], sizes: Tensor) -> Tensor:
    """Where the output lies in each source image, (5, B, 2, 1, 1) float32, x before y, in pixels of the source.

    What one unit to the right and one unit down in the output (-1..1) adds to the position; the position of its centre;
    `border`; and the whole pixels that lie across and down the output.  params: from `sample_parameters`; sizes:
    (B, 2).
    """
    half = sizes.flip(1).double() / 2
    right, down = (params["matrix"] * half[:, :, None]).unbind(2)
    centre = (params["shift"] + 1) * half - 0.5
    parts = torch.stack([right, down, centre, params["border"].double(), torch.ceil(params["extent"] - 1e-6)])
    return parts.float()[..., None, None]


def render(images: Tensor, sizes: Tensor, params: dict[str, Tensor], resolution: int) -> Tensor:
    """Resample and colour a batch once.

    images: (B, 3, H, W) uint8 on the model's device, each image in the top left corner; sizes: (B, 2) on the CPU,
    each one's height and width in pixels; params: from `sample_parameters`.  Returns (B, 3, R, R) float32 in 0..1.
    The image lies on an endless black plane, of which the crop shows a part and holds its border.  Where the crop
    shrinks, it is sampled at the source's resolution (bilinear) and then shrunk as torchvision's resize does with
    antialias=True, else it is bilinear at once.
    """
    geometry = source_geometry(params, sizes)
    colours = {
        name: params[name].view(len(images), -1, 1, 1).to(images.device) for name in COLOURS + EFFECTS if name in params
    }
    most = geometry[4].amax((0, 2, 3)).tolist()
    return _render(images, geometry.to(images.device).unbind(0), colours, most, resolution)


def _render(images, geometry, colours, most, resolution, mixing=None):
    """As `render`, of what lies on the device; most: the largest number of source pixels across and down, in Python,
    so that nothing waits for the device; mixing: arguments of `mix`, where the second half of the images are partners.
    """
    if _exact(images):
        out = _resample_in_parts(images, geometry, resolution)
    else:
        shrinks = max(most) > resolution
        samples = -int(-max(most) // 16) * 16 if shrinks else resolution  # few shapes, and both axes at once
        out = _resample(images, geometry, resolution, samples, samples)
    out = _colour(out, colours) if colours else out
    return mix(out, **mixing) if mixing else out


def _resample_in_parts(images, geometry, resolution):
    """`_resample` of as many images at a time as stay in a CPU's caches: 1.8 times as fast for 16 of 176 to 96 px."""
    count = geometry[4].flatten(1).clamp(min=resolution).long()  # (B, 2), samples
    parts, shrinks = [], count > resolution
    for kind in shrinks.unique(dim=0):
        rows = (shrinks == kind).all(1).nonzero()[:, 0]
        rows = rows[count[rows].prod(1).argsort()]  # alike together: a part is sampled as finely as its largest
        pixels = _padded_side(images) ** 2 + count[rows[-1]].prod().item()
        # grid_sample gives each thread whole images
        parts += rows.split(max(1, PIXELS_A_CORE // pixels) * torch.get_num_threads())
    if len(parts) == 1:
        return _resample(images, geometry, resolution, *count.amax(0).tolist())
    out = torch.empty(len(images), 3, resolution, resolution)
    for rows in parts:
        part = [values[rows] for values in geometry]
        out[rows] = _resample(images[rows], part, resolution, *count[rows].amax(0).tolist())
    return out


@functools.cache
def _constant(values, device):
    """A float32 tensor that is copied to the device once, not in each step."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def _centres(count, device, scale=1.0):
    """0.5, 1.5, ... (count,), times scale"""
    return (torch.arange(count, device=device) + 0.5) * scale


@functools.cache
def _positions(resolution, device):
    """(1, 2, 1, R) of the output's pixels, in -1..1, across and down"""
    return ((torch.arange(resolution, device=device) * 2 + 1) / resolution - 1).expand(1, 2, 1, -1)


def _exact(images):
    """Whether the same image must have the same bits in any batch; a GPU's products and sums are faster without."""
    return images.device.type == "cpu"


def _padded_side(images):
    return 1 << (max(images.shape[-2:]) - 1).bit_length()


def _resample(images, geometry, resolution, most_x, most_y):
    """images: (B, 3, H, W) uint8; geometry: five (B, 2, 1, 1); most: samples across and down -> (B, 3, R, R) float32
    of 0..1.

    On a CPU the image is padded to a side that is a power of two, and positions are rounded to 1/1024 pixel: then the
    float32 arithmetic of `grid_sample` is exact, so that the padding (which other images of the batch decide) leaves no
    trace in the result.
    """
    right, down, centre, border, pixels = geometry
    device, most, exact = images.device, max(most_x, most_y), _exact(images)
    if exact:
        side = _padded_side(images)
        images = torch.nn.functional.pad(images, (0, side - images.shape[-1], 0, side - images.shape[-2]))
    height, width = images.shape[-2:]
    at, count = _positions(resolution, device), None
    if most > resolution:
        count = pixels.clamp(min=resolution)
        at = _centres(most, device, 2.0) / count - 1  # (B, 2, 1, S)
    # past the centres of its outermost pixels a crop goes on as they are: neither black nor what was cut off
    x, y = at.clamp(-border, border).unbind(1)  # (B, 1, S)
    if most_x != most_y:
        x, y = x[..., :most_x], y[..., :most_y]
    # in place, for the passes over memory, not the arithmetic, are what it costs
    grid = right * x[:, None] + (down * y.mT[:, None]).add_(centre)  # (B, 2, S_y, S_x), x and y in pixels
    grid.mul_(POSITION_STEPS).round_()
    if width == height:
        grid.mul_(2 / (POSITION_STEPS * width)).add_(1 / width - 1)
    else:
        grid.mul_(_constant((((2 / (POSITION_STEPS * width),),), ((2 / (POSITION_STEPS * height),),)), device))
        grid.add_(_constant((((1 / width - 1,),), ((1 / height - 1,),)), device))
    # past the image is padding or nothing: black
    grid = grid.permute(0, 2, 3, 1)
    out = torch.nn.functional.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
    if count is not None and exact:
        count_x, count_y = count.flatten(1).unbind(1)
        out = _shrink(_shrink(out, count_y, resolution).mT, count_x, resolution).mT.contiguous()
    elif count is not None:
        out = _shrink_at_once(out, count, resolution)
    return out * (1 / 255)


def _shrink(samples, count, resolution):
    """Rows (B, 3, S, W), of which each image has its own first `count` (B,), resized to (B, 3, R, W) by a triangle.

    It reaches count / R rows to both sides and ends with the rows, as torchvision's with antialias=True.  One product
    and one sum a tap, for a fused sum's last bit depends on the batch's size.
    """
    images, channels, most, _ = samples.shape
    if most == resolution:
        return samples
    scale = (count / resolution)[:, None]  # (B, 1)
    centre = _centres(resolution, count.device) * scale  # (B, R)
    first = torch.floor(centre - scale + 0.5).clamp(min=0)
    row = first + torch.arange(-(-2 * most // resolution), device=count.device)[:, None, None]  # (taps, B, R)
    weights = (1 - (row + 0.5 - centre).abs() / scale).clamp(min=0) * (row < count[:, None])
    weights = weights / sum(weights)
    planes = torch.arange(images * channels, device=count.device).view(images, channels, 1) * most  # (B, 3, 1)
    rows = planes + row.clamp(max=most - 1).long()[:, :, None]  # (taps, B, 3, R)
    flat = samples.flatten(0, 2)
    taps = (flat.index_select(0, at.flatten()).view(images, channels, resolution, -1) for at in rows)
    # white is 255 to the last bit
    return sum(tap * weight[:, None, :, None] for tap, weight in zip(taps, weights)).clamp(max=255)


def _shrink_at_once(samples, count, resolution):
    """Both axes of (B, 3, S, S) by two matrix products, to rounding what `_shrink` does; count: (B, 2, 1, 1)."""
    batch, channels, most, _ = samples.shape
    device = samples.device
    position = _centres(most, device, resolution) / count  # (B, 2, 1, S), in output pixels
    position = torch.where(_centres(most, device) < count, position, _constant(math.inf, device))
    weights = 1 - (position - _centres(resolution, device)[:, None]).abs_()  # (B, 2, R, S)
    weights = weights.clamp_(min=0)
    across, down = (weights / weights.sum(-1, keepdim=True)).unbind(1)
    rows = torch.bmm(samples.view(batch, -1, most), across.mT).view(batch, channels, most, resolution)
    out = torch.bmm(down, rows.transpose(1, 2).flatten(2))  # (B, R, 3 * R)
    return out.view(batch, resolution, channels, resolution).transpose(1, 2)


def _blend(images, other, factor):
    if _exact(images):  # a fused product's last bit depends on the batch's size
        return (factor * images + (1 - factor) * other).clamp_(0, 1)
    return torch.lerp(other.expand_as(images), images, factor).clamp_(0, 1)


def _grey(images):
    """(B, 3, H, W) -> (B, 1, H, W), ITU-R 601 weights as in torchvision."""
    return (images * _constant((((0.2989,),), ((0.587,),), ((0.114,),)), images.device)).sum(1, keepdim=True)


def _colour(images, params):
    """Brightness, contrast, saturation, hue, grey, blur, inversion and box, in this order, as torchvision has them.

    images: (B, 3, R, R) in 0..1; params: each (B, 1, 1, 1), factors, turns, the blur's standard deviation in shares of
    the side, 1 for what is done; of boxes (B, 4, 1, 1), their edges in shares of the side.  0 leaves an image as it is.
    """
    if "brightness" in params:
        images = (images * params["brightness"]).clamp_(0, 1)
    if "contrast" in params:
        grey = _grey(images)
        if _exact(images):  # summed in integers: a float sum's last bit depends on the batch's size
            total = torch.round(grey * 2**20).long().flatten(1).sum(1).double() / (grey[0].numel() * 2**20)
            mean = total.float()[:, None, None, None]
        else:
            mean = grey.mean((1, 2, 3), keepdim=True)
        images = _blend(images, mean, params["contrast"])
    if "saturation" in params:
        images = _blend(images, _grey(images), params["saturation"])
    if "hue" in params:
        images = _turn_hue(images, params["hue"])
    if "grayscale" in params:
        images = torch.where(params["grayscale"] > 0, _grey(images), images)
    if "blur" in params:
        images = _blur(images, params["blur"] * images.shape[-1])
    if "solarize" in params:
        images = torch.where((params["solarize"] > 0) & (images >= 0.5), 1 - images, images)
    if "random_erasing" in params:
        left, top, right, bottom = (params["random_erasing"] * images.shape[-1]).round().unsqueeze(1).unbind(2)
        at = _centres(images.shape[-1], images.device)
        inside = (at > left) & (at < right) & (at[:, None] > top) & (at[:, None] < bottom)  # (B, 1, R, R)
        images = torch.where(inside, 0.0, images)
    return images


def _blur(images, deviation):
    """Gaussian blur of (B, 3, R, R), the border mirrored; deviation (B, 1, 1, 1) in pixels, up to that of BLUR."""
    side = images.shape[-1]
    radius = min(side - 1, math.ceil(3 * BLUR[1] * side / BLUR_SIDE))
    steps = torch.arange(-radius, radius + 1, device=images.device).view(1, -1, 1, 1)
    taps = torch.exp(-0.5 * (steps / deviation.clamp(min=1e-6)) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).unsqueeze(2).unbind(1)  # each (B, 1, 1, 1)
    for axis in (3, 2):  # one product and one sum a tap, see `_shrink`
        sides = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = torch.nn.functional.pad(images, sides, mode="reflect")
        images = sum(tap * padded.narrow(axis, start, side) for start, tap in enumerate(taps))
    return images


def _turn_hue(images, turn):
    """Turn the hue of (B, 3, R, R) images by (B, 1, 1, 1) turns, through HSV."""
    (value, largest), low = images.max(1, keepdim=True), images.amin(1, keepdim=True)  # (B, 1, R, R)
    chroma = value - low
    # of the largest channel: the next one but that after it, and where its third of the circle begins, in sextants
    ahead = (images.roll(-1, 1) - images.roll(-2, 1)).gather(1, largest)
    sextant = (ahead / chroma.clamp(min=1e-9)).add_(largest, alpha=2).add_(turn * 6)
    # value - chroma * clamp(min(k, 4 - k), 0, 1), of red, green and blue
    k = torch.remainder(sextant + _constant((((5.0,),), ((3.0,),), ((1.0,),)), images.device), 6)
    turned = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)  # not below `low`, which is not negative
    # view 0 to the last bit
    return torch.where(turn == 0, images, turned) if _exact(images) else turned


def normalize(images: Tensor, mean: list | Tensor, std: list | Tensor) -> Tensor:
    """(B, 3, R, R) in 0..1 -> zero mean and unit variance by channel; mean, std: three numbers each, or (3, 1, 1)."""
    mean, std = (torch.as_tensor(v, device=images.device, dtype=images.dtype) for v in (mean, std))
    return (images - (mean if mean.dim() == 3 else mean.view(3, 1, 1))) / (std if std.dim() == 3 else std.view(3, 1, 1))


class Augmenter:
    """A policy and a seed, applied to raw batches; stream: 0 of the view itself, others of its local crops.

    `augmenter(batch, resolution)` -> (B, 3, R, R) float32 in 0..1.  batch: `image` (B, 3, H, W) uint8 on the model's
    device; `size` (B, 2), `key` (B,), `view` (B,) int64 on the CPU, or the parameters that `plan` has made of them.
    """

    def __init__(self, policy: Policy, seed: int, stream: int = 0):
        self.policy, self.key = policy, (policy, seed, stream)

    def plan(self, batch: dict) -> dict:
        """The batch with the parameters of its views; each value may be (S, B, ...), of S steps at once.

        Where the policy mixes, also with `partner`, rows of the split whose images stand behind those of the batch when
        it is rendered, and `targets` as `mix_labels` gives them.  `split` is then all N rows of the split: `by_key`,
        see `sample_mixing`, `key` (N,), `size` (N, 2) and `targets` {task: (N,)}.
        """
        mixing = None
        if self.policy.mixes:
            batch, mixing = self._with_partners(batch)
        if "size" not in batch:  # not known before the images are decoded
            return batch
        view, key, size = batch["view"], batch["key"], batch["size"]
        if mixing:
            split, partner = batch["split"], batch["partner"]
            view, key = torch.cat([view, view], -1), torch.cat([key, split["key"][partner]], -1)
            size = torch.cat([size, split["size"][partner]], -2)
        shape, size = view.shape, size.flatten(0, -2)
        policy, seed, stream = self.key
        params = sample_parameters(policy, seed, view.flatten(), key.flatten(), size, stream)
        geometry = source_geometry(params, size).unflatten(1, shape)  # (5, S, B, 2, 1, 1)
        planned = {
            "geometry": geometry.unbind(0),
            "colours": {name: params[name].view(*shape, -1, 1, 1) for name in COLOURS + EFFECTS if name in params},
            "most": geometry[4].amax((-4, -2, -1)).tolist(),
            **({"mixing": mixing} if mixing else {}),
        }
        return {**batch, "parameters": {**batch.get("parameters", {}), self.key: planned}}

    def _with_partners(self, batch):
        """(the batch with partners and the labels of its mixed images, arguments of `mix`)"""
        policy, seed, stream = self.key
        split, shape = batch["split"], batch["view"].shape
        flat = (batch[name].flatten() for name in ("view", "key", "index"))
        drawn = sample_mixing(policy, seed, *flat, split["by_key"], stream)
        partner, share = drawn["partner"].view(shape), drawn["share"].view(shape)
        targets = {
            task: mix_labels(labels, split["targets"][task][partner], share)
            for task, labels in batch["targets"].items()
        }
        mixing = {name: drawn[name].view(*shape, -1, 1, 1) for name in ("weight", "box")}
        return {**batch, "partner": partner, "targets": targets}, mixing

    def __call__(self, batch: dict, resolution: int) -> Tensor:
        planned = batch.get("parameters", {}).get(self.key)
        images, rendered = batch["image"], batch.get("pixels")
        if rendered is None or rendered["view"] is not batch["view"]:  # a copy of the batch may have another view
            rendered = batch["pixels"] = {"view": batch["view"]}
        key = (*self.key, resolution)
        if key not in rendered:  # teacher and student of one resolution share the work
            if planned:
                rows = len(planned["geometry"][0])  # local crops are of the first B of G * B images
                images = images if len(images) == rows else images[:rows]
                rendered[key] = _render(images, **planned, resolution=resolution)
            elif self.policy.mixes and batch["view"].any():
                raise ValueError("views that are mixed have to be planned, see Augmenter.plan")
            else:
                params = sample_parameters(*self.key[:2], batch["view"], batch["key"], batch["size"], self.key[2])
                rendered[key] = render(images, batch["size"], params, resolution)
        return rendered[key]
