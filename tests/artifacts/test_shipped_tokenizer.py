"""The shipped tokenizer: its files, its sources, and ids that must never change.

``tests/data/tokenizer_golden.json`` holds texts with their ids. If a change of ids is meant, a new tokenizer version
is due, and the file is written again by ``python -m pytest tests/artifacts/test_shipped_tokenizer.py`` with
``COGNEXIS_WRITE_GOLDEN=1``.
"""

import json
import os
from pathlib import Path

import pytest

from cognexis.artifacts.shipped_tokenizer import DEFAULT_TOKENIZER, load_default_tokenizer
from cognexis.tokens.layout import BYTE_TOKENS, CONTROL_TOKENS
from tests.batteries.without_package import run_without_package

GOLDEN = Path(__file__).parents[1] / "data" / "tokenizer_golden.json"
TEXTS = {
    "plain": "The quick brown fox jumps over the lazy dog. It's 3.14159, isn't it?",
    "sentence": "Cognexis repeats one block of layers; each loop refines the same hidden states.",
    "numbers": "1234567890 -42 0x1F 6.022e23 10:45 2024-02-29",
    "german": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "french": "Dès Noël où un zéphyr haï me vêt de glaçons würmiens.",
    "spanish": "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío.",
    "polish": "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم",
    "hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "chinese": "我能吞下玻璃而不伤身体。",
    "japanese": "いろはにほへと ちりぬるを、色は匂へど散りぬるを。",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고",
    "emoji": "👩‍👩‍👧 🏳️‍🌈 ok 🙂",
    "python": 'def f(x: int = 10) -> str:\n\tif x >= 2**31:\n\t\treturn f"{x!r:>8}"\n\n\nclass A(B):\n    pass\n',
    "rust": 'fn main() {\n    let v: Vec<u8> = vec![0xFF; 4];\n    println!("{:?}", &v[..2]);\n}\n',
    "json": '{"a": [1, 2.5e-3, null], "b": {"c": "\\u00e9\\n"}}',
    "sql": "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;\n",
    "shell": "for f in *.txt; do\n  grep -n 'x' \"$f\" | sort -u > out.log\ndone\n",
    "markdown": "# Title  \n\n```python\n>>> 1 + 1\n2\n```\n\n* item\n  * nested | table |\n[link](https://a.b/c?d=e)\n",
    "spaces": "a  b   c    d\te\t\tf",
    "only_white_space": " \n\t \r\n\r\n   \u00a0\u2003",
    "indentation": "\n    \n        x\n\t\ty\n",
    "control_look_alikes": "<|END|> ＜|end|＞ <0x0A> <|end| >",
    "control_strings": "<|user|>\nhi<|end|>\n</s><eod>",
    "nul_and_controls": "a\x00b\x1f\x7f\x85",
    "not_normalised": "ﬁ ① Ｆｕｌｌ ² Å e\u0301",
    "empty": "",
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_default_tokenizer()


def encode_all(tokenizer) -> dict:
    return {
        name: {
            "text": text,
            "ids": tokenizer.encode(text),
            "untrusted": tokenizer.encode_untrusted(text, add_bos=False),
        }
        for name, text in TEXTS.items()
    }


def test_ids_are_the_golden_ones(tokenizer):
    found = {"checksum": tokenizer.checksum, "texts": encode_all(tokenizer)}
    if os.environ.get("COGNEXIS_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, ensure_ascii=True, indent=None, separators=(",", ":")) + "\n")
    golden = json.loads(GOLDEN.read_text())
    different = [name for name in TEXTS if found["texts"][name] != golden["texts"].get(name)]
    assert different == [] and golden["texts"].keys() == TEXTS.keys()
    assert found["checksum"] == golden["checksum"]


def test_golden_texts_round_trip(tokenizer):
    for name, entry in json.loads(GOLDEN.read_text())["texts"].items():
        assert tokenizer.decode(entry["untrusted"]) == entry["text"], name
        assert tokenizer.unk_token_id not in entry["untrusted"]
        assert min(entry["untrusted"], default=10) >= len(CONTROL_TOKENS)


def test_another_process_gives_the_same_ids(tmp_path):
    script = (
        "import json, sys\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])\n"
        "texts = json.load(open(sys.argv[2]))['texts']\n"
        "print(json.dumps([n for n, e in texts.items() if tokenizer.encode(e['text']) != e['ids']]))\n"
    )
    assert run_without_package(script, DEFAULT_TOKENIZER, GOLDEN, hf_home=tmp_path) == []


def test_files_are_complete(tokenizer):
    assert {path.name for path in DEFAULT_TOKENIZER.iterdir()} == {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer_manifest.json", "chat_template.jinja"),
    }
    assert len(tokenizer) == 8192
    assert tuple(tokenizer.convert_ids_to_tokens(range(266))) == CONTROL_TOKENS + BYTE_TOKENS
    assert tokenizer.manifest["chat_template"] == "chatml_v1" and tokenizer.manifest["type"] == "sentencepiece"


def test_sources_are_named_with_permissive_licences(tokenizer):
    sources = tokenizer.manifest["source"]
    assert {source["licence"] for source in sources} <= {"PSF-2.0", "BSD-3-Clause", "Apache-2.0", "MIT"}
    assert all(source["version"] and len(source["sha256"]) == 64 for source in sources)
    assert sum(source["num_characters"] for source in sources) > 10_000_000


def test_text_of_many_kinds_is_short_in_tokens(tokenizer):
    """Bytes per token; the bounds lie below what was measured when the tokenizer was made."""
    texts = json.loads(GOLDEN.read_text())["texts"]
    ratios = {name: len(e["text"].encode()) / max(1, len(e["untrusted"])) for name, e in texts.items()}
    for name, least in {"sentence": 2.5, "python": 1.6, "russian": 2.2, "german": 1.4, "sql": 1.5}.items():
        assert ratios[name] > least, (name, ratios[name])
