"""A page on this machine alone, where somebody drops a photograph and sees what a classifier makes of it."""

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
from project.errors import ConfigError, DataError, ModelError, ProjectError
from project.features.provider import RowProvider
from project.inference.gallery import Gallery, data_of
from project.inference.heatmap_overlay import overlay
from project.inference.predictor import Classifier
from project.runtime.console import print_rank_zero
from project.runtime.process_state import process_state

HOST = "127.0.0.1"
NEAREST = 6
CLASSES = 5  # the likeliest ones that are shown
THUMBNAIL = 240  # pixels of the longer side
STYLE = """
.gradio-container {max-width: 1000px !important; margin: auto}
footer {display: none !important}
.figures {display: flex; gap: 12px; flex-wrap: wrap; margin: 4px 0 16px}
.figures figure {margin: 0; text-align: center; overflow-wrap: anywhere}
.figures img {width: 100%; object-fit: contain; border-radius: 4px}
.figures.large figure {flex: 1 1 260px; max-width: 360px}
.figures.small figure {flex: 1 1 120px; max-width: 150px; font-size: 85%}
.figures.small img {height: 130px}
"""


class Answer(NamedTuple):
    """What is shown of a photograph.

    Attributes:
        probabilities: Of each class, by its name; ``None`` where the file is no image.
        shown: The predicted class, what the network gets, that with its heat map, and the training images most like it;
            or what is wrong. As HTML.
    """

    probabilities: dict[str, float] | None
    shown: str


def answer(classifier: Classifier, gallery: Gallery | None, file: str | None) -> Answer:
    """Look at a file that somebody has dropped; the answer is that of ``load(...).predict_proba``.

    Args:
        classifier: Looks at it.
        gallery: The training images, if they are there.
        file: Its path.
    """
    if file is None:
        return Answer(None, "")
    try:
        picture = read_image(file)
    except DataError as error:
        return Answer(None, _heading(f"{Path(file).name} {error.reason}"))
    (row,) = classifier.predict_proba([picture])
    (name,) = classifier.names(row[None])
    (crop,) = classifier.crop([picture])
    pictures, lacking = [(crop, "What the network gets")], ""
    try:
        (heat,) = classifier.heat_map([picture])
        speaks = f"What speaks for {name}" if heat.any() else f"Nothing in particular speaks for {name}"
        pictures.append((overlay(crop, heat), speaks))
    except ModelError as error:
        lacking = f"<p>{html.escape(str(error))}</p>"
    shown = _heading(f"{name}, {row.max():.1%}") + _figures("large", pictures) + lacking
    if gallery is not None:
        (near,) = gallery.nearest(classifier.features([picture]), NEAREST)
        captions = [f"{classifier.classes_[each.sample.label]} {each.similarity:.2f}" for each in near]
        nearest = [gallery.read(each.sample) for each in near]
        shown += _heading("Nearest training images, with the cosine of their features", 4)
        shown += _figures("small", zip(nearest, captions, strict=True))
    return Answer(dict(zip(classifier.classes_, row.tolist(), strict=True)), shown)


def _heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def _figures(kind: str, pictures: Iterable[tuple[Image.Image, str]]) -> str:
    """Pictures, each with its caption, as HTML that holds them."""
    found = []
    for picture, caption in pictures:
        if kind == "small":
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
        written = io.BytesIO()
        picture.save(written, "PNG")
        data, text = base64.b64encode(written.getvalue()).decode(), html.escape(caption)
        found.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )
    return f'<div class="figures {kind}">{"".join(found)}</div>'


def require(port: int) -> None:
    """Refuse what could not be opened, before anything is loaded for it.

    Args:
        port: 0 for any that is free.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("demo needs gradio. Install it: pip install 'frozen-backbone[demo]'")
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port has to be from 0, for any that is free, to 65535, not {port}.")
    _free(port)


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"--port {port}: {error.strerror}. Take another, or any that is free: --port 0"
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
    """Open a page on this machine to try the classifier on photographs: classes, heat map, nearest training images.

    Args:
        model: The classifier.
        ckpt_path: Checkpoint whose model answers.
        port: Port of the page on 127.0.0.1; 0 for any that is free.
        open: Show the page in a browser.
        data: Has the training images; by default those that the config.yaml of the checkpoint's run names.
        device: Where the training images' rows are computed.
        precision: Lightning's name of their precision.
        provider: Provides their rows.

    Raises:
        ConfigError: No checkpoint is named, or the port is taken.
        CheckpointError: The checkpoint is missing, damaged, unsafe, or does not fit the model.
        DataError: The data's classes are not the checkpoint's, or an image cannot be read.
    """
    if ckpt_path is None:
        raise ConfigError("demo needs a checkpoint. Name one with --ckpt_path FILE.")
    checkpoint = read_checkpoint(ckpt_path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    classifier, gallery = Classifier(model), None
    given = data if data is not None and data.source is not None else None
    about = f"{len(model.classes)} classes on {model.backbone.name}: {ckpt_path}"
    try:
        gallery = Gallery(classifier, given or data_of(ckpt_path), "train", device, precision, provider)
    except ProjectError as error:
        if given:
            raise
        lacking = f"No training images are shown: {error} (--data.root PATH shows others)"
        print_rank_zero(f"Demo: {lacking}")
        about += f"\n{lacking}"
    serve(classifier, gallery, about, port, open)


def serve(classifier: Classifier, gallery: Gallery | None, about: str, port: int, show: bool) -> None:
    """Open the page, until the process is told to stop.

    Args:
        classifier: Looks at photographs.
        gallery: The training images, if they are there.
        about: What is to be told of the classifier and of the gallery.
        port: On the loopback interface; 0 for any that is free.
        show: Whether to open a browser.
    """
    # Nothing is told to anybody, and no proxy is asked for what is on this machine.
    variables = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for key in ("no_proxy", "NO_PROXY"):
        variables[key] = ",".join(filter(None, [os.environ.get(key), HOST]))
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        variables["GRADIO_TEMP_DIR"] = folder  # what is dropped is gone with the page
        with process_state(environment=variables), contextlib.ExitStack() as opened:
            page = _page(classifier, gallery, about)
            opened.callback(page.close, verbose=False)
            _, url, _ = page.launch(
                server_name=HOST,
                server_port=_free(port),
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
            print_rank_zero(f"Demo: {url} (Ctrl-C ends it)")
            while True:
                time.sleep(0.5)


def _page(classifier: Classifier, gallery: Gallery | None, about: str) -> Any:
    import gradio as gr

    # A file rather than gradio's image, which would convert it: predictions are to be those of the file itself.
    with gr.Blocks(title="Frozen backbone", analytics_enabled=False) as page:
        gr.HTML("".join(f"<p>{html.escape(line)}</p>" for line in about.split("\n")))
        with gr.Row():
            file = gr.File(label="Photograph", height=150)
            label = gr.Label(
                label="Classes", num_top_classes=min(CLASSES, len(classifier.classes_)), show_heading=False
            )
        shown = gr.HTML()
        file.change(
            lambda path: answer(classifier, gallery, path),
            file,
            [label, shown],
            api_name="look",
            show_progress="minimal",
        )
    return page
