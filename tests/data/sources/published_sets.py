"""Small imitations of published data sets, in the layout of torchvision's downloads."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision.datasets import CIFAR10, Flowers102

from tests.conftest import draw

BREEDS = ("Abyssinian", "american_bulldog", "Bengal")


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar10(root: Path, patch: pytest.MonkeyPatch) -> None:
    """CIFAR10: 50 training and 10 test images of 10 classes. Checksums are patched."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = np.random.default_rng(number).integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(np.roll(range(10), number).tolist())}))
        sums[name] = _md5(folder / name)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {i}" for i in range(10)]}))
    patch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name, _ in CIFAR10.train_list])
    patch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name, _ in CIFAR10.test_list])
    patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": _md5(folder / "batches.meta")})


def pets(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Oxford-IIIT Pet: 3 breeds with 10 images in trainval and 2 in test."""
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (("trainval", range(10)), ("test", range(10, 12))):
        lines = []
        for label, breed in enumerate(BREEDS):
            for number in numbers:
                draw(folder / "images" / f"{breed}_{number}.jpg", (80 * label, 100, 100), 20 * label + number)
                lines.append(f"{breed}_{number} {label + 1} 1 1\n")
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))


def flowers(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Flowers102: 102 classes with one image in each split. Checksums are patched."""
    folder = root / "flowers-102"
    for number in range(1, 307):
        draw(folder / "jpg" / f"image_{number:05d}.jpg", (number % 250, 100, 100), number)
    savemat(folder / "imagelabels.mat", {"labels": np.tile(np.arange(1, 103), 3)[None]})
    numbers = np.arange(1, 307).reshape(3, 1, 102)
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), numbers, strict=True)))
    files = {"label": "imagelabels.mat", "setid": "setid.mat"}
    sums = {key: (name, _md5(folder / name)) for key, name in files.items()}
    patch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **sums})


def eurosat(root: Path, patch: pytest.MonkeyPatch) -> None:
    """EuroSAT: 3 classes with 12 images, without splits."""
    for label, name in enumerate(("AnnualCrop", "Forest", "River")):
        for number in range(12):
            draw(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", (90 * label, 90, 90), 20 * label + number)


def food101(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Food101: 2 classes with 4 images in train and 2 in test."""
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        listed = {dish: [f"{dish}/{number}" for number in numbers] for dish in ("sushi", "apple_pie")}
        for seed, name in enumerate(name for names in listed.values() for name in names):
            draw(folder / "images" / f"{name}.jpg", (100, 30 * seed, 100), seed)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
