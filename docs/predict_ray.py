"""Classify images on a Ray cluster; needs the extra ``ray``.

python predict_ray.py best.ckpt new/ predictions/

The output is a folder of Parquet files with the columns path, predicted, probability and error.
"""

import sys

import numpy as np
import ray
from PIL import Image

from project import load
from project.data.image_io import decode_image
from project.errors import DataError


class Predict:
    """Loads the checkpoint once in each worker, and predicts batches."""

    def __init__(self, checkpoint: str) -> None:
        self.classifier = load(checkpoint)  # device="cuda" with num_gpus=1 below

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Predict the images with the given bytes."""
        errors = [""] * len(batch["path"])
        images = [Image.new("RGB", (1, 1))] * len(errors)
        for index, (path, content) in enumerate(zip(batch["path"], batch["bytes"], strict=True)):
            try:
                images[index] = decode_image(content, path)
            except DataError as error:
                errors[index] = str(error)
        probabilities = self.classifier.predict_proba(images)
        readable = np.array([not error for error in errors])
        return {
            "path": batch["path"],
            "predicted": np.where(readable, self.classifier.names(probabilities), ""),
            "probability": np.where(readable, probabilities.max(1), np.nan),
            "error": np.array(errors),
        }


def main(checkpoint: str, images: str, output: str) -> None:
    """Predict a folder of images."""
    files = ray.data.read_binary_files(images, include_paths=True)
    files.map_batches(
        Predict, fn_constructor_args=(checkpoint,), batch_size=64, num_cpus=1, concurrency=(1, 64)
    ).write_parquet(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
