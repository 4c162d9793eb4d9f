"""Augmentation as a pure function of (seed, view, stream, sample key).

Needs torch alone and no other file of `common`.  A batch is augmented at once on the device that it lies on, each
sample with parameters of its own:

    params = sample_parameters(policy, seed, view, key, sizes)   # dict of (B, ...) tensors, relative to the image
    student = render(images, sizes, params, 32)                  # (B, 3, 32, 32) in 0..1
    teacher = render(images, sizes, params, 224)                 # the same crop, flip, rotation and colour

View 0 is the plain image.  Nothing here depends on the batch's size, on workers, on the order of samples or on the
number of processes: on a CPU the same sample gives the same bits in every batch.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CROPS = ("none", "pad", "resized")
CROP_MODES = ("center", "squash")
COLOURS = ("brightness", "contrast", "saturation", "hue")
CROP_TRIES = 10  # at a random resized crop that fits into the image
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

    def __post_init__(self):
        for flag, value, choices in (("crop", self.crop, CROPS), ("crop-mode", self.crop_mode, CROP_MODES)):
            if value not in choices:
                raise PolicyError(f"--{flag} {value} is not one of {', '.join(choices)}")
        most = {**dict.fromkeys(("padding", "hflip", "vflip", *COLOURS), 1), "hue": 0.5, "rotation": 180}
        for name, limit in most.items():
            if not 0 <= getattr(self, name) <= limit:
                unit = " degrees" if name == "rotation" else ""
                raise PolicyError(f"--{name} {getattr(self, name)} is not in 0 to {limit}{unit}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise PolicyError(f"--scale {self.scale[0]} {self.scale[1]} must be positive and ascend")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise PolicyError(f"--crop-scale {self.crop_scale[0]} {self.crop_scale[1]} must ascend within 0 to 1")

    def to_dict(self) -> dict:
        """Plain types, for a checkpoint or a store's meta."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Policy":
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
    across and down the output, and, where the policy has colour, `brightness`, `contrast`, `saturation`, `hue` (B,)
    float32.
    """
    # always all of them, so that a flag changes its own draw alone
    u = uniform(seed, view, stream, key, 10 + 2 * CROP_TRIES).unbind(1)
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
    return params


# ------------------------------------------------------------------------------------------------------------- render


def render(images: Tensor, sizes: Tensor, params: dict[str, Tensor], resolution: int) -> Tensor:
    """Resample and colour a batch once.

    images: (B, 3, H, W) uint8 on the model's device, each image in the top left corner; sizes: (B, 2) on the CPU,
    each one's height and width in pixels; params: from `sample_parameters`.  Returns (B, 3, R, R) float32 in 0..1.
    The image lies on an endless black plane, of which the crop shows a part and holds its border.  Where the crop
    shrinks, it is sampled at the source's resolution (bilinear) and then shrunk as torchvision's resize does with
    antialias=True, else it is bilinear at once.
    """
    device = images.device
    extent = params["extent"]
    count = torch.where(extent > resolution, torch.ceil(extent - 1e-6).long(), resolution)  # (B, 2), samples
    columns = [params["matrix"].flatten(1), params["shift"], sizes.float(), params["border"], count.float()]
    affine = torch.cat(columns, 1)  # (B, 12), one transfer
    affine, parts, shrinks = affine.to(device, non_blocking=True), [], count > resolution
    for kind in shrinks.unique(dim=0):
        rows = (shrinks == kind).all(1).nonzero()[:, 0]
        rows = rows[count[rows].prod(1).argsort()]  # alike together: a part is sampled as finely as its largest
        parts += rows.split(_images_at_once(images, count[rows[-1]].prod().item()))
    if len(parts) == 1:
        out = _resample(images, affine, resolution, *count.amax(0).tolist())
    else:
        out = torch.empty(len(images), 3, resolution, resolution, device=device)
        for part in parts:
            rows = part.to(device)
            out[rows] = _resample(images[rows], affine[rows], resolution, *count[part].amax(0).tolist())
    colours = {name: params[name].to(device, non_blocking=True) for name in COLOURS if name in params}
    return _colour(out, colours) if colours else out


def _padded_side(images):
    return 1 << (max(images.shape[-2:]) - 1).bit_length()


def _images_at_once(images, samples):
    """How many images a CPU resamples together, so that they stay in its caches; a GPU takes all.

    1.8 times as fast for 16 images of 176 px to 96 px.
    """
    if images.device.type != "cpu":
        return len(images)
    pixels = _padded_side(images) ** 2 + samples
    return max(1, PIXELS_A_CORE // pixels) * torch.get_num_threads()  # grid_sample gives each thread whole images


def _pad_to_power_of_two(images):
    """(B, 3, H, W) uint8 -> (B, 3, P, P) float32.

    `grid_sample` wants positions in units of the padded side.  With that side a power of two and positions rounded to
    1/1024 pixel its float32 arithmetic is exact, so the padding (which other images of the batch decide) leaves no
    trace in the result.
    """
    (height, width), side = images.shape[-2:], _padded_side(images)
    return F.pad(images, (0, side - width, 0, side - height)).float()


def _grid_positions(along_x, along_y, shift, size, side):
    """One coordinate of grid_sample's positions, (B, S_y, S_x) of the padded side.

    It is along_x (B, 1, S_x) + along_y (B, S_y, 1) + shift, relative to the image.
    In place, for the passes over memory, not the arithmetic, are what it costs.  Scaling by powers of two is exact.
    """
    grid = along_x + along_y
    grid += shift
    grid += 1
    grid *= size * (POSITION_STEPS / 2)  # steps from the source's edge
    grid -= POSITION_STEPS / 2  # from the centre of its pixel 0
    grid.round_()
    grid += POSITION_STEPS / 2
    grid *= 2 / (POSITION_STEPS * side)
    return grid.sub_(1)


def _shrink(samples, count, resolution):
    """Rows (B, 3, S, W), of which each image has its own first `count` (B,), resized to (B, 3, R, W) by a triangle.

    It reaches count / R rows to both sides and ends with the rows, as torchvision's with antialias=True.  One product
    and one sum a tap, for a fused sum's last bit depends on the batch's size.
    """
    images, channels, most, _ = samples.shape
    if most == resolution:
        return samples
    scale = (count / resolution)[:, None]  # (B, 1)
    centre = (torch.arange(resolution, device=count.device) + 0.5) * scale  # (B, R)
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


def _resample(images, affine, resolution, most_x, most_y):
    """images: (B, 3, H, W) uint8; affine (B, 12); most: samples across and down -> (B, 3, R, R) float32 of 0..1."""
    images = _pad_to_power_of_two(images)
    side = images.shape[-1]
    *affine, count_x, count_y = affine.unbind(1)
    xx, xy, yx, yy, shift_x, shift_y, size_y, size_x, border_x, border_y = (v[:, None, None] for v in affine)
    centres = (torch.arange(most, device=images.device) * 2 + 1.0 for most in (most_x, most_y))
    x, y = (at / count[:, None] - 1 for at, count in zip(centres, (count_x, count_y)))  # (B, S), -1..1 in the output
    # past the centres of its outermost pixels a crop goes on as they are: neither black nor what was cut off
    x = torch.maximum(torch.minimum(x[:, None, :], border_x), -border_x)  # (B, 1, S_x)
    y = torch.maximum(torch.minimum(y[:, :, None], border_y), -border_y)  # (B, S_y, 1)
    grid_x = _grid_positions(xx * x, xy * y, shift_x, size_x, side)
    grid_y = _grid_positions(yx * x, yy * y, shift_y, size_y, side)
    grid = torch.stack([grid_x, grid_y], -1)  # past the image is padding or nothing: black
    out = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    out = _shrink(_shrink(out, count_y, resolution).mT, count_x, resolution).mT
    return out.contiguous() * (1 / 255)


def _blend(images, other, factor):
    factor = factor[:, None, None, None]
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def _grey(images):
    """(B, 3, H, W) -> (B, 1, H, W), ITU-R 601 weights as in torchvision."""
    return 0.2989 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def _colour(images, params):
    """Brightness, contrast, saturation, hue, in this order; images (B, 3, R, R) in 0..1."""
    if "brightness" in params:
        images = (images * params["brightness"][:, None, None, None]).clamp(0, 1)
    if "contrast" in params:  # the mean is summed in integers: a float sum's last bit depends on the batch's size
        grey = torch.round(_grey(images) * 2**20).long().flatten(1)
        mean = (grey.sum(1).double() / (grey.shape[1] * 2**20)).float()
        images = _blend(images, mean[:, None, None, None], params["contrast"])
    if "saturation" in params:
        images = _blend(images, _grey(images), params["saturation"])
    if "hue" in params:
        images = _turn_hue(images, params["hue"])
    return images


def _turn_hue(images, turn):
    """Turn the hue of (B, 3, R, R) images by (B,) turns, through HSV."""
    value, low = images.amax(1), images.amin(1)  # (B, R, R)
    chroma = value - low
    r, g, b = images.unbind(1)
    span = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sextant = torch.where(value == r, (g - b) / span, torch.where(value == g, (b - r) / span + 2, (r - g) / span + 4))
    sextant = sextant + turn[:, None, None] * 6
    channels = []
    for offset in (5, 3, 1):  # red, green, blue of an HSV colour: value - chroma * clamp(min(k, 4 - k), 0, 1)
        k = torch.remainder(sextant + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    turned = torch.stack(channels, 1).clamp(0, 1)
    return torch.where(turn[:, None, None, None] == 0, images, turned)  # view 0 to the last bit


def normalize(images: Tensor, mean: list | Tensor, std: list | Tensor) -> Tensor:
    """(B, 3, R, R) in 0..1 -> zero mean and unit variance by channel; mean, std: three numbers each, or tensors."""
    mean, std = (torch.as_tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (mean, std))
    return (images - mean) / std


class Augmenter:
    """A policy and a seed, applied to raw batches; stream: 0 of the view itself, others of its local crops.

    `augmenter(batch, resolution)` -> (B, 3, R, R) float32 in 0..1.  batch: `image` (B, 3, H, W) uint8 on the model's
    device; `size` (B, 2), `key` (B,), `view` (B,) int64 on the CPU.
    """

    def __init__(self, policy: Policy, seed: int, stream: int = 0):
        self.policy, self.seed, self.stream = policy, seed, stream

    def __call__(self, batch: dict, resolution: int) -> Tensor:
        rendered = batch.get("pixels")  # teacher and student of one resolution share the work
        if rendered is None or rendered["view"] is not batch["view"]:  # a copy of the batch may have another view
            rendered = batch["pixels"] = {"view": batch["view"]}
        key = (self.policy, self.seed, self.stream, resolution)
        if key not in rendered:
            params = sample_parameters(self.policy, self.seed, batch["view"], batch["key"], batch["size"], self.stream)
            rendered[key] = render(batch["image"], batch["size"], params, resolution)
        return rendered[key]
