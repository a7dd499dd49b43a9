"""Classify images with an exported ONNX file; needs onnxruntime, Pillow and numpy.

python run_onnx.py model.onnx a.jpg b.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
classes, side = np.array(metadata["classes"]), 2 * metadata["preprocessing"]["resize"]
for path in sys.argv[2:]:
    image = Image.open(path)
    image.draft("RGB", (side, side))  # decodes a large JPEG at a fraction of its size, as this project does
    if image.mode.startswith(("I", "F")):
        sys.exit(f"{path}: this example reads 8 bits per channel only")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    p, *further = (output[0] for output in session.run(None, {"images": np.asarray(image)[None]}))
    best, order = p.argmax(), np.argsort(-p, kind="stable")
    print(path, classes[best], f"{p[best]:.4f}")
    if answers := metadata.get("answers"):  # calibrated by fit: see "When to rely on an answer" in recipes.md
        calibrated, distance = further
        print(f"  calibrated probability: {calibrated[best]:.4f}")
        before = p[order].cumsum(dtype=float) - p[order]  # sum of the more probable classes
        for coverage, threshold in answers["sets"].items():
            print(f"  set for coverage {coverage}: {' | '.join(classes[order[before <= threshold]])}")
        for error, threshold in answers["answered"].items():
            print(f"  answered for error {error}: {p[best] >= threshold}")
        for rate, thresholds in answers["known"].items():
            print(f"  known for {rate} false alarms: {distance <= thresholds[best]}")
