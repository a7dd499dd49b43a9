"""A server with LitServe that runs the same model as ``serve``, to compare the two.

python -m tests.benchmarks.litserve_server --ckpt_path best.ckpt
"""

import argparse
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import litserve
import torch
from fastapi import Request

from project.features.provider import RowProvider
from project.inference.many_tasks import ManyTasks
from project.inference.serving.served_model import ServedModel, select_engines
from project.runtime.system import cache_folder, cores


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Decodes and answers in worker processes.

    Args:
        checkpoint: Checkpoint of the model.
        options: Arguments of LitAPI.
    """

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        super().__init__(**options)
        self._checkpoint = checkpoint

    def setup(self, device: str) -> None:
        """Load the model as ``serve`` does, on one core of each worker."""
        torch.set_num_threads(1)
        tasks = ManyTasks.load([self._checkpoint])
        engines, _ = select_engines(tasks, RowProvider("auto", "auto", 20.0, cache_folder()), "32-true")
        self.model = ServedModel(tasks, engines)
        self.model.warm_up()

    def decode_request(self, request: Request) -> Any:
        """Decode the file of a form, which LitServe has parsed."""
        return self.model.prepare(request["image"].file.read())

    def batch(self, inputs: list[Any]) -> list[Any]:
        """The images, which are stacked later."""
        return inputs

    def predict(self, inputs: list[Any]) -> list[Any]:
        """Answer a batch."""
        return self.model.answer(inputs)

    def unbatch(self, output: list[Any]) -> list[Any]:
        """The answers."""
        return output

    def encode_response(self, output: Any) -> Any:
        """The answer, which becomes JSON."""
        return output


def main() -> None:
    """Serve until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of the model")
    parser.add_argument("--batch_wait", type=float, default=2, help="milliseconds that a request waits for others")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = Api(options.ckpt_path, max_batch_size=8, batch_timeout=options.batch_wait / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=cores())
    print(f"http://127.0.0.1:{port}", flush=True)
    threading.Thread(target=announce, args=(port,), daemon=True).start()
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


def announce(port: int) -> None:
    """Print a line when the server is ready."""
    while True:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
                if response.status == 200:
                    print("ready", flush=True)
                    return
        except OSError:
            continue


if __name__ == "__main__":
    main()
