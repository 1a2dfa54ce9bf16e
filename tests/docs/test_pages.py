"""Run the Python blocks of the README and of every page, in their order, and check the texts."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from scripts import ROOT
from tiny import adapted

sys.path.extend([str(ROOT / "tools"), str(ROOT / "examples")])
import training  # Neither examples nor tools is a package.
from wrap_docs import WIDTH, paragraphs, prose, wrapped

ALL = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [page for page in ALL if page.parent.name in ("docs", "notes")]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    str(page.relative_to(ROOT)): blocks
    for page in ALL
    if (blocks := _BLOCK.findall(page.read_text()))
}


# Every page that uses the folder of `make demo` must contain these sentences. The README need not.
LEFT = (
    "`make demo` writes `base-model` and the adapters to `out/demo`. "
    "Run the code of this page there."
)


def save_stand_in(path: Path) -> None:
    """Save a small Llama with the vocabulary, the special tokens and the chat template of SmolLM2.

    Its tokenizer has one token for each byte.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<unused {i}>" for i in range(49152 - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    unknown, begin, end = special
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unknown, bos_token=begin, eos_token=end, pad_token=end
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="session")
def left_by_the_demo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    """Return the paths of the base model and the adapters, from the folder of `--demo` or small
    substitutes."""
    given = request.config.getoption("--demo")
    names = [recipe.name for recipe in training.RECIPES]
    if given is not None:
        return given / "base-model", {name: given / "adapters" / name for name in names}
    folder = tmp_path_factory.mktemp("stand-in")
    save_stand_in(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    configs = {
        recipe.name: dataclasses.replace(recipe, first_layer=1).config(3)
        for recipe in training.RECIPES
    }
    adapted(model, configs, 0.15).save_pretrained(folder)
    return folder / "base", {name: folder / name for name in names}


@pytest.fixture
def demo_folder(
    left_by_the_demo: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change to a new folder with the layout of `out/demo` after `make demo`."""
    training.lay_out(*left_by_the_demo, tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("error:.*expected adapters of one base model")
@pytest.mark.usefixtures("demo_folder")
@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_page_runs(page: str) -> None:
    scope: dict[str, object] = {}
    for number, block in enumerate(PAGES[page]):
        exec(compile(block, f"<{page}, block {number}>", "exec"), scope)
        answers = scope.pop("answers", None)
        if isinstance(answers, torch.Tensor):
            assert len({tuple(row.tolist()) for row in answers}) == 3  # Each row used its adapter.


def test_page_names_the_source_of_its_base_model_and_adapters() -> None:
    using = re.compile(
        r"^```py(?:thon)?\n(?:(?!```).)*\"(?:base-model|adapters/)", re.DOTALL | re.M
    )
    for page in [page for page in ALL if page.name not in ("README.md", "index.md")]:
        text = page.read_text()
        if found := using.search(text):
            assert LEFT in " ".join(text[: found.start()].split()), page.name


def test_no_text_installs_an_extra_from_pypi_where_the_package_is_missing() -> None:
    files = [*ALL, *(ROOT / "docs").rglob("*.ipynb")]
    files += [p for d in ("lora_ext", "examples") for p in (ROOT / d).rglob("*.py")]
    named = [
        str(p.relative_to(ROOT)) for p in files if re.search(r"lora_ext\[[a-z]", p.read_text())
    ]
    assert not named, f"write `pip install --no-build-isolation '.[extra]'`: {named}"


def test_index_lists_every_page_and_the_readme_is_short() -> None:
    index = (ROOT / "docs/index.md").read_text()
    listed = set(re.findall(r"\]\(((?:notes/)?\w+\.md)", index))
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/notes").glob("*.md")]
    assert listed == {p.relative_to(ROOT / "docs").as_posix() for p in pages} - {"index.md"}
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in ALL])
def test_links_of_the_page_have_targets(page: str) -> None:
    prose = re.sub(
        r"^ *```.*?^ *```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        assert "://" in link or (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_pages_and_sections_that_code_names_exist() -> None:
    """Check references in code such as `docs/page.md` or `docs/page.md, "Section"`, where the
    section is a heading or bold text."""
    named = re.compile(r'(docs/[\w/]+\.md)`*(?:,\s+"([^"]+)"(?: and "([^"]+)")?)?')
    seen = 0
    for file in [p for d in ("lora_ext", "csrc") for p in (ROOT / d).rglob("*") if p.is_file()]:
        if file.suffix not in (".py", ".cpp", ".h", ".cu", ".cuh"):
            continue
        for page, *sections in named.findall(file.read_text()):
            text = (ROOT / page).read_text()
            for section in filter(None, sections):
                start = rf"^(#+ |\*\*){re.escape(section)}"
                assert re.search(start, text, re.MULTILINE), (str(file), page, section)
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_lines_of_prose_and_paragraphs_are_short(page: Path) -> None:
    """Check all lines except tables, code, images and links without spaces."""
    long = [n for n, line in prose(page.read_text()) if len(line) > WIDTH and " " in line.strip()]
    assert not long, f"{page.name}: too long lines {long}: run `python tools/wrap_docs.py`"
    long = [each[:60] for each in paragraphs(page.read_text()) if len(each.split()) > 120]
    assert not long, f"{page.name}: paragraphs of more than 120 words: {long}"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_page_begins_with_its_purpose(page: Path) -> None:
    first = next(paragraphs(page.read_text()))
    assert re.search(r"This page (is|explains)|Use it when|Nobody needs this page", first), first


def test_paragraphs_and_items_are_separate_and_wrapping_changes_only_line_breaks() -> None:
    text = "# No\n\none\ntwo\n\n* three\n  four\n* five\n\n```\nno\n```\n| no |\n"
    assert list(paragraphs(text)) == ["one two", "* three four", "* five"]
    words = "a word " * 30
    table, code = f"| {words} |", f"```\n{words}\n```"
    formula = f"    y = {words}\n\n        x = {words}\n"
    text = f"# {words}\n\n* {words}\n  {words}\n\n{table}\n\n{code}\n\n{words}\n\n{formula}"
    new = wrapped(text)
    assert new.split() == text.split() and wrapped(new) == new
    lines = new.splitlines()
    assert lines[0] == f"# {words}" and table in lines and words in lines
    assert new.endswith(formula)
    assert max(len(line) for _, line in prose(new)) <= WIDTH
    assert [line[:2] for line in lines[2:5]] == ["* ", "  ", "  "]


@pytest.mark.parametrize("page", ["generating.md", "works_with.md"])
def test_tests_that_the_tables_name_exist(page: str) -> None:
    """Check the last cell of each table row. It contains paths below tests/. A name without a
    folder is in the folder of the path before it."""
    rows = [row for row in (ROOT / "docs" / page).read_text().splitlines() if row.startswith("| ")]
    named = [re.findall(r"`(?:(\w+)/)?(test_\w+\.py)`", row.rsplit("|", 2)[1]) for row in rows]
    for row, files in zip(rows, named, strict=True):
        folder = ""
        for place, name in files:
            folder = place or folder
            assert (ROOT / "tests" / folder / name).exists(), row
    assert sum(map(bool, named)) > 20
