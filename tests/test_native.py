"""C sources are compiled once, where nobody else can write, and done without where they cannot be."""

import pytest

from mmnas_lab import native

needs_compiler = pytest.mark.skipif(
    native.compiler() is None, reason="needs a C compiler: cc, gcc, clang or $CC"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "user_cache_path", lambda name: tmp_path / "cache")
    file = tmp_path / "two.c"
    file.write_text("int two(void) { return 2; }\n")
    native.library.cache_clear()
    yield file
    native.library.cache_clear()


@needs_compiler
def test_a_library_is_compiled_once(source, monkeypatch):
    assert native.library(source).two() == 2
    (made,) = (source.parent / "cache").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert native.library(source).two() == 2
    assert [made] == list((source.parent / "cache").iterdir())


@needs_compiler
def test_a_changed_source_is_compiled_again(source):
    assert native.library(source).two() == 2
    source.write_text("int two(void) { return 22; }\n")
    native.library.cache_clear()
    assert native.library(source).two() == 22


def test_without_a_compiler_there_is_no_library(source, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with caplog.at_level("INFO"):
        assert native.library(source) is None
    assert "no C compiler" in caplog.text


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_fails_is_named_once(compiler, source, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    assert native.library(source) is None
    assert native.library(source) is None
    assert caplog.text.count("two.c is replaced by torch") == 1


@needs_compiler
def test_a_source_with_an_error_is_named(source, caplog):
    source.write_text("int two(void) { return nothing; }\n")
    assert native.library(source) is None
    assert "nothing" in caplog.text


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced(source):
    (source.parent / "cache").write_text("a file where the folder should be")
    assert native.library(source).two() == 2


@needs_compiler
def test_a_cache_that_others_can_write_is_not_trusted(source):
    cache = source.parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    assert native.library(source).two() == 2
    assert not list(cache.iterdir())
