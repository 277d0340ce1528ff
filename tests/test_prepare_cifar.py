"""The download of CIFAR against a server on this machine."""

import hashlib
import http.server
import pickle
import sys
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import prepare_cifar

from mmnas_lab.dataset.images import CIFAR


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The archive with 10 pictures a batch, served under the name that torchvision asks for."""
    place = tmp_path / "server"
    files = place / "cifar-10-batches-py"
    files.mkdir(parents=True)
    rng = np.random.default_rng(0)
    batches = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for name in batches:
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        (files / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    names = [f"class {k}" for k in range(10)]
    (files / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    archive = place / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files, files.name)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(place))
    handler.log_message = lambda *args: None
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", f"http://127.0.0.1:{running.server_port}/{archive.name}")
    monkeypatch.setattr(cifar, "tgz_md5", md5(archive))
    monkeypatch.setattr(cifar, "train_list", [[name, md5(files / name)] for name in batches[:5]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5(files / "test_batch")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(files / "batches.meta")}
    monkeypatch.setattr(cifar, "meta", meta)
    yield archive
    running.shutdown()
    running.server_close()


def test_the_archive_is_fetched_once_and_read_by_the_dataset(server, tmp_path, capsys):
    folder = tmp_path / "data"
    assert prepare_cifar.main(["--path", str(folder)]) == 0
    assert "is ready" in capsys.readouterr().out
    dataset = CIFAR(str(folder), val_share=0.1)
    assert [len(dataset.ids(split)) for split in ("train", "val", "test")] == [45, 5, 10]
    assert dataset.classes[3] == "class 3"
    server.unlink()  # a second run needs no server
    assert prepare_cifar.main(["--path", str(folder)]) == 0


def test_a_failed_download_names_the_address_and_the_remedy(server, tmp_path, capsys):
    server.unlink()
    assert prepare_cifar.main(["--path", str(tmp_path / "data")]) == 2
    message = capsys.readouterr().err
    assert "cifar-10-python.tar.gz" in message
    assert "by hand" in message
