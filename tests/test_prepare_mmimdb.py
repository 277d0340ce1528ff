from __future__ import annotations

import functools
import importlib.util
import io
import json
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/prepare_mmimdb.py"
SPLITS = {"train": ["0001", "0002"], "dev": ["0003"], "test": ["0004"]}


def load():
    spec = importlib.util.spec_from_file_location("prepare_mmimdb", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load()


def write_archive(path: Path, leave_out: tuple[str, ...] = (), extra: str | None = None) -> Path:
    files = {"mmimdb/split.json": json.dumps(SPLITS).encode()}
    for movie in (movie for movies in SPLITS.values() for movie in movies):
        files[f"mmimdb/dataset/{movie}.json"] = b'{"plot": ["A plot."], "genres": ["Drama"]}'
        files[f"mmimdb/dataset/{movie}.jpeg"] = b"jpeg"
    if extra:
        files[extra] = b"out of bounds"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            if name.rsplit("/", 1)[-1] not in leave_out:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


class Handler(SimpleHTTPRequestHandler):
    requests = 0
    promise = 0  # bytes that the header says beyond those that come

    def do_GET(self):
        type(self).requests += 1
        super().do_GET()

    def send_header(self, keyword, value):
        if keyword == "Content-Length":
            value = str(int(value) + self.promise)
        super().send_header(keyword, value)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder, its address on the loopback, and the class that answers."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("CountingHandler", (Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_address[1]}", handler
        http.shutdown()
        thread.join()


def test_downloads_unpacks_and_counts(tmp_path, server, capsys):
    folder, address, handler = server
    write_archive(folder / "mmimdb.tar.gz", leave_out=("0002.jpeg",))
    out = tmp_path / "data/mmimdb"
    arguments = ["--url", f"{address}/mmimdb.tar.gz", "--out", str(out)]
    assert prepare.main(arguments) == 0
    assert json.loads((out / "split.json").read_text()) == SPLITS
    assert (out / "dataset/0004.jpeg").read_bytes() == b"jpeg"
    assert sorted(path.name for path in out.parent.iterdir()) == ["mmimdb", "mmimdb.tar.gz"]
    printed = capsys.readouterr().out
    assert "train: 2 movies (published: 15552), 1 without poster" in printed
    assert "dev: 1 movies (published: 2608), 0 without poster" in printed

    assert prepare.main(arguments) == 0
    assert handler.requests == 1


def test_a_download_that_breaks_off_leaves_no_archive(tmp_path, server, capsys):
    folder, address, handler = server
    write_archive(folder / "mmimdb.tar.gz")
    arguments = ["--url", f"{address}/mmimdb.tar.gz", "--out", str(tmp_path / "mmimdb")]
    handler.promise = 10
    assert prepare.main(arguments) == 2
    assert not (tmp_path / "mmimdb.tar.gz").exists()
    assert not (tmp_path / "mmimdb").exists()
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "mmimdb.tar.gz'" in captured.err
    handler.promise = 0
    assert prepare.main(arguments) == 0


def test_a_wrong_address_says_what_to_do(tmp_path, server, capsys):
    _, address, _ = server
    assert prepare.main(["--url", f"{address}/none.tar.gz", "--out", str(tmp_path / "mmimdb")]) == 2
    error = capsys.readouterr().err
    assert "404" in error
    assert "--archive" in error


def test_an_archive_downloaded_by_hand_is_used(tmp_path, capsys):
    archive = write_archive(tmp_path / "by_hand.tar.gz")
    out = tmp_path / "mmimdb"
    out.mkdir()  # an empty folder is no obstacle
    assert (
        prepare.main(["--archive", str(archive), "--out", str(out), "--url", "http://127.0.0.1:9/none"]) == 0
    )
    assert (out / "dataset/0001.json").is_file()
    assert archive.is_file()
    assert "is ready" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b"no tar"), "cannot unpack"),
        (lambda path: path.write_bytes(write_archive(path).read_bytes()[:-60]), "cannot unpack"),
        (lambda path: write_archive(path, leave_out=("split.json",)), "no split.json"),
        (lambda path: write_archive(path, extra="../escaped.txt"), "cannot unpack"),
        (lambda path: write_archive(path, leave_out=("0003.json",)), "lacks 1 of the 1 plots of dev"),
    ],
    ids=["missing", "no_tar", "truncated", "no_split", "escapes", "no_plot"],
)
def test_a_bad_archive_is_one_message(tmp_path, capsys, make, message):
    archive = tmp_path / "a/archive.tar.gz"
    archive.parent.mkdir()
    make(archive)
    assert prepare.main(["--archive", str(archive), "--out", str(tmp_path / "b/mmimdb")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("prepare_mmimdb: ")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not list(tmp_path.rglob("*.part"))


def test_other_files_are_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    archive = write_archive(tmp_path / "archive.tar.gz")
    assert prepare.main(["--archive", str(archive), "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
