"""The download of MNIST and FSDD against a server on this machine."""

import functools
import gzip
import hashlib
import http.server
import io
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import prepare_avmnist

from mmnas_lab.dataset.avmnist import AVMNIST

ROWS = {"train": 40, "t10k": 12}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers ranges; cuts answers to `limit` bytes while promising all."""

    limit = None
    ranges = True

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        self.server.requests.append((file.name, self.headers.get("Range")))
        if not file.is_file():
            self.send_error(404)
            return
        content, start = file.read_bytes(), 0
        if self.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.limit])

    def log_message(self, *args):
        pass


def wav(digit, rng):
    stream = io.BytesIO()
    wavfile.write(stream, 8000, (1000 * rng.normal(size=1500 + 10 * digit)).astype(np.int16))
    return stream.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Small files of the right form, their checksums in place of the published ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "served"
    folder.mkdir()
    for name, count in ROWS.items():
        arrays = {"images-idx3": rng.integers(0, 256, (count, 28, 28)), "labels-idx1": np.arange(count) % 10}
        for kind, array in arrays.items():
            head = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            content = gzip.compress(head + array.astype(np.uint8).tobytes())
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(content)
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in prepare_avmnist.MNIST_MD5}
    monkeypatch.setattr(prepare_avmnist, "MNIST_MD5", md5)
    files = {f"fsdd-1/recordings/{d}_ann_{k}.wav": wav(d, rng) for d in range(10) for k in (0, 5, 10)}
    files |= {"fsdd-1/README.md": b"text", "fsdd-1/../../escaped.wav": b"no", "fsdd-1/Setup_1.wav": b"no"}
    with tarfile.open(folder / "fsdd.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(prepare_avmnist, "FSDD_RECORDINGS", 30)
    handler = type("OwnHandler", (Handler,), {})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=folder)
    ) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}", handler, running.requests
        running.shutdown()
        thread.join()


def arguments(folder, address):
    return ["--path", str(folder), "--mnist-url", address, "--fsdd-url", f"{address}/fsdd.tar.gz"]


def test_both_are_fetched_once_and_read_by_the_dataset(server, tmp_path, capsys):
    _, address, _, requests = server
    out = tmp_path / "data"
    assert prepare_avmnist.main(arguments(out, address)) == 0
    assert "is ready" in capsys.readouterr().out
    dataset = AVMNIST(str(out), num_train=30, num_val=10, num_test=12)
    for split in ("train", "val", "test"):
        assert [pair.clip.digit for pair in dataset.records(split)] == dataset.labels(split).tolist()
        assert not dataset.unreadable(split)
    assert len(requests) == 5
    assert prepare_avmnist.main(arguments(out, address)) == 0
    assert len(requests) == 5
    assert sorted(path.name for path in (out / "fsdd").iterdir()) == ["recordings"]
    assert not list(tmp_path.rglob("escaped.wav"))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(server, tmp_path, capsys, ranges):
    _, address, handler, requests = server
    out = tmp_path / "data"
    handler.limit, handler.ranges = 100, ranges
    assert prepare_avmnist.main(arguments(out, address)) == 2
    assert "broke off after 100 of" in capsys.readouterr().err
    assert not (out / "mnist" / "train-images-idx3-ubyte.gz").exists()
    handler.limit = None
    assert prepare_avmnist.main(arguments(out, address)) == 0
    assert requests[1] == ("train-images-idx3-ubyte.gz", "bytes=100-")
    assert AVMNIST(str(out), num_train=30, num_val=10, num_test=12).ids("test")


def test_a_part_that_is_too_long_is_fetched_anew(server, tmp_path):
    folder, address, _, _ = server
    part = tmp_path / "data" / "mnist" / "train-images-idx3-ubyte.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes((folder / "train-images-idx3-ubyte.gz").stat().st_size))
    assert prepare_avmnist.main(arguments(tmp_path / "data", address)) == 0


def test_another_file_under_the_name_is_refused_and_a_damaged_one_replaced(server, tmp_path, capsys):
    folder, address, _, _ = server
    out = tmp_path / "data"
    good = (folder / "t10k-labels-idx1-ubyte.gz").read_bytes()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    assert prepare_avmnist.main(arguments(out, address)) == 2
    error = capsys.readouterr().err
    assert "is not the published file" in error
    assert "by hand" in error
    assert error.count("\n") == 1
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(good)
    (out / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert prepare_avmnist.main(arguments(out, address)) == 0


def test_the_second_address_is_tried(server, tmp_path, monkeypatch):
    _, address, _, _ = server
    monkeypatch.setattr(prepare_avmnist, "MNIST_URLS", (f"{address}/nowhere", address))
    out = tmp_path / "data"
    assert prepare_avmnist.main(["--path", str(out), "--fsdd-url", f"{address}/fsdd.tar.gz"]) == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.unlink(), "404"),
        (lambda f: f.write_bytes(b"no archive"), "cannot unpack"),
        (lambda f: f.write_bytes(f.read_bytes()[:-500]), "cannot unpack"),
    ],
)
def test_a_bad_archive_of_recordings_is_one_message(server, tmp_path, capsys, spoil, message):
    folder, address, _, _ = server
    spoil(folder / "fsdd.tar.gz")
    assert prepare_avmnist.main(arguments(tmp_path / "data", address)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "data" / "fsdd" / "recordings").exists()


def test_an_incomplete_archive_is_refused(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_avmnist, "FSDD_RECORDINGS", 31)
    assert prepare_avmnist.main(arguments(tmp_path / "data", server[1])) == 2
    assert "has 30 recordings instead of 31" in capsys.readouterr().err
