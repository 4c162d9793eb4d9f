"""DICOM files as 8-bit images, and whose they are.  Needs augment.py and run.py of `common`, numpy, pillow and pydicom.

    image = dicom_image("IM-0001", window=(-160, 240))     # a Pillow image, L or RGB

Grey levels go through the rescale slope and intercept (or the modality LUT), then through the window, as DICOM PS3.3
C.11 has it; MONOCHROME1 is inverted.  Compressed files need the plugin that pydicom's message names.
"""

import os

import numpy as np
from PIL import Image

from common.augment import hash_id
from common.run import UserError, optional

SUFFIXES = (".dcm", ".dicom", ".ima")


class DicomError(UserError, ValueError):
    """A DICOM file that cannot be shown."""


def is_dicom(path: str) -> bool:
    """By the ending, or, where it is none that names an image, by the four letters behind the preamble."""
    if path.lower().endswith(SUFFIXES):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def dicom_image(path: str, window: tuple | None = None, frame: int | None = None) -> Image.Image:
    """The image of a DICOM file, 8 bits.

    window: (low, high), the levels after rescaling that become black and white; else the file's VOI LUT or its first
    window, else, of up to 8 bits, all levels.  frame: from 0; else the middle one.  Raises DicomError.
    """
    optional("pydicom", "a DICOM image")
    import pydicom
    from pydicom import pixels

    data = pydicom.dcmread(path)
    count = int(data.get("NumberOfFrames") or 1)
    if frame is not None and frame >= count:
        raise DicomError(f"--frame {frame}: {path} has {count} frames, numbered from 0")
    array = pixels.pixel_array(data, index=count // 2 if frame is None else frame)  # YBR becomes RGB
    if data.PhotometricInterpretation == "PALETTE COLOR":
        array = pixels.apply_color_lut(array, data)
        return Image.fromarray((array >> 8).astype(np.uint8) if array.dtype.itemsize > 1 else array, "RGB")
    if array.ndim == 3:
        return Image.fromarray((array >> max(0, data.BitsStored - 8)).astype(np.uint8), "RGB")
    share = grey_levels(data, pixels.apply_modality_lut(array, data), path, window)
    return Image.fromarray(
        np.rint(255 * (1 - share if data.PhotometricInterpretation == "MONOCHROME1" else share)).astype(np.uint8)
    )


def grey_levels(data, levels: np.ndarray, path: str, window: tuple | None) -> np.ndarray:
    """Rescaled levels (H, W) -> 0..1, by a window or by what the file (a pydicom Dataset) says."""
    if window:
        low, high = window
        return np.clip((levels - low) / (high - low), 0, 1)
    if data.get("VOILUTSequence"):
        from pydicom.pixels import apply_voi

        values = apply_voi(np.rint(levels).astype(np.int64), data)
        return values / (2.0 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    if data.get("WindowCenter") not in (None, ""):
        centre, width = (float(np.ravel(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        function = data.get("VOILUTFunction") or "LINEAR"
        if function == "SIGMOID":
            return 1 / (1 + np.exp(-4 * (levels - centre) / width))
        if function == "LINEAR":  # the window's ends are pixels' centres
            centre, width = centre - 0.5, max(width - 1, 1e-6)
        return np.clip((levels - centre) / width + 0.5, 0, 1)
    if data.BitsStored > 8 or levels.dtype != np.uint8:
        raise DicomError(
            f"{path} has grey levels from {levels.min():g} to {levels.max():g} and no window: say which of them are "
            "black and white with --window LOW HIGH"
        )
    return levels / (2.0**data.BitsStored - 1)


def patients(dataset) -> np.ndarray:
    """Groups of an ImageDataset, (N,) strings: a hash of the patient's id in each DICOM file, the sample's id where the
    file has none.  A patient's id is kept nowhere.  Raises UserError where no file is DICOM."""
    pydicom, groups = optional("pydicom", "--group-by-patient"), []
    paths = [os.fspath(path) for path in dataset.paths or () if isinstance(path, (str, os.PathLike))]
    if not any(map(is_dicom, paths)):
        raise UserError("--group-by-patient is for DICOM files, and these images are none")
    for name, path in zip(dataset.ids, paths):
        patient = ""
        if is_dicom(path):
            data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "IssuerOfPatientID"])
            patient = data.get("PatientID") and f"{data.get('IssuerOfPatientID', '')}/{data.PatientID}"
        groups.append(f"{hash_id(patient):x}" if patient else name)
    return np.array(groups, dtype=str)
