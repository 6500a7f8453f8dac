"""The text of this machine: licensed, named, within its budget, and the same twice."""

import pytest

from cognexis.artifacts.licensed_text import _translations, corpora_manifest, installed_corpora
from cognexis.errors import InvalidConfigError


def test_sources_are_named_and_stay_within_the_budget():
    corpora = installed_corpora(400_000)
    packages = [corpus.package for corpus in corpora]
    assert packages[0] == "Python standard library" and {"numpy", "transformers"} <= set(packages)
    limit = {"Python help topics": 1_000_000}
    for corpus in corpora:
        assert 0 < corpus.num_characters <= limit.get(corpus.package, 120_000)
        assert corpus.version and corpus.licence in ("PSF-2.0", "BSD-3-Clause", "Apache-2.0")
        assert not any("/tests/" in name for name in corpus.names)
    assert corpora_manifest(corpora) == corpora_manifest(installed_corpora(400_000))


def test_translations_are_read_from_a_catalogue():
    catalogue = (
        'msgid "Yes"\nmsgstr "Ja"\n\nmsgid ""\nmsgstr ""\n"Erste \\"Zeile\\"\\n"\n"zweite"\n\n'
        'msgid "one"\nmsgid_plural "many"\nmsgstr[0] "eins"\nmsgstr[1] "viele"\n'
    )
    assert _translations(catalogue) == 'Ja\nErste "Zeile"\nzweite\neins\nviele'


def test_empty_budget_is_refused():
    with pytest.raises(InvalidConfigError, match="max_characters must be positive"):
        installed_corpora(0)
