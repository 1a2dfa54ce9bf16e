"""Untrusted files run no code, and faulty ones raise errors that leave the pool unchanged."""

import json
import os
import pickle
import resource
import struct
import time
import zipfile

import pytest
import torch
from pool_support import Base, assert_same, assert_slot_holds, config, snapshot, state

from lora_ext.adapter import save_adapter
from lora_ext.layers.model import _patterns
from lora_ext.pool import AdapterPool


@pytest.fixture
def pool():
    pool = AdapterPool(Base(), max_slots=2, max_rank=8)
    pool.load("good", (config(), state(0)))
    return pool


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path, config(), state(1))
    return tmp_path


def refused(pool, source, match, kind=ValueError, **arguments):
    before = snapshot(pool)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(kind, match=match):
        pool.load("bad", source, **arguments)
    assert_same(before, snapshot(pool))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak  # in KiB
    assert grown < 256 << 10, "a small file must not cause a large allocation"


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


@pytest.mark.parametrize("keep", [0, 3, 8, 40, -1, -100])
def test_truncated_safetensors_are_refused(pool, folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(pool, folder, r"adapter_model\.safetensors")


@pytest.mark.parametrize("length", [0, 1, 1 << 30, 1 << 62, (1 << 64) - 1])
def test_wrong_header_length_is_refused(pool, folder, length):
    path = folder / "adapter_model.safetensors"
    write(path, *header_of(path), length=length)
    refused(pool, folder, "header")


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"a":1,"a":1}',
        b'{"a": NaN}',
        b"\xff\xfe",
        b'{"x": ' + b"9" * 100_000 + b"}",
    ],
)
def test_invalid_json_is_refused(pool, folder, text):
    good = (folder / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(text)
    refused(pool, folder, r"adapter_config\.json")
    (folder / "adapter_config.json").write_bytes(good)
    write(folder / "adapter_model.safetensors", text)
    refused(pool, folder, r"adapter_model\.safetensors")


KEY = "base_model.model.up.lora_A.weight"


@pytest.mark.parametrize(
    "edit",
    [
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [-4, 12]},
        {"shape": [4.0, 12]},
        {"shape": [True, 12]},
        {"shape": "4"},
        {"shape": [1] * 100},
        {"data_offsets": [0, 1 << 40]},
        {"data_offsets": [0]},
        {"data_offsets": [192, 0]},
        {"data_offsets": [-192, 0]},
        {"dtype": "I32"},
        {"dtype": "F8_E4M3"},
        {"dtype": 3},
        {"extra": 1},
        {"shape": [8, 6]},
        {"shape": [48]},
    ],
)
def test_wrong_tensor_entry_is_refused(pool, folder, edit):
    path = folder / "adapter_model.safetensors"
    header, body = header_of(path)
    header[KEY].update(edit)
    write(path, header, body)
    refused(pool, folder, r"up\.lora_A|data_offsets|bytes of tensors")


def test_overlapping_tensors_and_trailing_bytes_are_refused(pool, folder):
    path = folder / "adapter_model.safetensors"
    header, body = header_of(path)
    write(path, header, body + b"secret")
    refused(pool, folder, "bytes of tensors")
    header["base_model.model.down.lora_B.weight"]["data_offsets"] = header[KEY]["data_offsets"]
    write(path, header, body)
    refused(pool, folder, "neither overlap nor leave gaps")


def test_only_links_to_regular_files_are_followed(pool, folder, tmp_path):
    path = folder / "adapter_model.safetensors"
    real = path.rename(folder / "blob")
    path.symlink_to(real)
    pool.load("linked", folder)  # The Hub's cache uses such links.
    for target in ("/dev/zero", str(folder), "/nonexistent"):
        path.unlink()
        path.symlink_to(target)
        refused(pool, folder, "cannot be opened|expected a regular file")
    path.unlink()
    os.mkfifo(path)
    refused(pool, folder, "expected a regular file")
    refused(pool, folder / "nowhere", "cannot be opened")
    refused(pool, "null\0byte", "cannot be opened")


def test_paths_in_a_config_are_not_followed(pool, folder):
    raw = config(base_model_name_or_path="/etc", revision="../..", auto_mapping={"x": "os.system"})
    save_adapter(folder, raw, state(1))
    pool.load("x", folder)
    with pool.acquire(["x"]) as slots:
        assert_slot_holds(pool, slots[0], state(1), 2.0)


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickles_are_not_executed(pool, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    path = folder / "adapter_model.bin"
    torch.save({KEY: _Runs()}, path)
    refused(pool, folder, r"expected only tensors, found a pickle that imports \w+\.mkdir")
    path.write_bytes(pickle.dumps(_Runs()))
    refused(pool, folder, "expected a zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"garbage")
    refused(pool, folder, "expected tensors as torch.save writes them, found a damaged file")
    torch.save([state(1)], path)
    refused(pool, folder, "expected a dict of tensors")
    torch.save({KEY: torch.zeros(3).to_sparse()}, path)
    refused(pool, folder, "dense tensor|expected only tensors")
    assert not (tmp_path / "executed").exists()


def test_zip_bomb_is_not_decompressed(pool, folder):
    (folder / "adapter_model.safetensors").unlink()
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    refused(pool, folder, "uncompressed entries")


def test_tensors_that_do_not_fit_are_refused(pool):
    def changed(edit, **fields):
        tensors = state(1)
        edit(tensors)
        return config(**fields), tensors

    refused(pool, changed(lambda t: t.pop(KEY)), r"up: expected lora_\{A.weight, B.weight\}")
    refused(pool, changed(lambda t: t.update({KEY: t[KEY].T})), r"shape: expected \(4, 12\)")
    refused(pool, changed(lambda t: t.update({KEY: t[KEY].int()})), "dtype: expected float16")
    refused(pool, changed(lambda t: t[KEY].fill_(float("nan"))), "expected finite values")
    refused(pool, changed(lambda t: t[KEY][0].fill_(float("inf"))), "expected finite values")
    refused(pool, changed(lambda t: t.update({KEY: 3})), "found .*int")
    refused(
        pool, changed(lambda t: t.update({KEY: t[KEY].to("meta")})), "up.* found a tensor on meta"
    )
    refused(pool, changed(lambda t: t.update({KEY: t[KEY].to_sparse()})), "found torch.sparse_coo")
    refused(
        pool,
        changed(lambda t: t.update({KEY.replace("A.w", "A.two.w"): t[KEY]})),
        "a single adapter",
    )
    refused(pool, changed(lambda t: None, targets=("up", "down", "head")), "found none for head")
    refused(pool, (config(9), state(1, 9)), "at most max_rank=8, found 9")
    refused(pool, (config(lora_bias=True), state(1)), r"lora_bias=True")
    refused(pool, (config(), state(1, bias=True)), r"lora_bias=False")
    refused(pool, (config(), {}), "found none for down, up")
    half = AdapterPool(Base(), max_slots=1, max_rank=8, dtype=torch.float16)
    refused(half, changed(lambda t: t[KEY].fill_(1e6)), "expected finite values in torch.float16")


def test_unknown_content_is_refused_or_listed_as_skipped(pool):
    for extra, fields in (
        ({"base_model.model.nowhere.lora_A.weight": torch.zeros(1)}, {}),
        ({"surprise": torch.zeros(1)}, {}),
        ({}, {"future_method": {"on": True}}),
        ({}, {"rank_pattern": {"nowhere": 3}}),
    ):
        source = config(**fields), {**state(1), **extra}
        refused(pool, source, "expected only tensors and fields")
        skipped = pool.load("lenient", source, strict=False)
        assert len(skipped) == len(extra) + len(fields)
        pool.unload("lenient")


def test_factors_of_a_module_outside_the_targets_are_never_skipped(pool):
    source = config(), {**state(1), **state(1, targets=("head",))}
    for strict in (True, False):
        refused(pool, source, "config targets, found base_model.model.head.lora_A", strict=strict)
    source = config(exclude_modules=["down"]), state(1)
    refused(pool, source, "config targets, found base_model.model.down.lora_A", strict=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"r": True},
        {"r": 4.0},
        {"r": 1 << 80},
        {"lora_alpha": "8"},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"rank_pattern": {"up": -1}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"up": None}},
        {"use_rslora": "yes"},
        {"bias": "all"},
        {"peft_type": 3},
        {"target_modules": 3},
        {"target_modules": [3]},
        {"target_modules": "(up"},
        {"target_modules": "x" * (1 << 17)},
        {"target_modules": "up|down", "layers_to_transform": [0]},
        {"layers_to_transform": [0.5]},
        {"layers_pattern": "layers"},
        {"exclude_modules": "(up"},
        {"rank_pattern": {"(up": 3}},
    ],
)
def test_invalid_config_fields_are_refused(pool, fields):
    refused(pool, ({**config(), **fields}, state(1)), next(iter(fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["up", "down", "norm"]},
        {"target_parameters": ["up.weight"]},
        {"layer_replication": [[0, 1]]},
        {"ensure_weight_tying": True},
        {"kasa_config": {"beta": 1}},
        {"init_lora_weights": "pissa_niter_4"},
    ],
)
def test_features_of_peft_that_the_pool_lacks_are_refused_by_name(pool, fields):
    name = next(iter(fields))
    refused(pool, ({**config(), **fields}, state(1)), name, NotImplementedError)


def test_factors_of_an_embedding_that_do_not_fit_are_refused(pool):
    stem = "base_model.model.embed.lora_"
    good = {f"{stem}embedding_A": torch.ones(4, 7), f"{stem}embedding_B": torch.ones(12, 4)}
    raw = config(targets=("embed",))
    for key, value in good.items():
        left = {k: v for k, v in good.items() if k != key}
        refused(pool, (raw, left), r"embed: expected lora_\{embedding_A, embedding_B\}, found")
        refused(pool, (raw, {**left, key: value.T}), rf"{key}: shape: expected")
        refused(pool, (raw, {**left, key: value.int()}), rf"{key}: dtype: expected float16")
        refused(pool, (raw, {**left, key: value * float("nan")}), rf"{key}: expected finite")
        refused(pool, (raw, {**good, key + ".two": value}), "expected a single adapter")
    linear = {f"{stem}A.weight": torch.ones(4, 7), f"{stem}B.weight": torch.ones(12, 4)}
    refused(pool, (raw, linear), r"found lora_\{A.weight, B.weight\}")
    refused(pool, (config(), {**state(1), **good}), "that adapter config targets, found")
    up = {k.replace("embed.", "up."): v for k, v in good.items()}
    refused(pool, (config(), {**state(1), **up}), r"up: expected lora_\{A.weight, B.weight\}")
    refused(pool, ({**raw, "lora_bias": True}, good), "lora_bias: expected false for an adapter")
    dora = {**good, f"{stem}magnitude_vector": torch.ones(12)}
    refused(pool, ({**raw, "use_dora": True}, dora), "use_dora .* on embed", NotImplementedError)
    pool.load("fits", (raw, good))


MAGNITUDE = "base_model.model.up.lora_magnitude_vector"


def test_magnitudes_that_do_not_fit_are_refused(pool):
    def changed(edit, **fields):
        tensors = state(1, dora=True)
        edit(tensors)
        return config(**{"use_dora": True, **fields}), tensors

    def put(value):
        return lambda t: t.update({MAGNITUDE: value})

    def nothing(_):
        pass

    good = torch.ones(20)
    missing = r"up: expected lora_\{A.weight, B.weight, magnitude_vector\}, found lora_\{A.weight, "
    refused(pool, changed(lambda t: t.pop(MAGNITUDE)), missing + r"B.weight\}")
    refused(pool, changed(lambda t: t.pop(KEY)), r"found lora_\{B.weight, magnitude_vector\}")
    surplus = r"found lora_\{A.weight, B.weight, magnitude_vector\} \(.*use_dora=False\)"
    refused(pool, changed(nothing, use_dora=False), surplus)
    for wrong in (good[:19], good[None], good[:, None], good[:0], torch.tensor(1.0)):
        refused(pool, changed(put(wrong)), r"up.lora_magnitude_vector: shape: expected \(20,\)")
    refused(pool, changed(put(good.int())), "up.lora_magnitude_vector: dtype: expected float16")
    for bad in (float("nan"), float("inf"), 1e300):
        refused(pool, changed(put(good.double() * bad)), "magnitude_vector: expected finite values")
    for twice in (MAGNITUDE + ".weight", MAGNITUDE + ".default", MAGNITUDE + ".default.weight"):
        refused(pool, changed(lambda t, k=twice: t.update({k: good})), "expected a single adapter")
    for odd in (MAGNITUDE + ".a.b.weight", MAGNITUDE + ".weight.x.y", MAGNITUDE + "s"):
        refused(pool, changed(lambda t, k=odd: t.update({k: good})), "expected only tensors and")
    lost = MAGNITUDE.replace("up", "head")
    refused(pool, changed(lambda t: t.update({lost: good[:5]})), "config targets, found")
    refused(pool, changed(nothing, use_dora="yes"), "use_dora: expected true or false")
    refused(pool, changed(nothing, lora_bias=True), "lora_bias: expected false with use_dora")
    half = AdapterPool(Base(), max_slots=1, max_rank=8, dtype=torch.float16)
    half.load("x", changed(put(good * 1e6)))
    assert half.modules["up"].after.dtype == torch.float32, "float32, as in PEFT"


def test_catastrophic_regular_expression_times_out(pool, monkeypatch):
    monkeypatch.setattr(_patterns, "TIMEOUT_S", 1.0)
    base = Base()
    base.add_module("a" * 60, torch.nn.Linear(3, 3))
    pool = AdapterPool(base, max_slots=1, max_rank=8)
    start = time.monotonic()
    refused(pool, ({**config(), "target_modules": "(a+)+b"}, state(1)), "catastrophic")
    assert time.monotonic() - start < 20
