"""Images per second of ``predict`` with ResNet50 at 224 px, as a multiple of a torchvision script with a DataLoader.

    python -m tests.benchmarks.predict_speed --data DIR --images 2000 --rounds 3

``DIR`` contains ``*.jpg`` at any depth. The script is what the documentation of torchvision suggests:
``Resize(256)``, ``CenterCrop(224)``, a ``DataLoader`` with a worker for each core, ``inference_mode``, and a CSV file.
Both use the same weights and head; a fit of one epoch makes the checkpoint. Variants alternate within a round. The
times are those of whole processes, imports and the choice of the engine included.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.benchmarks.measure import ROOT, print_table, progress, run_module

NETWORK = ("--model.backbone", "resnet50")
#: Flags of each variant of ``predict``.
VARIANTS: dict[str, tuple[str, ...]] = {
    "predict": (),
    "predict, bf16": ("--trainer.precision", "bf16-mixed", "--features.precision", "bf16"),
    "predict, torch fp32": ("--features.engine", "torch", "--features.precision", "fp32"),
}
SCRIPT = "torchvision script"
#: Arguments: checkpoint, list of the images, output, batch size, device.
PLAIN = """
import csv, os, sys, time
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

checkpoint, names, output, batch_size, device = sys.argv[1:]
state = torch.load(checkpoint, weights_only=True)
model = models.resnet50(weights=None)
model.load_state_dict(torch.load(state["hyper_parameters"]["weights"], weights_only=True))
head = {name.removeprefix("head."): value for name, value in state["state_dict"].items() if name.startswith("head.")}
head = {("weight" if "weight" in name else "bias"): value for name, value in head.items()}
model.fc = torch.nn.Linear(2048, len(head["bias"]))
model.fc.load_state_dict(head)
model.eval().to(device)
transform = transforms.Compose([
    transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])

class Images(Dataset):
    def __init__(self, paths):
        self.paths = paths
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        return transform(Image.open(self.paths[index]).convert("RGB")), self.paths[index]

paths = open(names).read().splitlines()
loader = DataLoader(
    Images(paths), batch_size=int(batch_size), num_workers=len(os.sched_getaffinity(0)), pin_memory=device != "cpu"
)
start = time.perf_counter()
with open(output, "w", newline="") as file, torch.inference_mode():
    rows = csv.writer(file)
    rows.writerow(["path", "predicted", "probability"])
    for images, batch in loader:
        probabilities = model(images.to(device, non_blocking=True)).softmax(1)
        best = probabilities.max(1)
        for path, value, label in zip(batch, best.values.tolist(), best.indices.tolist()):
            rows.writerow([path, state["transfer"]["classes"][label], f"{value:.6f}"])
print(f"loop: {time.perf_counter() - start:.3f} s")
"""


def train(folder: Path, images: list[Path], device: str) -> Path:
    """Fit a head on ResNet50 with random weights; returns the checkpoint."""
    import torch
    from torchvision.models import resnet50

    torch.manual_seed(0)
    weights = folder / "resnet50.pth"
    torch.save(resnet50(weights=None).state_dict(), weights)
    for number, path in enumerate(images[:32]):
        link = folder / "labeled" / "ab"[number % 2] / f"{number}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    flags = [*NETWORK, "--model.weights", weights, "--trainer.max_epochs", 1, "--dashboard.figures", "false"]
    flags += ["--trainer.default_root_dir", folder / "runs", "--trainer.accelerator", device]
    run_module("project", "fit", "--data.root", folder / "labeled", *flags)
    (checkpoint,) = (folder / "runs").rglob("best.ckpt")
    return checkpoint


def read(path: Path) -> dict[str, tuple[str, float]]:
    """Predicted class and probability by path."""
    with path.open(newline="") as file:
        return {row["path"]: (row["predicted"], float(row["probability"])) for row in csv.DictReader(file)}


def run(command: list[str]) -> tuple[float, str]:
    """Seconds and output of a process.

    Raises:
        RuntimeError: It failed.
    """
    start = time.perf_counter()
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if completed.returncode:
        raise RuntimeError(completed.stdout + completed.stderr)
    return seconds, completed.stdout


def main() -> None:
    """Print a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains *.jpg files")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="batch size of all variants")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    found = sorted(options.data.resolve().rglob("*.jpg"))
    images = (found * -(-options.images // len(found)))[: options.images]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for number, path in enumerate(images):  # links, as an image that is named twice is predicted once
            link = work / "new" / f"{number // 1000:04}" / f"{number:07}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        names = work / "names.txt"
        names.write_text("\n".join(map(str, sorted((work / "new").rglob("*.jpg")))))
        checkpoint = train(work, images, options.device)
        (work / "plain.py").write_text(PLAIN)
        arguments = [checkpoint, names, work / "plain.csv", options.batch, options.device]
        commands = {SCRIPT: [sys.executable, str(work / "plain.py"), *map(str, arguments)]}
        for name, flags in VARIANTS.items():
            predict = [sys.executable, "-m", "project", "predict", "--ckpt_path", checkpoint, "--images", work / "new"]
            predict += ["--output", work / f"{name}.csv", "--data.batch_size", options.batch, *flags]
            predict += ["--trainer.accelerator", options.device, "--trainer.devices", 1]
            predict += ["--features.folder", work / "no-rows"]  # a fit would have stored some
            commands[name] = [*map(str, predict), "--trainer.enable_progress_bar", "false"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        lines: dict[str, str] = {}
        for number in range(options.rounds + 1):
            for name, command in commands.items():
                elapsed, output = run(command)
                if number > 0:  # the first round warms the file caches and measures the engines
                    seconds[name].append(elapsed)
                matched = re.search(r"^(?:Features: [^(]*|loop: .*)", output, re.MULTILINE)
                lines[name] = matched[0].strip() if matched else ""
            progress(f"round {number}: {', '.join(f'{part[-1]:.1f}' for part in seconds.values() if part)} s")
        expected = read(work / "plain.csv")
        rows = []
        for name in commands:
            ratios = [base / value for base, value in zip(seconds[SCRIPT], seconds[name], strict=True)]
            predictions = expected if name == SCRIPT else read(work / f"{name}.csv")
            same = sum(predictions[path][0] == label for path, (label, _) in expected.items())
            rate = options.images / median(seconds[name])
            ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([name, f"{rate:.0f}", ratio, f"{same} of {len(expected)}", lines[name]])
    header = ["whole process", "images/s", "times the script (min to max)", "same class", "log"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
