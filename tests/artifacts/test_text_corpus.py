"""The corpus made from the standard library: deterministic, bounded, split without overlap."""

import pytest

from cognexis.artifacts.text_corpus import Corpus, standard_library_corpus
from cognexis.errors import InvalidConfigError

SIZE = 400_000


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library_corpus(SIZE)


@pytest.fixture
def library(tmp_path):
    """A small library with one file of each kind that must be left out."""
    files = {
        "a.py": b"a = 1\n",
        "b/c.py": b"c = 'x'\r\n",
        "b/__init__.py": b"",
        "b/copy_of_a.py": b"a = 1\n",
        "latin.py": b"# \xe9\n",
        "test/test_a.py": b"assert True\n",
        "b/tests/more.py": b"assert 1\n",
        "site-packages/numpy.py": b"n = 0\n",
        "encodings/cp1.py": b"table = ()\n",
        "_sysconfigdata_x.py": b"build = {}\n",
        "notes.txt": b"no code\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_corpus_keeps_real_sources_only(library):
    corpus = standard_library_corpus(1000, library)
    found = dict(zip(corpus.names, corpus.documents, strict=True))
    assert found.pop("b/c.py") == "c = 'x'\r\n"
    assert list(found.values()) == ["a = 1\n"]
    assert set(found) <= {"a.py", "b/copy_of_a.py"}


def test_file_that_does_not_fit_is_passed_over(library):
    (library / "large.py").write_text("x = 1\n" * 100)
    assert "large.py" not in standard_library_corpus(100, library).names
    assert "large.py" in standard_library_corpus(1000, library).names


def test_corpus_of_the_interpreter_is_bounded_and_repeatable(corpus):
    assert SIZE / 2 < corpus.num_characters <= SIZE
    assert corpus == standard_library_corpus(SIZE)
    assert corpus.sha256 == standard_library_corpus(SIZE).sha256
    assert corpus.num_bytes >= corpus.num_characters


def test_hash_depends_on_text_names_and_order():
    def corpus_of(*documents: str, names: tuple[str, ...] = ("a", "b")) -> Corpus:
        return Corpus(documents, names, "package", "1", "MIT")

    hashes = {
        corpus_of("x", "y").sha256,
        corpus_of("y", "x").sha256,
        corpus_of("xy", "").sha256,
        corpus_of("x", "y", names=("ab", "")).sha256,
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_split_is_a_partition_by_document(corpus, share):
    training, held_out = corpus.split(share)
    assert not set(training.names) & set(held_out.names)
    assert not set(training.documents) & set(held_out.documents)
    assert sorted(training.names + held_out.names) == sorted(corpus.names)
    assert corpus.split(share) == (training, held_out)


def test_document_stays_on_its_side_when_the_corpus_grows(corpus):
    training, held_out = corpus.split(0.3)
    larger_training, larger_held_out = standard_library_corpus(2 * SIZE).split(0.3)
    assert not set(training.names) & set(larger_held_out.names)
    assert not set(held_out.names) & set(larger_training.names)


def test_manifest_says_what_the_corpus_is(corpus):
    manifest = corpus.manifest()
    assert manifest["licence"] == "PSF-2.0"
    assert manifest["num_files"] == len(corpus) == len(corpus.documents)
    assert manifest["num_characters"] == corpus.num_characters
    assert manifest["sha256"] == corpus.sha256
    assert manifest["version"].startswith(("CPython", "PyPy"))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_out_of_range_is_refused(corpus, share):
    with pytest.raises(InvalidConfigError, match="held_out_share must be in"):
        corpus.split(share)


def test_split_with_an_empty_side_is_refused(library):
    with pytest.raises(InvalidConfigError, match="use a larger corpus or another share"):
        standard_library_corpus(1000, library).split(0.0001)


def test_no_room_and_no_sources_are_refused(tmp_path):
    with pytest.raises(InvalidConfigError, match="max_characters must be positive"):
        standard_library_corpus(0)
    with pytest.raises(InvalidConfigError, match="no Python source file"):
        standard_library_corpus(1000, tmp_path)
