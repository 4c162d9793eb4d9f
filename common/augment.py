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

import torch
import torch.nn.functional as F

CROPS = ("none", "pad", "resized")
COLOURS = ("brightness", "contrast", "saturation", "hue")
POSITION_STEPS = 1024  # source positions are rounded to 1/1024 pixel, see `render`


class PolicyError(ValueError):
    """An augmentation setting out of its range (a user's mistake)."""

    exit_code = 2


@dataclass(frozen=True)
class Policy:
    """What is drawn for a view.  Probabilities and strengths as in torchvision; 0, "none" and (1, 1) are off."""

    crop: str = "none"  # "pad": shift by whole source pixels, up to padding * side; "resized": random resized crop
    padding: float = 0.125  # share of the side: 4 pixels of 32
    crop_scale: tuple = (0.25, 1.0)  # area of the resized crop, share of the image; aspect ratio 3/4 to 4/3
    hflip: float = 0.0  # probability
    vflip: float = 0.0  # probability
    rotation: float = 0.0  # degrees, uniform in +-rotation
    scale: tuple = (1.0, 1.0)  # zoom about the centre, uniform; above 1 enlarges
    brightness: float = 0.0  # factor uniform in 1 +- brightness
    contrast: float = 0.0  # the same
    saturation: float = 0.0  # the same
    hue: float = 0.0  # uniform in +-hue turns of the colour circle, at most 0.5

    def __post_init__(self):
        if self.crop not in CROPS:
            raise PolicyError(f"--crop {self.crop} is none of {', '.join(CROPS)}")
        for name in ("padding", "hflip", "vflip", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise PolicyError(f"--{name} {getattr(self, name)} is not in 0 to 1")
        if not 0 <= self.hue <= 0.5:
            raise PolicyError(f"--hue {self.hue} is not in 0 to 0.5")
        if not 0 <= self.rotation <= 180:
            raise PolicyError(f"--rotation {self.rotation} is not in 0 to 180 degrees")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise PolicyError(f"--scale {self.scale[0]} {self.scale[1]} must be positive and ascend")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise PolicyError(f"--crop-scale {self.crop_scale[0]} {self.crop_scale[1]} must ascend within 0 to 1")

    def to_dict(self):
        """Plain types, for a checkpoint or a store's meta."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values):
        known = {f.name for f in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


# ---------------------------------------------------------------------------------------------- counter-based random


def hash_id(sample_id):
    """64-bit key of a sample's id (str) as a signed int: BLAKE2b, so that an added file shifts no other sample."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "little", signed=True)


def _signed(value):
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x):
    """Finalizer of splitmix64 (Steele et al. 2014) on int64 tensors, whose products wrap as unsigned ones do."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)  # >> keeps the sign: mask it away
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(seed, view, stream, key, count=1):
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


def sample_parameters(policy, seed, view, key, sizes, stream=0):
    """Draw what happens to each sample of a batch; a few numbers a sample, computed on the CPU.

    view: (B,) int64, 0 gives the plain image; key: (B,) int64; sizes: (B, 2) height and width in pixels; all on the
    CPU.  Returns a dict of tensors, relative so that they serve any resolution: `matrix` (B, 2, 2) and `shift` (B, 2)
    float32 map output positions (x, y in -1..1) to source positions of that range, `extent` (B,) float64 is the
    longest side of the crop in source pixels, and, where the policy has colour, `brightness`, `contrast`,
    `saturation`, `hue` (B,) float32.
    """
    u = uniform(seed, view, stream, key, 12).unbind(1)  # always twelve, so that a flag changes its own draw alone
    plain = torch.as_tensor(view) == 0
    height, width = sizes.double().unbind(1)
    one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])

    # output -> source: flip, zoom and rotation about the centre, then the crop's place and size
    flip_x = torch.where(u[0] < policy.hflip, -one, one)
    flip_y = torch.where(u[1] < policy.vflip, -one, one)
    angle = (u[2] * 2 - 1) * math.radians(policy.rotation)
    zoom = policy.scale[0] + u[3] * (policy.scale[1] - policy.scale[0])
    crop_w, crop_h, centre_x, centre_y = one, one, zero, zero
    if policy.crop == "pad":  # whole pixels of the source, so that a shift alone does not blur
        reach_x, reach_y = (policy.padding * width).round(), (policy.padding * height).round()
        centre_x = (torch.floor(u[4] * (2 * reach_x + 1)) - reach_x) * 2 / width
        centre_y = (torch.floor(u[5] * (2 * reach_y + 1)) - reach_y) * 2 / height
    elif policy.crop == "resized":
        area = policy.crop_scale[0] + u[6] * (policy.crop_scale[1] - policy.crop_scale[0])
        ratio = torch.exp((u[7] * 2 - 1) * math.log(4 / 3)) * height / width  # pixels' aspect, in relative units
        crop_w, crop_h = torch.sqrt(area * ratio).clamp(max=1), torch.sqrt(area / ratio).clamp(max=1)
        centre_x, centre_y = (u[4] * 2 - 1) * (1 - crop_w), (u[5] * 2 - 1) * (1 - crop_h)

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
    identity = torch.eye(2, dtype=torch.float64)
    params = {  # computed in float64: the same bits in any batch after rounding
        "matrix": torch.where(plain[:, None, None], identity, matrix).float(),
        "shift": torch.where(plain[:, None], torch.zeros_like(shift), shift).float(),
        "extent": torch.maximum(width * torch.where(plain, one, crop_w / zoom), height * torch.where(plain, one, crop_h / zoom)),
    }
    for i, name in ((8, "brightness"), (9, "contrast"), (10, "saturation")):
        if getattr(policy, name):
            params[name] = torch.where(plain, one, 1 + (u[i] * 2 - 1) * getattr(policy, name)).float()
    if policy.hue:
        params["hue"] = torch.where(plain, zero, (u[11] * 2 - 1) * policy.hue).float()
    return params


# ------------------------------------------------------------------------------------------------------------- render


def antialiasing(extent, resolution):
    """How a crop of `extent` (B,) source pixels is filtered at `resolution`: (B,) int64, 2 * k + (passes == 2).

    k x k fine samples (k odd) an output pixel, pooled once or twice.  Up to 1.1 source pixels an output pixel plain
    bilinear is as good; below 2 one pooling, from there on two (a triangle) come nearest to torchvision's filter.
    """
    shrink = extent / resolution
    k = 2 * torch.ceil((shrink - 1) / 2 - 1e-9) + 1
    k = torch.where(shrink <= 1.1, torch.ones_like(k), k).long()
    return 2 * k + (shrink >= 2).long()


def render(images, sizes, params, resolution):
    """Resample and colour a batch once.

    images: (B, 3, H, W) uint8 on the model's device, each image in the top left corner; sizes: (B, 2) on the CPU,
    each one's height and width in pixels; params: from `sample_parameters`.  Returns (B, 3, R, R) float32 in 0..1.
    Outside of the image is black.  Where the image shrinks it is sampled finer and average-pooled, else it is
    bilinear; the reference is torchvision with antialias=True.
    """
    device, images = images.device, _pad_to_power_of_two(images)
    code = antialiasing(params["extent"], resolution)
    affine = torch.cat([params["matrix"].flatten(1), params["shift"], sizes.float()], 1)  # (B, 8), one transfer
    affine = affine.to(device, non_blocking=True)
    codes = code.unique().tolist()
    if len(codes) == 1:
        out = _resample(images, affine, resolution, codes[0] // 2, 1 + codes[0] % 2)
    else:
        out = torch.empty(len(images), 3, resolution, resolution, device=device)
        for c in codes:
            rows = (code == c).nonzero()[:, 0].to(device)
            out[rows] = _resample(images[rows], affine[rows], resolution, c // 2, 1 + c % 2)
    colours = {name: params[name].to(device, non_blocking=True) for name in COLOURS if name in params}
    return _colour(out, colours) if colours else out


def _pad_to_power_of_two(images):
    """(B, 3, H, W) uint8 -> (B, 3, P, P) float32.

    `grid_sample` wants positions in units of the padded side.  With that side a power of two and positions rounded to
    1/1024 pixel its float32 arithmetic is exact, so the padding (which other images of the batch decide) leaves no
    trace in the result.
    """
    height, width = images.shape[-2:]
    side = 1 << (max(height, width) - 1).bit_length()
    if (height, width) == (side, side):
        return images.float()
    return F.pad(images.float(), (0, side - width, 0, side - height))


def _resample(images, affine, resolution, k, passes):
    """images: (B, 3, P, P) float32 of 0..255; affine (B, 8) -> (B, 3, R, R) float32 of 0..1."""
    side, reach = images.shape[-1], (k - 1) // 2 if passes == 2 else 0
    fine = torch.arange(-reach, resolution * k + reach, device=images.device, dtype=torch.float32)
    fine = (2 * fine + 1) / (resolution * k) - 1  # centres of the fine pixels, -1..1 in the output
    x, y = fine[None, None, :], fine[None, :, None]
    xx, xy, yx, yy, shift_x, shift_y, size_y, size_x = (v[:, None, None] for v in affine.unbind(1))
    # relative -> pixels of the source, where pixel 0 has its centre at 0; (B, S, S)
    source_x = ((xx * x + xy * y + shift_x + 1) * size_x - 1) / 2
    source_y = ((yx * x + yy * y + shift_y + 1) * size_y - 1) / 2
    source_x = torch.round(source_x * POSITION_STEPS) / POSITION_STEPS
    source_y = torch.round(source_y * POSITION_STEPS) / POSITION_STEPS
    # taps of the second pooling past a plain image's border must not see black: hold the border that far
    edge_x, edge_y = size_x * reach / (resolution * k), size_y * reach / (resolution * k)
    inside = (source_x >= -0.5 - edge_x) & (source_x <= size_x - 0.5 + edge_x)
    inside &= (source_y >= -0.5 - edge_y) & (source_y <= size_y - 0.5 + edge_y)
    grid_x = (2 * torch.minimum(source_x.clamp(min=0), size_x - 1) + 1) / side - 1
    grid_y = (2 * torch.minimum(source_y.clamp(min=0), size_y - 1) + 1) / side - 1
    out = F.grid_sample(images, torch.stack([grid_x, grid_y], -1), mode="bilinear", align_corners=False)
    out = out * inside[:, None]
    if passes == 2:
        out = F.avg_pool2d(out, k, stride=1)
    if k > 1:
        out = F.avg_pool2d(out, k, stride=k)
    return out * (1 / 255)


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
    return torch.stack(channels, 1).clamp(0, 1)


def normalize(images, mean, std):
    """(B, 3, R, R) in 0..1 -> zero mean and unit variance by channel; mean, std: three numbers each, or tensors."""
    mean, std = (torch.as_tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (mean, std))
    return (images - mean) / std


class Augmenter:
    """A policy and a seed, applied to raw batches.

    `augmenter(batch, resolution)` -> (B, 3, R, R) float32 in 0..1.  batch: `image` (B, 3, H, W) uint8 on the model's
    device; `size` (B, 2), `key` (B,), `view` (B,) int64 on the CPU.
    """

    def __init__(self, policy, seed):
        self.policy, self.seed = policy, seed

    def __call__(self, batch, resolution):
        pixels = batch.setdefault("pixels", {})  # teacher and student of one resolution share the work
        if resolution not in pixels:
            params = sample_parameters(self.policy, self.seed, batch["view"], batch["key"], batch["size"])
            pixels[resolution] = render(batch["image"], batch["size"], params, resolution)
        return pixels[resolution]
