"""DICOM files wherever an image is read, against values worked out by hand from PS3.3 C.11 and C.7.6.3."""

import io
import json

import numpy as np
import pytest
from conftest import SMALL, run_script, succeed
from PIL import Image

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, generate_uid  # noqa: E402

from common.data import DataError, load_splits, read_image  # noqa: E402

RAMP = np.arange(64).reshape(8, 8)  # stored values 0 to 63


def write(path, array, photometric="MONOCHROME2", bits=8, syntax=ExplicitVRLittleEndian, **elements):
    """A DICOM file; array: (H, W), (H, W, 3) or (F, H, W) of the stored type."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
    colour = array.shape[-1] == 3
    data.Rows, data.Columns = array.shape[-3:-1] if colour else array.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * array.dtype.itemsize, bits, bits - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    if array.ndim == 3 and not colour:
        data.NumberOfFrames = len(array)
    for name, value in elements.items():
        setattr(data, name, value)
    data.PixelData = array.tobytes()
    data["PixelData"].VR = "OW" if array.dtype.itemsize > 1 else "OB"
    if syntax == RLELossless:
        data.compress(RLELossless)
    elif syntax == JPEGBaseline8Bit:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=100, subsampling=0)
        data.PixelData, data.file_meta.TransferSyntaxUID = encapsulate([file.getvalue()]), syntax
    data.save_as(path, enforce_file_format=True)
    return path


def grey(path, **options):
    image = read_image(path, **options)
    assert image.dtype == np.uint8 and (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all()
    return image[..., 0]


def test_eight_bits_are_shown_as_they_are(tmp_path):
    stored = (RAMP * 4).astype(np.uint8)
    assert (grey(write(tmp_path / "a.dcm", stored)) == stored).all()
    assert (grey(write(tmp_path / "b.dcm", stored, "MONOCHROME1")) == 255 - stored).all()
    assert (grey(write(tmp_path / "c.dcm", stored, syntax=RLELossless)) == stored).all()


def test_fewer_bits_fill_the_range(tmp_path):
    found = grey(write(tmp_path / "a.dcm", RAMP.astype(np.uint8), bits=6))
    assert (found == np.rint(RAMP * 255 / 63)).all()


@pytest.mark.parametrize("dtype, bits", [(np.uint16, 12), (np.uint16, 16), (np.int16, 16), (np.int16, 12)])
def test_slope_intercept_and_the_window_of_the_file(tmp_path, dtype, bits):
    """PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5) of the range, x being slope * stored + intercept."""
    stored = (RAMP * 30 - (900 if dtype == np.int16 else 0)).astype(dtype)
    elements = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    found = grey(write(tmp_path / "a.dcm", stored, bits=bits, **elements))
    for row, column in [(0, 0), (3, 5), (4, 2), (4, 4), (5, 0), (7, 7)]:
        x = 2 * int(stored[row, column]) - 1024
        expected = 255 * min(1, max(0, (x - 39.5) / 399 + 0.5))
        assert abs(found[row, column] - expected) <= 0.5001, (row, column)
    assert len(np.unique(found)) > 5
    inverted = grey(write(tmp_path / "b.dcm", stored, "MONOCHROME1", bits=bits, **elements))
    assert np.abs(inverted.astype(int) + found - 255).max() <= 1


def test_a_narrow_window_ends_at_the_centres_of_pixels(tmp_path):
    """PS3.3 C.11.2.1.2.1: c 32, w 8 shows 28 (0) to 35 (255) in seven steps, not in eight."""
    path = write(tmp_path / "a.dcm", RAMP.astype(np.uint8), bits=6, WindowCenter=32, WindowWidth=8)
    found = grey(path).ravel()
    assert found[:29].max() == 0 and found[35:].min() == 255
    assert found[28:36].tolist() == np.rint(np.arange(8) * 255 / 7).tolist()


@pytest.mark.parametrize(
    "function, expected",
    [
        ("LINEAR_EXACT", lambda x: np.clip((x - 1000) / 800 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 1000) / 800))),
    ],
)
def test_other_functions_of_the_window(tmp_path, function, expected):
    stored = (RAMP * 30).astype(np.uint16)
    elements = {"WindowCenter": [1000, 7], "WindowWidth": [800, 7], "VOILUTFunction": function}  # the first counts
    found = grey(write(tmp_path / "a.dcm", stored, bits=12, **elements))
    assert np.abs(found - 255 * expected(stored.astype(float))).max() <= 0.5001


def test_a_table_in_place_of_a_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [64, 0, 8], np.array([255 - 3 * v for v in range(64)], "<u2").tobytes()
    found = grey(write(tmp_path / "a.dcm", RAMP.astype(np.uint16), bits=12, VOILUTSequence=[table]))
    assert (found == 255 - 3 * RAMP).all()


def test_a_window_that_is_given_wins(tmp_path):
    stored = (RAMP * 30).astype(np.uint16)
    rescaled = {"RescaleSlope": 1, "RescaleIntercept": -100}
    path = write(tmp_path / "a.dcm", stored, bits=12, WindowCenter=40, WindowWidth=400, **rescaled)
    assert (grey(path, window=(0, 1000)) == np.rint(255 * np.clip((stored - 100.0) / 1000, 0, 1))).all()


def test_twelve_bits_without_a_window_are_refused(tmp_path):
    path = write(tmp_path / "a.dcm", (RAMP * 30).astype(np.uint16), bits=12)
    with pytest.raises(DataError, match=r"a.dcm has grey levels from 0 to 1890 .*--window LOW HIGH"):
        read_image(path)


def test_colours(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert (read_image(write(tmp_path / "rgb.dcm", rgb, "RGB")) == rgb).all()
    smooth = np.stack([RAMP * 3, RAMP * 2, 255 - RAMP], -1).astype(np.uint8)
    y = np.rint(smooth @ [0.299, 0.587, 0.114])  # PS3.3 C.7.6.3.1.2
    cb = np.rint(smooth @ [-0.1687, -0.3313, 0.5]) + 128
    cr = np.rint(smooth @ [0.5, -0.4187, -0.0813]) + 128
    stored = np.stack([y, cb, cr], -1).clip(0, 255).astype(np.uint8)
    assert np.abs(read_image(write(tmp_path / "y.dcm", stored, "YBR_FULL")).astype(int) - smooth).max() <= 3
    jpeg = read_image(write(tmp_path / "j.dcm", smooth, "YBR_FULL", syntax=JPEGBaseline8Bit))
    assert np.abs(jpeg.astype(int) - smooth).mean() < 3
    palette = {}
    for name, values in (("Red", range(64)), ("Green", range(63, -1, -1)), ("Blue", [7] * 64)):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [64, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = np.array([v * 257 for v in values], "<u2").tobytes()
    found = read_image(write(tmp_path / "p.dcm", RAMP.astype(np.uint8), "PALETTE COLOR", **palette))
    assert (found == np.stack([RAMP, 63 - RAMP, np.full_like(RAMP, 7)], -1)).all()


def test_frames(tmp_path):
    stored = np.stack([np.full((8, 8), 10 * i, np.uint8) for i in range(5)])
    path = write(tmp_path / "a.dcm", stored)
    assert (grey(path) == 20).all() and (grey(path, frame=0) == 0).all() and (grey(path, frame=4) == 40).all()
    with pytest.raises(DataError, match="--frame 5: .*a.dcm has 5 frames"):
        read_image(path, frame=5)


def test_a_file_without_an_ending_and_one_that_is_none(tmp_path):
    stored = (RAMP * 4).astype(np.uint8)
    assert (grey(write(tmp_path / "IM-0001", stored)) == stored).all()
    assert (grey(write(tmp_path / "1.2.840.77", stored)) == stored).all()
    (tmp_path / "broken.dcm").write_bytes(b"no image")
    for name in ("broken.dcm", "missing.dcm"):
        with pytest.raises(DataError, match=f"cannot read image .*{name}"):
            read_image(tmp_path / name)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """Two classes of DICOM files, 80 of train and 24 of test, each patient with four of one class."""
    root, draw = tmp_path_factory.mktemp("hospital"), np.random.default_rng(0)
    for number in range(104):
        label, patient, split = number // 4 % 2, number // 4, "train" if number < 80 else "test"
        pixels = np.clip(draw.normal(900 + 400 * label, 200, (3, 16, 16)), 0, 4000).astype(np.uint16)
        folder = root / split / ("healthy", "ill")[label]
        folder.mkdir(parents=True, exist_ok=True)
        elements = {"PatientID": f"P-{patient}", "PatientName": "Doe^Jane", "WindowCenter": 1100, "WindowWidth": 1500}
        write(folder / f"{number:03d}.dcm", pixels, bits=12, **elements)
    return root


def test_patients_stay_together_and_are_not_named(hospital, tmp_path):
    flags = ["--dataset", "imagefolder", "--data-root", hospital, "--resolution", 16, "--batch-size", 8, "--epochs", 1]
    flags += ["--model", "vit_6_192", "--device", "cpu", "--folds", 4, "--fold", 1, "--output", tmp_path / "run"]
    splits = load_splits("imagefolder", str(hospital), folds=4, fold=1, group_by_patient=True)
    patients = {split: {int(i.split("/")[-1][:3]) // 4 for i in part.ids} for split, part in splits.parts.items()}
    assert not patients["train"] & patients["val"] and len(patients["val"]) == 5
    assert len(set(splits.train.groups) | set(splits.val.groups)) == 20
    alone = load_splits("imagefolder", str(hospital), folds=4, fold=1)
    assert alone.val.groups is None
    done = run_script("train_student.py", *flags, "--group-by-patient")
    assert done.returncode == 0, done.stderr
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").iterdir()) + done.stdout.encode()
    assert b"Doe" not in written and b"P-1" not in written


def test_the_flags_reach_training_prediction_and_stores(hospital, tmp_path):
    flags = ["--dataset", "imagefolder", "--data-root", hospital, "--resolution", 16, "--batch-size", 8, "--epochs", 1]
    for name, more in (("run", []), ("other", ["--frame", 0])):
        run = tmp_path / name
        succeed("train_student.py", *flags, *more, "--device", "cpu", "--model", "vit_6_192", "--output", run)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text())[0]["train_loss"] for name in ("run", "other")]
    assert metrics[0] != metrics[1]
    tables = []
    for number, more in enumerate(([], ["--frame", 0], ["--window", 0, 500])):
        target = tmp_path / f"{number}.csv"
        common = ["--predict", hospital / "train" / "ill", "--device", "cpu", "--workers", 0, "--output", target]
        succeed("evaluate.py", tmp_path / "run" / "best.pth", *common, *more)
        tables.append(target.read_text())
    assert len(set(tables)) == 3
    stores = []
    for name, more in (("s0", []), ("s1", ["--frame", 0])):
        common = ["--checkpoint", tmp_path / "run" / "best.pth", "--images", hospital, "--device", "cpu"]
        succeed("extract_embeddings.py", *common, *more, "--output", tmp_path / name)
        stores.append(np.load(tmp_path / name / "images_embeddings" / "embeddings.npy"))
    assert not np.allclose(*stores)


def test_grouping_by_patient_needs_dicom(tmp_path, refused):
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            Image.fromarray((RAMP * 4).astype(np.uint8)).save(tmp_path / folder / f"{number}.png")
    flags = ["--dataset", "imagefolder", "--data-root", tmp_path, "--group-by-patient"]
    refused("train_student.py", *flags, words=["--group-by-patient is for DICOM files"])
    refused("train_student.py", *SMALL, "--group-by-patient", words=["--group-by-patient is for DICOM files"])
