"""The command ``serve``: answers images over HTTP."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from project.errors import ConfigError
from project.features.provider import RowProvider
from project.inference.many_tasks import ManyTasks, task_names
from project.inference.serving.limits import RequestLimits
from project.runtime.console import print_rank_zero
from project.runtime.system import installed_versions

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
PACKAGES |= {"prometheus_client": "prometheus-client"}
DISTRIBUTION = "frozen-backbone"
MIN_TOKEN = 16  # characters
MAX_WAIT = 1000  # milliseconds


def require(
    host: str, port: int, token_file: str | None, limits: RequestLimits, batch_size: int | None, batch_wait: float
) -> None:
    """Check the flags before weights are loaded.

    Raises:
        ConfigError: A package is missing, the port is in use, the address needs a token, or a limit is out of range.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"serve requires {', '.join(missing)}. Install: pip install '{DISTRIBUTION}[serve]'")
    limits.validate()
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch_size must be at least 1, not {batch_size}.")
    if not 0 <= batch_wait <= MAX_WAIT:
        raise ConfigError(f"--batch_wait must be from 0 to {MAX_WAIT} milliseconds, not {batch_wait:g}.")
    read_token(host, token_file)
    listen(host, port).close()


def read_token(host: str, token_file: str | None) -> str | None:
    """The token that clients must send; ``None`` accepts all clients of the loopback interface.

    Raises:
        ConfigError: The address needs a token, or the file has none.
    """
    if token_file is None:
        if not all(ipaddress.ip_address(address).is_loopback for _, address in _addresses(host, 0)):
            raise ConfigError(
                f"--host {host} accepts other machines, so it needs a token: --token_file FILE, whose content clients "
                "send as 'Authorization: Bearer TOKEN'.\nFor this machine only: --host 127.0.0.1"
            )
        return None
    try:
        token = Path(token_file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token_file {token_file} cannot be read: {error}.") from error
    if len(token) < MIN_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(
            f"--token_file {token_file} must contain a token of at least {MIN_TOKEN} ASCII characters without spaces. "
            "To create one: openssl rand -hex 32"
        )
    return token


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty or too long part, as in 127..0.1
        reason = getattr(error, "strerror", "it is not a valid name")
        raise ConfigError(f"--host {host}: {reason}. Use an address of this machine.") from error
    return [(family, str(address[0])) for family, _, _, _, address in found]


def listen(host: str, port: int) -> socket.socket:
    """Open the port.

    Raises:
        ConfigError: The address is not one of this machine, or the port is invalid or in use.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be between 0 (any free port) and 65535, not {port}.")
    family, address = _addresses(host, port)[0]
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((address, port))
    except OSError as error:
        server.close()
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror}. Use another port, or --port 0 for any free port."
        ) from error
    return server


def serve(
    load: Callable[[], ManyTasks],
    device: torch.device,
    precision: str,
    provider: RowProvider,
    ckpt_path: list[str] | str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | None = None,
    max_megabytes: float = 20.0,
    max_megapixels: float = 50.0,
    max_seconds: float = 30.0,
    max_requests: int = 64,
    batch_size: int | None = None,
    batch_wait: float = 2.0,
    coverage: float | None = None,
    max_error: float | None = None,
    false_alarms: float | None = None,
) -> None:
    """Answer images over HTTP: POST /predict, GET /health, /metrics and /openapi.json.

    Args:
        load: Loads the classifiers.
        device: Device of the classifiers.
        precision: Lightning's name of the precision that an engine may have.
        provider: Selects the engine.
        ckpt_path: Checkpoint of the model. Repeat the flag for several tasks, which then share their backbones.
        host: Address to listen on. Any other than that of the loopback interface needs a token.
        port: Port; 0 for any free port.
        token_file: File that contains the token that clients must send as 'Authorization: Bearer TOKEN'.
        max_megabytes: Largest upload in megabytes.
        max_megapixels: Largest image in megapixels, by the size that its file states.
        max_seconds: Longest time in seconds of the headers of a request, of an upload, and from there to its answer.
        max_requests: Largest number of requests in progress; further ones are refused until one is answered.
        batch_size: Largest number of images that are computed together; by default the one that the engine computes
            best.
        batch_wait: Longest time in milliseconds that a request waits for others.
        coverage: Add set to the answers: classes that contain the right one with this probability, such as 0.95.
        max_error: Add answered: whether an image is so certain that at most this share of such answers is wrong, such
            as 0.01.
        false_alarms: Add known: whether an image is like the training images; at most this share of the images of
            known classes is called unknown, such as 0.05.

    Raises:
        ConfigError: A flag is invalid, or the checkpoint has no calibrated answers.
        CheckpointError: A checkpoint is missing or damaged.
        WeightsError: The weights of a backbone are not available on this machine.
    """
    from project.inference.serving.app import make_app, make_server
    from project.inference.serving.served_model import ServedModel, select_engines, set_policies
    from project.inference.serving.service import Batching, Service

    began = time.perf_counter()
    limits = RequestLimits(max_megabytes, max_megapixels, max_seconds, max_requests)

    def load_model() -> ServedModel:
        tasks = load().to(device)
        set_policies(tasks, {"coverage": coverage, "max_error": max_error, "false_alarms": false_alarms})
        engines, reasons = select_engines(tasks, provider, precision)
        model = ServedModel(tasks, engines)
        model.warm_up()
        for group, reason in zip(tasks.groups, reasons, strict=True):
            print_rank_zero(f"Serve: {' and '.join(tasks.names[position] for position in group)} with {reason}")
        return model

    def on_started() -> None:
        if service.error is not None:
            server.should_exit = True
        elif not server.should_exit:
            print_rank_zero(f"Serve: ready after {time.perf_counter() - began:.1f} s (press Ctrl-C to stop)")

    paths: Sequence[str] = ckpt_path if isinstance(ckpt_path, list) else [ckpt_path or ""]
    version = installed_versions([DISTRIBUTION]).get(DISTRIBUTION, "unknown")
    service = Service(load_model, limits, Batching(batch_size, batch_wait))
    app = make_app(service, task_names(paths), version, read_token(host, token_file), on_started)
    server = make_server(app, limits.max_seconds)
    with listen(host, port) as opened:
        name = f"[{host}]" if ":" in host else host
        print_rank_zero(f"Serve: http://{name}:{opened.getsockname()[1]}/predict")
        server.run(sockets=[opened])
    if service.error is not None:
        raise service.error
