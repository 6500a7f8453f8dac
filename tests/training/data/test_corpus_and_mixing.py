"""Text of this machine with its licences, and mixtures of data sets."""

import gzip
import json

import numpy as np
import pytest

from cognexis.artifacts.text_corpus import Corpus
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.data.corpus import DEBIAN_SOURCES, DebianSource, debian_corpus, installed_inputs
from cognexis.training.data.inputs import DataInput
from cognexis.training.data.leaks import shared_documents
from cognexis.training.data.manifest import read_data_manifest
from cognexis.training.data.mixing import mix_data, mixture
from cognexis.training.data.opening import open_data
from cognexis.training.data.verify import verify_data

# ---- text of this machine ----


@pytest.fixture
def debian(tmp_path):
    """A root with two documentation packages, one of them under a GNU licence."""
    files = {
        "usr/share/doc/python3.11/html/_sources/a.rst.txt": "Free *text*.\n",
        "usr/share/doc/python3.11/html/_sources/b.rst.txt.gz": "Compressed text.\n",
        "usr/share/doc/python3.11/html/a.html": "<p>Free text.</p>",
        "usr/share/doc/git/a.txt": "Git text.\n",
        "usr/share/doc/git/broken.txt.gz": None,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"no gzip" if text is None else text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") and text else data)
    info = tmp_path / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    for package, key in (("python3.11-doc", "python3.11"), ("git-doc", "/git/")):
        (info / f"{package}.list").write_text("/.\n" + "".join(f"/{name}\n" for name in files if key in name))
    state = "Status: install ok installed\nVersion: "
    (tmp_path / "var/lib/dpkg/status").write_text(
        f"Package: python3.11-doc\n{state}3.11.2-6\n\nPackage: git-doc\n{state}1:2.39.5\n\n"
        "Package: perl-doc\nStatus: deinstall ok config-files\nVersion: 5.36\n"
    )
    return tmp_path


def test_documentation_packages_give_text_with_version_and_licence(debian):
    corpus = debian_corpus(DEBIAN_SOURCES[0], 1000, debian)
    assert sorted(corpus.documents) == ["Compressed text.\n", "Free *text*.\n"]
    assert (corpus.package, corpus.version, corpus.licence) == ("python3.11-doc", "3.11.2-6", "PSF-2.0")
    assert debian_corpus(DebianSource("perl-doc", "x", (".pod",), 0.1), 1000, debian).documents == ()
    assert len(debian_corpus(DEBIAN_SOURCES[0], 14, debian)) == 1


def test_gnu_licences_are_read_only_on_request(debian, monkeypatch):
    here = Corpus(("def f(): <s>\n", "Git text.\n"), ("f.py", "g.py"), "here", "1", "MIT")
    monkeypatch.setattr("cognexis.training.data.corpus.installed_corpora", lambda size: [here])
    inputs, sources = installed_inputs(100_000, root=debian)
    assert [source["package"] for source in sources if source["num_files"]][:2] == ["here", "python3.11-doc"]
    everything, with_gnu = installed_inputs(100_000, copyleft=True, root=debian)
    assert len(everything) == len(inputs)  # the only text of git-doc stands in an earlier package already
    (debian / "usr/share/doc/git/a.txt").write_text("Another git text.\n")
    with_gnu = installed_inputs(100_000, copyleft=True, root=debian)[1]
    assert with_gnu[-1]["package"] == "git-doc" and with_gnu[-1]["licence"] == "GPL-2.0-only"
    assert len(with_gnu[-1]["sha256"]) == 64


def test_text_of_this_machine_becomes_data_with_its_sources(tmp_path, build):
    inputs, sources = installed_inputs(60_000)
    assert inputs[0].domain == "code" and inputs[0].on_control == "text"
    manifest = build(inputs, sources=sources)[""]
    assert read_data_manifest(tmp_path / "out").sources == sources
    assert {"package", "version", "licence", "sha256", "num_characters"} <= set(sources[0])
    assert sum(source["num_characters"] for source in sources) <= 60_000
    assert manifest.num_documents == sum(source["num_files"] for source in sources)
    with pytest.raises(InvalidConfigError, match="max_characters=0: must be positive"):
        installed_inputs(0)


# ---- mixtures ----


@pytest.fixture
def two_sets(tmp_path, write_jsonl, build):
    for name, count in (("code", 60), ("prose", 20)):
        path = write_jsonl([{"text": f"{name} {index:03}"} for index in range(count)], f"{name}.jsonl")
        build(DataInput(path, domain=name), output_dir=tmp_path / "data" / name)
    return tmp_path / "data"


def test_shares_become_weights_and_rows(two_sets):
    mixed = mix_data(
        [two_sets / "code", two_sets / "prose"], two_sets / "mix.json", shares={"code": 0.5, "prose": 0.5}
    )
    assert {domain: entry["share"] for domain, entry in mixture(mixed).items()} == {"code": 0.5, "prose": 0.5}
    assert [shard.path for shard in mixed.shards] == ["code/code-00000.bin", "prose/prose-00000.bin"]
    data = open_data(two_sets / "mix.json", sequence_length=15)
    order = data.order(seed=1)
    parts = order.parts_of(order.rows(0, order.rows_per_epoch))
    assert abs(np.mean(parts == 0) - 0.5) < 0.02
    assert abs(order.rows_per_epoch - len(data.rows)) <= 1
    counts = np.bincount(order.rows(0, 30 * order.rows_per_epoch), minlength=len(data.rows))
    for part in (counts[: data.rows.counts[0]], counts[data.rows.counts[0] :]):
        assert part.max() - part.min() <= 1  # every row of a domain equally often


def test_weights_multiply_those_of_the_parts(two_sets):
    mixed = mix_data([two_sets / "code", two_sets / "prose"], two_sets / "mix.json", weights={"prose": 2.5})
    assert [shard.weight for shard in mixed.shards] == [1.0, 2.5]
    again = mix_data([two_sets / "mix.json"], two_sets / "again.json", weights={"prose": 2.0, "code": 0.5})
    assert [shard.weight for shard in again.shards] == [0.5, 5.0]
    assert verify_data(read_data_manifest(two_sets / "again.json")).faults == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"proze": 1}}, "weights: no domain 'proze'.*did you mean 'prose'.*there are 'code', 'prose'"),
        ({"weights": {"prose": 0}}, r"weights\['prose'\]=0: must be a finite number above 0"),
        ({"shares": {"code": 1.0}}, r"shares: no share for \['prose'\]"),
        ({"shares": {"code": 0.5, "prose": 0.6}}, "shares: must add up to 1, got 1.1"),
        ({"shares": {"code": float("nan"), "prose": 0.6}}, r"shares\['code'\]=nan"),
        ({"weights": {"code": 1}, "shares": {"code": 1}}, "either weights or shares"),
        ({"manifests": []}, "at least one manifest"),
        ({"output": "code/mix.json"}, "is not below .*put the mixture above its parts"),
        ({"output": "code/data_manifest.json"}, "exists already"),
    ],
)
def test_bad_mixtures_are_refused(two_sets, settings, message):
    given = {"manifests": ["code", "prose"], "output": "mix.json", **settings}
    paths = [two_sets / name for name in given.pop("manifests")]
    with pytest.raises(InvalidConfigError, match=message):
        mix_data(paths, two_sets / given.pop("output"), **given)
    assert not (two_sets / "mix.json").exists()


def test_data_of_different_tokenizers_do_not_mix(two_sets):
    path = two_sets / "prose" / "data_manifest.json"
    manifest = read_data_manifest(path)
    manifest.tokenizer["checksum"] = "sha256:" + "1" * 64
    manifest.write(path)
    with pytest.raises(ArtifactMismatchError, match="made with different tokenizers"):
        mix_data([two_sets / "code", two_sets / "prose"], two_sets / "mix.json")


def test_shared_documents_are_counted(tmp_path, write_jsonl, build):
    train = build(write_jsonl([{"text": f"{index}"} for index in range(50)]), output_dir=tmp_path / "a")[""]
    held = build(write_jsonl([{"text": f"{index}"} for index in (3, 49, 50, 60)]), output_dir=tmp_path / "b")[""]
    assert shared_documents(train, held) == 2
    assert json.dumps(train.content())
