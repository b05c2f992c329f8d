"""Files that are not what they say they are: broken headers, pickles, links, other files."""

import io
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError

from ..tiny import build
from .attack import CONFIGS, ENTRIES, Attacks, check_refused, harmless, read_tensors, tensors, untouched, weights


attacks = Attacks()


def header(adapter: Path) -> dict:
    data = weights(adapter).read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def write_header(adapter: Path, text: str | bytes, length: int | None = None) -> None:
    """Put another header before the tensors' bytes, with its own length or a wrong one."""
    data = weights(adapter).read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    text = text.encode() if isinstance(text, str) else text
    weights(adapter).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def first_tensor(adapter: Path) -> tuple[dict, dict]:
    """The header, and in it the entry of its first tensor."""
    whole = header(adapter)
    return whole, whole[min(key for key in whole if key != "__metadata__")]


@attacks(SafetensorError, "header")
def an_empty_file(adapter):
    weights(adapter).write_bytes(b"")


@attacks(SafetensorError, "header")
def a_file_of_seven_bytes(adapter):
    weights(adapter).write_bytes(b"\x01" * 7)


@attacks(SafetensorError, "header")
def a_header_longer_than_the_file(adapter):
    write_header(adapter, json.dumps(header(adapter)), length=10**6)


@attacks(SafetensorError, "header")
def a_header_of_two_to_the_63(adapter):
    write_header(adapter, json.dumps(header(adapter)), length=2**63)


@attacks(SafetensorError, "header")
def a_header_of_200_megabytes(adapter):
    text = json.dumps(header(adapter)).encode()
    with weights(adapter).open("wb") as file:
        file.write(struct.pack("<Q", 2 * 10**8) + text)
        file.truncate(2 * 10**8 + 10**4)  # sparse


@attacks(SafetensorError, "header")
def a_header_cut_off(adapter):
    write_header(adapter, json.dumps(header(adapter))[:-10])


@attacks(SafetensorError, "header")
def a_header_that_is_not_utf_8(adapter):
    write_header(adapter, b'{"\xff\xfe": 1}')


@attacks(SafetensorError, "header")
def a_header_that_is_a_list(adapter):
    write_header(adapter, "[1, 2, 3]")


@attacks(SafetensorError, "header|recursion")
def a_deeply_nested_header(adapter):
    write_header(adapter, '{"a":' * 100000 + "1" + "}" * 100000)


@attacks(SafetensorError, "header|[Oo]ffset")
def offsets_beyond_the_file(adapter):
    whole, entry = first_tensor(adapter)
    entry["data_offsets"] = [10**9, 10**9 + 128]
    write_header(adapter, json.dumps(whole))


@attacks(SafetensorError, "header|[Oo]ffset")
def offsets_that_overlap(adapter):
    whole, entry = first_tensor(adapter)
    for other in whole.values():
        if other is not entry and other.get("shape") == entry["shape"]:
            entry["data_offsets"] = other["data_offsets"]
            break
    write_header(adapter, json.dumps(whole))


@attacks(SafetensorError, "header|[Oo]ffset")
def negative_offsets(adapter):
    whole, entry = first_tensor(adapter)
    entry["data_offsets"] = [-128, 0]
    write_header(adapter, json.dumps(whole))


@attacks(SafetensorError, "header|[Ii]nvalid|overflow")
def a_shape_that_overflows(adapter):
    whole, entry = first_tensor(adapter)
    entry["shape"] = [2**40, 2**40]
    write_header(adapter, json.dumps(whole))


@attacks(SafetensorError, "header|[Ii]nvalid")
def a_shape_of_more_than_its_bytes(adapter):
    whole, entry = first_tensor(adapter)
    entry["shape"] = [10**6]
    write_header(adapter, json.dumps(whole))


@attacks(SafetensorError, "header|dtype")
def a_dtype_that_does_not_exist(adapter):
    whole, entry = first_tensor(adapter)
    entry["dtype"] = "F31"
    write_header(adapter, json.dumps(whole))


@attacks(SafetensorError, "header|duplicate")
def a_tensor_named_twice(adapter):
    whole, entry = first_tensor(adapter)
    twice = json.dumps(min(key for key in whole if whole[key] is not entry and key != "__metadata__"))
    write_header(adapter, f"{json.dumps(whole)[:-1]}, {twice}: {json.dumps(entry)}}}")


@attacks(SafetensorError, "header|MetadataIncompleteBuffer|not fully covered|incomplete")
def a_file_cut_off(adapter):
    weights(adapter).write_bytes(weights(adapter).read_bytes()[:-16])


@attacks(SafetensorError, "header|MetadataIncompleteBuffer|not fully covered|incomplete")
def a_second_file_behind_it(adapter):
    weights(adapter).write_bytes(weights(adapter).read_bytes() + b"PK\x03\x04" * 100)


@attacks(SafetensorError, "header")
def a_pickle_called_safetensors(adapter):
    torch.save(read_tensors(adapter), weights(adapter))


@attacks(SafetensorError, "header")
def a_link_to_another_file(adapter):
    weights(adapter).unlink()
    weights(adapter).symlink_to(__file__)


@attacks(
    (SafetensorError, OSError, ValueError), "no such file|No such file|not found|find|Repo id|does not appear|header"
)
def a_link_to_nowhere(adapter):
    weights(adapter).unlink()
    weights(adapter).symlink_to(adapter / "nowhere")


@attacks((SafetensorError, OSError, ValueError), "directory|device|find|Repo id|does not appear|header")
def a_directory_in_its_place(adapter):
    weights(adapter).unlink()
    weights(adapter).mkdir()


@attacks((OSError, ValueError), "find|Repo id|does not appear|No such file")
def no_file(adapter):
    weights(adapter).unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Pickles. Where there is no safetensors file PEFT reads `adapter_model.bin`, but only tensors (torch's `weights_only`);
# transformers' own `load_adapter` does not look for it.
# ----------------------------------------------------------------------------------------------------------------------

UNPICKLING = (pickle.UnpicklingError, RuntimeError, OSError)
NOT_READ = "|No such file.*safetensors"


class Payload:
    """Unpickled, it writes a file: the sign that code was executed."""

    def __init__(self, sign: Path) -> None:
        self.sign = str(sign)

    def __reduce__(self):
        return Path.write_text, (Path(self.sign), "executed")


def as_pickle(adapter: Path, data: bytes) -> None:
    weights(adapter).unlink()
    (adapter / "adapter_model.bin").write_bytes(data)


def zipped(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@attacks(UNPICKLING, "[Ww]eights.only" + NOT_READ)
def a_pickle_with_a_payload(adapter):
    as_pickle(adapter, zipped({"a": Payload(adapter / "sign")}))


@attacks(UNPICKLING, "[Ww]eights.only" + NOT_READ)
def a_pickle_with_a_payload_among_good_tensors(adapter):
    as_pickle(adapter, zipped(read_tensors(adapter) | {"a": Payload(adapter / "sign")}))


@attacks(UNPICKLING, "[Ww]eights.only|[Uu]npickl|checkpoint|Invalid magic" + NOT_READ)
def a_bare_pickle_with_a_payload(adapter):
    as_pickle(adapter, pickle.dumps(Payload(adapter / "sign")))


@attacks(UNPICKLING, "[Ww]eights.only" + NOT_READ)
def a_pickled_module(adapter):
    as_pickle(adapter, zipped(torch.nn.Linear(2, 2)))


@attacks((ValueError, *UNPICKLING), "lacks the tensor|[Ww]eights.only" + NOT_READ)
def a_pickle_of_no_tensors(adapter):
    as_pickle(adapter, zipped({}))


@attacks.cases(but=("low_cpu_mem_usage", "native_second"))  # they differ after the files are read
def test_refused(attack, entry, good, bad):
    check_refused(attack._replace(unread=attack.spoil is not a_pickle_of_no_tensors), entry, good, bad)
    assert not (bad / "sign").exists()


def test_the_payload_works(tmp_path):
    """Else the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "sign")))
    assert (tmp_path / "sign").read_text() == "executed"


def test_safetensors_come_first(bad):
    """A pickle beside the safetensors file is not read."""
    (bad / "adapter_model.bin").write_bytes(pickle.dumps(Payload(bad / "sign")))
    for entry in ("from_pretrained", "native"):
        ENTRIES[entry].load(build("llama")[0], bad)
    assert not (bad / "sign").exists()


def test_a_link_to_a_good_file_loads(good, bad):
    """As in the Hub's cache."""
    weights(bad).unlink()
    weights(bad).symlink_to(weights(good))
    PeftModel.from_pretrained(build("llama")[0], bad)


@pytest.mark.parametrize("error", [SafetensorError, KeyboardInterrupt])
def test_after_an_unread_file_the_good_one_loads(good, bad, error, monkeypatch):
    """The adapter that an unreadable file, or an interruption, has left behind changes nothing and is not in the way."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    load = "peft.peft_model.load_peft_weights"
    weights(bad).write_bytes(b"")
    model, batch, _ = build("llama")
    expected = PeftModel.from_pretrained(build("llama")[0], good)(**batch).logits
    with monkeypatch.context() as patches:
        if error is KeyboardInterrupt:
            patches.setattr(load, interrupt)
        with harmless(model), pytest.raises(error):
            PeftModel.from_pretrained(model, bad)
    model = PeftModel.from_pretrained(model, good)
    assert torch.equal(model(**batch).logits, expected)

    with harmless(model), pytest.raises(SafetensorError):
        model.load_adapter(bad, "second")
    model.load_adapter(good, "second")
    model.set_adapter("second")
    assert torch.equal(model(**batch).logits, expected)

    model = build("llama")[0]
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(model, bad, low_cpu_mem_usage=True)  # tensors without values
    assert torch.equal(PeftModel.from_pretrained(model, good, low_cpu_mem_usage=True)(**batch).logits, expected)


def test_a_refused_load_over_an_adapter_that_is_there_keeps_it(good, bad):
    """Such as a trained one, into which the Trainer loads its best checkpoint."""
    with tensors(bad) as state:
        state[min(state)].fill_(torch.nan)
    for model in (
        PeftModel.from_pretrained(build("llama")[0], good),
        get_peft_model(build("llama")[0], CONFIGS[good.name]()),
    ):
        with untouched(model), pytest.raises(ValueError, match="not finite"):
            model.load_adapter(bad, "default")
