"""Classify images with an exported ONNX file; needs onnxruntime, Pillow and numpy.

python run_onnx.py model.onnx a.jpg b.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
classes = json.loads(metadata["classes"])
side = 2 * json.loads(metadata["preprocessing"])["resize"]
for path in sys.argv[2:]:
    image = Image.open(path)
    image.draft("RGB", (side, side))  # decodes a large JPEG at a fraction of its size, as this project does
    image = ImageOps.exif_transpose(image).convert("RGB")
    (probabilities,) = session.run(None, {"images": np.asarray(image)[None]})[0]
    best = int(probabilities.argmax())
    print(path, classes[best], f"{probabilities[best]:.4f}")
