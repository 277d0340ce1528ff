"""Downloads MNIST and the Free Spoken Digit Dataset to where `dataset=avmnist` looks for them.

    python scripts/prepare_avmnist.py                    # 12 MB and about 16 MB to data/avmnist

A download that broke off goes on where it stopped; a second run does nothing where the data is there.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist")
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
FSDD_COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
FSDD_URL = f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{FSDD_COMMIT}.tar.gz"
FSDD_RECORDINGS = 3000
WAV_NAME = re.compile(r"\d_[a-z]+_\d+\.wav")


class PrepareError(Exception):
    """What went wrong and what to do about it; exit code 2."""


def download(url: str, file: Path) -> None:
    """Fetch `url` to `file`, which appears only once it is complete; goes on with `<file>.part`."""
    part = file.with_name(file.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            resumed = response.status == 206
            left = response.headers.get("Content-Length")
            print(f"downloading {url}" + (f" from byte {have}" if resumed else ""), flush=True)
            with part.open("ab" if resumed else "wb") as stream:
                shutil.copyfileobj(response, stream, 1 << 20)
            expected = int(left) + (have if resumed else 0) if left else None
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left, or what is there is not of this file
            part.unlink()
            download(url, file)
            return
        raise PrepareError(f"cannot download '{url}': {error}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise PrepareError(f"cannot download '{url}': {error}") from error
    if expected is not None and part.stat().st_size != expected:
        raise PrepareError(
            f"'{url}' broke off after {part.stat().st_size} of {expected} bytes; run this again to go on"
        )
    part.rename(file)


def get_mnist(folder: Path, urls: tuple[str, ...]) -> None:
    """The four idx files, from the first address that has them."""
    for name, md5 in MNIST_MD5.items():
        file = folder / name
        if file.is_file() and _md5(file) == md5:
            continue
        file.unlink(missing_ok=True)
        reasons = []
        for url in urls:
            try:
                download(f"{url}/{name}", file)
            except PrepareError as error:
                reasons.append(str(error))
                continue
            if _md5(file) == md5:
                break
            file.unlink()
            reasons.append(f"'{url}/{name}' is not the published file: its md5 differs from {md5}")
        else:
            raise PrepareError(
                f"{'; '.join(reasons)}. Try again, give another address with --mnist-url, or put the file "
                f"into '{folder}' by hand and run this again"
            )


def get_fsdd(folder: Path, url: str, count: int) -> None:
    """The recordings, out of the repository's archive."""
    recordings = folder / "recordings"
    if len(_recordings(recordings)) == count:
        return
    archive = folder / "fsdd.tar.gz"
    if not archive.is_file():
        try:
            download(url, archive)
        except PrepareError as error:
            raise PrepareError(
                f"{error}. Try again, give another address with --fsdd-url, or save the archive by hand as "
                f"'{archive}' and run this again"
            ) from error
    part = folder / "recordings.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and WAV_NAME.fullmatch(name):
                    content = tar.extractfile(member)
                    assert content is not None
                    (part / name).write_bytes(content.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        archive.unlink()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PrepareError(
            f"cannot unpack '{archive}': {reason}; it was removed, run this again to download it anew"
        ) from error
    found = len(_recordings(part))
    if found != count:
        archive.unlink()
        raise PrepareError(
            f"the archive from '{url}' has {found} recordings instead of {count}; it was removed, run this "
            "again or give another address with --fsdd-url"
        )
    shutil.rmtree(recordings, ignore_errors=True)
    part.rename(recordings)
    archive.unlink()


def _recordings(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.wav") if WAV_NAME.fullmatch(file.name)]


def _md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", type=Path, default=Path("data/avmnist"), help="default: %(default)s")
    parser.add_argument("--mnist-url", help="folder with the four idx files, instead of the known ones")
    parser.add_argument("--fsdd-url", default=FSDD_URL, help="default: %(default)s")
    options = parser.parse_args(arguments)
    folder: Path = options.path
    try:
        get_mnist(folder / "mnist", (options.mnist_url,) if options.mnist_url else MNIST_URLS)
        get_fsdd(folder / "fsdd", options.fsdd_url, FSDD_RECORDINGS)
    except (PrepareError, OSError) as error:
        print(f"prepare_avmnist: {error}", file=sys.stderr)
        return 2
    print(f"{folder} is ready: dataset=avmnist dataset.path={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
