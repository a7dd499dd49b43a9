"""Local web page to try a classifier: upload an image, see its prediction, heat map and nearest training images."""

from __future__ import annotations

import base64
import contextlib
import html
import importlib.util
import io
import os
import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.data.image_io import read_image
from project.data.transforms import evaluation
from project.errors import ConfigError, DataError, ModelError, ProjectError
from project.features.provider import RowProvider
from project.inference.gallery import Gallery, data_of
from project.inference.heatmap_overlay import overlay
from project.inference.predictor import FALSE_ALARMS, Classifier
from project.runtime.console import print_rank_zero
from project.runtime.process_state import process_state

HOST = "127.0.0.1"
NEAREST = 6  # training images
TOP_CLASSES = 5
COVERAGE = 0.95  # of the set of classes
THUMBNAIL_SIZE = 240  # pixels of the longer side
STYLE = """
.gradio-container {max-width: 1000px !important; margin: auto}
footer {display: none !important}
.gradio-container .prose h1 {font-size: 20px}
.figures {display: grid; gap: 12px; margin: 4px 0 16px}
.figures.large {grid-template-columns: repeat(2, minmax(0, 360px))}
.figures.small {grid-template-columns: repeat(6, minmax(0, 150px)); font-size: 85%}
.figures figure {margin: 0; text-align: center; overflow-wrap: anywhere}
.figures img {width: 100%; object-fit: contain; border-radius: 4px}
.figures.small img {aspect-ratio: 1}
@media (max-width: 480px) {.figures.small {grid-template-columns: repeat(3, minmax(0, 1fr))}}
"""


class Result(NamedTuple):
    """Output of the page for one file.

    Attributes:
        probabilities: Probability by class name; ``None`` if the file is not an image.
        html: Predicted class, calibrated answers, network input, heat map and nearest training images; or the error.
    """

    probabilities: dict[str, float] | None
    html: str


def classify_file(classifier: Classifier, gallery: Gallery | None, path: str | None) -> Result:
    """Classify an uploaded file, with the probabilities of ``load(...).predict_proba``.

    Args:
        classifier: The classifier.
        gallery: The training images, if available.
        path: Path of the file; ``None`` after it was removed from the page.
    """
    if path is None:
        return Result(None, "")
    try:
        image = read_image(path, evaluation(classifier.model.backbone.preprocessing).min_size)
    except DataError as error:
        return Result(None, _heading(f"{Path(path).name} {error.reason}"))
    (probabilities,) = classifier.predict_proba([image])
    (name,) = classifier.names(probabilities[None])
    (crop,) = classifier.crop([image])
    images, note = [(crop, "Network input")], ""
    try:
        (heat,) = classifier.heat_map([image])
        caption = f"Evidence for {name} (Grad-CAM)" if heat.any() else f"No region supports {name} (Grad-CAM)"
        images.append((overlay(crop, heat), caption))
    except ModelError as error:
        note = f"<p>{html.escape(str(error))}</p>"
    page = _heading(f"{name}, {probabilities.max():.1%}") + _answers(classifier, image)
    page += _figures("large", images) + note
    if gallery is not None:
        (neighbours,) = gallery.nearest(classifier.features([image]), NEAREST)
        captions = [f"{classifier.classes_[item.sample.label]} {item.similarity:.2f}" for item in neighbours]
        thumbnails = [gallery.read(item.sample) for item in neighbours]
        page += _heading("Nearest training images (cosine similarity of features)", 4)
        page += _figures("small", zip(thumbnails, captions, strict=True))
    return Result(dict(zip(classifier.classes_, probabilities.tolist(), strict=True)), page)


def _answers(classifier: Classifier, image: Image.Image) -> str:
    """How far to rely on the prediction, as HTML; empty if the checkpoint has no calibrated answers."""
    answers = classifier.model.answers
    if answers is None:
        return ""
    limits = answers.reported_limits()
    coverage = COVERAGE if COVERAGE in limits.coverages else None
    false_alarms = FALSE_ALARMS if FALSE_ALARMS in limits.false_alarms else None
    max_error = min(limits.max_errors, default=None)
    (answer,) = classifier.answer([image], coverage, max_error, false_alarms)
    lines = [f"Calibrated probability: {answer.probability:.1%}"]
    if answer.known is not None:
        lines.append(f"Known: {_yes_or_no(answer.known)} (at most {false_alarms:.0%} false alarms)")
    if answer.classes is not None:
        lines.append(f"Set: {', '.join(answer.classes)} ({coverage:.0%} of such sets contain the right class)")
    if answer.answered is not None:
        lines.append(f"Answered: {_yes_or_no(answer.answered)} (at most {max_error:.0%} of such answers are wrong)")
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def _figures(kind: str, images: Iterable[tuple[Image.Image, str]]) -> str:
    """Images with captions as self-contained HTML."""
    figures = []
    for image, caption in images:
        if kind == "small":
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        png = io.BytesIO()
        image.save(png, "PNG")
        data, text = base64.b64encode(png.getvalue()).decode(), html.escape(caption)
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )
    return f'<div class="figures {kind}">{"".join(figures)}</div>'


def require(port: int) -> None:
    """Check the requirements of the demo before weights are loaded.

    Args:
        port: Port of the page; 0 for any free port.

    Raises:
        ConfigError: gradio is not installed, or the port is invalid or in use.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("demo requires gradio. Install it: pip install 'frozen-backbone[demo]'")
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be between 0 (any free port) and 65535, not {port}.")
    _free_port(port)


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed counts as free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port}: {error.strerror}. Use another port, or --port 0 for any free port."
            ) from error
        return int(probe.getsockname()[1])


def demo(
    model: ImageClassifier,
    ckpt_path: str | None = None,
    port: int = 7860,
    open: bool = True,
    data: ImageDataModule | None = None,
    device: torch.device | None = None,
    precision: str = "32-true",
    provider: RowProvider | None = None,
) -> None:
    """Open a local web page to try the classifier on images: classes, heat map, nearest training images.

    Args:
        model: The classifier.
        ckpt_path: Checkpoint of the trained model.
        port: Port of the page on 127.0.0.1; 0 for any free port.
        open: Open the page in a browser.
        data: The training images; by default those in the config.yaml of the checkpoint's run.
        device: Device that computes missing features of the training images.
        precision: Lightning's name of the precision of these features.
        provider: Provides these features.

    Raises:
        ConfigError: ``ckpt_path`` is missing, or the port is in use.
        CheckpointError: The checkpoint is missing, damaged, unsafe, or does not match the model.
        DataError: The data's classes differ from the checkpoint's, or an image cannot be read.
    """
    if ckpt_path is None:
        raise ConfigError("demo requires a trained model: pass its checkpoint with --ckpt_path FILE.")
    checkpoint = read_checkpoint(ckpt_path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    classifier, gallery = Classifier(model), None
    explicit_data = data if data is not None and data.source is not None else None
    title, note = f"{_run_name(ckpt_path)}: {model.backbone.name}, {len(model.classes)} classes", ""
    try:
        gallery = Gallery(classifier, explicit_data or data_of(ckpt_path), "train", device, precision, provider)
    except ProjectError as error:
        if explicit_data:
            raise
        note = f"Training images are not available: {error} (pass --data.root PATH to show images)"
        print_rank_zero(f"Demo: {note}")
    serve(classifier, gallery, title, note, port, open)


def _run_name(ckpt_path: str) -> str:
    """``NAME/version_N`` of a checkpoint in a run's folder, as in TensorBoard; else the name of the file."""
    path = Path(ckpt_path).expanduser().resolve()
    return "/".join(path.parts[-4:-2]) if path.parent.name == "checkpoints" else path.stem


def serve(classifier: Classifier, gallery: Gallery | None, title: str, note: str, port: int, show: bool) -> None:
    """Serve the page until the process is interrupted.

    Args:
        classifier: The classifier.
        gallery: The training images, if available.
        title: Title of the page.
        note: Text below the title; may be empty.
        port: Port on the loopback interface; 0 for any free port.
        show: Open the page in a browser.
    """
    # No telemetry, and no proxy for local requests.
    variables = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for key in ("no_proxy", "NO_PROXY"):
        variables[key] = ",".join(filter(None, [os.environ.get(key), HOST]))
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        variables["GRADIO_TEMP_DIR"] = folder  # uploads are deleted with the page
        with process_state(environment=variables), contextlib.ExitStack() as opened:
            page = _page(classifier, gallery, title, note)
            opened.callback(page.close, verbose=False)
            _, url, _ = page.launch(
                server_name=HOST,
                server_port=_free_port(port),
                share=False,
                inbrowser=show,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=[],
                enable_monitoring=False,
                max_file_size="200mb",
                css=STYLE,
            )
            print_rank_zero(f"Demo: {url} (press Ctrl-C to stop)")
            while True:
                time.sleep(0.5)


def _page(classifier: Classifier, gallery: Gallery | None, title: str, note: str) -> Any:
    import gradio as gr

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(_heading(title, 1) + (f"<p>{html.escape(note)}</p>" if note else ""))
        with gr.Row():
            # Not gr.Image, which converts images: predictions are for the file itself.
            file = gr.File(label="Image file", height=150)
            label = gr.Label(
                label="Predicted classes",
                num_top_classes=min(TOP_CLASSES, len(classifier.classes_)),
                show_heading=False,
            )
        details = gr.HTML()
        file.change(
            lambda path: classify_file(classifier, gallery, path),
            file,
            [label, details],
            api_name="look",
            show_progress="minimal",
        )
    return page
