"""A page on this machine alone, where somebody drops a photograph and sees what a classifier makes of it."""

from __future__ import annotations

import html
import importlib.util
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from project.artifacts.gallery import Gallery
from project.artifacts.load import Classifier
from project.artifacts.overlay import overlay
from project.data.images import read_image
from project.errors import ConfigError, DataError, ModelError
from project.terminal import say

HOST = "127.0.0.1"
NEAREST = 6
CLASSES = 10  # the likeliest ones that are shown
STYLE = ".gradio-container {max-width: 1000px !important; margin: auto} footer {display: none !important}"


class Answer(NamedTuple):
    """What is shown of a photograph.

    Attributes:
        text: One or two lines, as HTML.
        probabilities: Of each class, by its name; ``None`` where the file is no image.
        pictures: What the network got of it, and that with the heat map of the predicted class; each with a caption.
        nearest: The training images most like it, with captions.
    """

    text: str
    probabilities: dict[str, float] | None = None
    pictures: Sequence[tuple[Image.Image, str]] = ()
    nearest: Sequence[tuple[Image.Image, str]] = ()


def answer(classifier: Classifier, gallery: Gallery | None, file: str | None) -> Answer:
    """Look at a file that somebody has dropped; the answer is that of ``load(...).predict_proba``.

    Args:
        classifier: Looks at it.
        gallery: The training images, if they are there.
        file: Its path.
    """
    if file is None:
        return Answer("")
    try:
        picture = read_image(file)
    except DataError as error:
        return Answer(_text(str(error).replace(file, Path(file).name)))
    (row,) = classifier.predict_proba([picture])
    name = classifier.classes_[row.argmax()]
    pictures = [(classifier.crop([picture])[0], "What the network gets")]
    text = f"{name}, {row.max():.1%}"
    try:
        (heat,) = classifier.heat_map([picture])
        pictures.append((overlay(pictures[0][0], heat), f"What speaks for {name}" if heat.any() else "Nothing speaks"))
    except ModelError as error:
        text += f"\n{error}"
    nearest = []
    if gallery is not None:
        for sample, similarity in gallery.nearest(classifier.features([picture]), NEAREST)[0]:
            nearest.append((gallery.read(sample), f"{classifier.classes_[sample.label]} {similarity:.2f}"))
    probabilities = dict(zip(classifier.classes_, row.tolist(), strict=True))
    return Answer(_text(text), probabilities, pictures, nearest)


def _text(lines: str) -> str:
    first, *more = html.escape(lines).split("\n")
    return "".join([f"<h2>{first}</h2>", *(f"<p>{line}</p>" for line in more)])


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
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for key in ("no_proxy", "NO_PROXY"):
        os.environ[key] = ",".join(filter(None, [os.environ.get(key), HOST]))
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what is dropped is gone with the page
        page = _page(classifier, gallery, about)
        try:
            _, url, _ = page.launch(
                server_name=HOST,
                server_port=_free(port),
                share=False,
                inbrowser=show,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                max_file_size="200mb",
                css=STYLE,
            )
            say(f"Demo: {url} (Ctrl-C ends it)")
            while True:
                time.sleep(0.5)
        finally:
            page.close(verbose=False)


def _page(classifier: Classifier, gallery: Gallery | None, about: str) -> Any:
    import gradio as gr

    # A file rather than gradio's image, which would convert it: predictions are to be those of the file itself.
    with gr.Blocks(title="Frozen backbone", analytics_enabled=False) as page:
        gr.HTML(_text(about))
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Photograph", height=150)
                text = gr.HTML()
            label = gr.Label(
                label="Classes", num_top_classes=min(CLASSES, len(classifier.classes_)), show_heading=False
            )
        pictures = gr.Gallery(label="Where it looks", columns=2, object_fit="contain", interactive=False)
        nearest = gr.Gallery(
            label="Nearest training images, with the cosine of their features",
            columns=NEAREST,
            object_fit="contain",
            interactive=False,
            visible=gallery is not None,
        )
        file.change(
            lambda path: [part or None for part in answer(classifier, gallery, path)],
            file,
            [text, label, pictures, nearest],
            api_name="look",
            show_progress="minimal",
        )
    return page
