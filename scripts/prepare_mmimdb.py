"""Downloads MM-IMDB from its authors and unpacks it to where `dataset=mmimdb` looks for it.

    python scripts/prepare_mmimdb.py                            # download, about 8 GB, to data/mmimdb
    python scripts/prepare_mmimdb.py --archive mmimdb.tar.gz    # an archive that was downloaded by hand

A second run does nothing where the data is there, and does not download again what was downloaded in full.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

URL = "http://lisi1.unal.edu.co/mmimdb/mmimdb.tar.gz"
PUBLISHED = {"train": 15552, "dev": 2608, "test": 7799}


class PrepareError(Exception):
    """What went wrong and what to do about it; exit code 2."""


def download(url: str, archive: Path) -> None:
    """Fetch `url` to `archive`, which appears only once it is complete."""
    part = archive.with_name(archive.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            print(f"downloading {url} ({size / 1e9:.2f} GB)", flush=True)
            shutil.copyfileobj(response, file, 1 << 20)
    except (OSError, HTTPException, ValueError) as error:
        raise PrepareError(
            f"cannot download '{url}': {error}. Try again, give another address with --url, or download the "
            "archive by hand and pass it with --archive"
        ) from error
    if size and part.stat().st_size != size:
        raise PrepareError(f"'{url}' broke off after {part.stat().st_size} of {size} bytes; run this again")
    part.rename(archive)


def unpack(archive: Path, out: Path) -> None:
    """Unpack `archive` so that its `split.json` becomes `out/split.json`; `out` appears once complete."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"unpacking {archive}", flush=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        shutil.rmtree(part)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PrepareError(
            f"cannot unpack '{archive}': {reason}. Check that there is space left, or delete the file and "
            "run this again to download it anew"
        ) from error
    found = next(part.rglob("split.json"), None)
    if found is None:
        shutil.rmtree(part)
        raise PrepareError(
            f"'{archive}' holds no split.json, so it is not the MM-IMDB archive; see --url and --archive"
        )
    if out.is_dir():
        out.rmdir()
    found.parent.rename(out)
    shutil.rmtree(part, ignore_errors=True)


def check(out: Path) -> None:
    """Print how many movies each split has; plots must be there, posters may be missing."""
    try:
        index = json.loads((out / "split.json").read_text(encoding="utf-8"))
        splits = {name: [str(movie) for movie in index[name]] for name in PUBLISHED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrepareError(
            f"'{out / 'split.json'}' must hold lists of ids named {', '.join(PUBLISHED)} ({error!r}); "
            f"delete '{out}' and run this again"
        ) from error
    present = {file.name for folder in (out, out / "dataset") if folder.is_dir() for file in folder.iterdir()}
    for name, movies in splits.items():
        without_plot = [movie for movie in movies if f"{movie}.json" not in present]
        without_poster = sum(f"{movie}.jpeg" not in present for movie in movies)
        if without_plot:
            raise PrepareError(
                f"'{out}' lacks {len(without_plot)} of the {len(movies)} plots of {name}, the first is "
                f"'{without_plot[0]}.json'; delete the folder and run this again"
            )
        note = "" if len(movies) == PUBLISHED[name] else f" (published: {PUBLISHED[name]})"
        print(f"{name}: {len(movies)} movies{note}, {without_poster} without poster")
    print(f"{out} is ready: python run.py experiment=ssl_nas_mmimdb dataset.path={out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default=URL, help="address of the archive (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("data/mmimdb"), help="folder (default: %(default)s)")
    parser.add_argument("--archive", type=Path, help="use this file, do not download")
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        if not (out / "split.json").is_file():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise PrepareError(f"'{out}' is not empty, and has no split.json; choose another --out")
            archive: Path = options.archive or out.with_name(out.name + ".tar.gz")
            if options.archive and not archive.is_file():
                raise PrepareError(f"--archive '{archive}' does not exist; omit it to download {options.url}")
            if not archive.is_file():
                download(options.url, archive)
            unpack(archive, out)
        check(out)
    except PrepareError as error:
        print(f"prepare_mmimdb: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
