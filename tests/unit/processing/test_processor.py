from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from cogtune import CogVLM2Processor
from cogtune.errors import CheckpointError, DataError, InputError
from cogtune.processing.image import preprocess
from tests.support.tokenizers import tiny_tokenizer

PICTURE = Image.radial_gradient("L").resize((20, 13)).convert("RGB")


def test_inputs_of_a_question_with_picture(processor):
    inputs = processor(image=PICTURE, query="Why?", history=[("a", "b")])
    assert list(inputs) == ["input_ids", "token_type_ids", "attention_mask", "pixel_values"]
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert inputs[key].dtype == torch.int64
        assert inputs[key].shape == inputs["input_ids"].shape
    assert inputs["input_ids"].tolist() == [[256, *[258] * 6, *b"Question: a Answer: b\nQuestion: Why? Answer:"]]
    assert inputs["token_type_ids"].sum() == 6
    assert inputs["attention_mask"].all()
    assert torch.equal(inputs["pixel_values"], preprocess(PICTURE, 8)[None])
    assert inputs["pixel_values"].dtype == torch.float32


def test_answer_gives_labels(processor):
    inputs = processor(image=PICTURE, query="Why?", answer="So.")
    assert list(inputs) == ["input_ids", "token_type_ids", "attention_mask", "pixel_values", "labels"]
    assert inputs["labels"][0, -5:].tolist() == [-100, *b"So.", 257]
    assert inputs["labels"].dtype == torch.int64


def test_text_only(processor):
    inputs = processor(query="Why?")
    assert list(inputs) == ["input_ids", "token_type_ids", "attention_mask"]
    assert inputs["input_ids"].tolist() == [[256, *b"Question: Why? Answer:"]]


def test_template_is_the_checkpoints_unless_given(make_folder):
    processor = CogVLM2Processor.from_pretrained(make_folder(template_version="vqa"))
    assert processor.decode(processor(query="q")["input_ids"][0]) == "Question: q Short answer:"
    assert processor.decode(processor(query="q", template="base")["input_ids"][0]) == "q"


def test_pictures_by_path_array_mode_and_list(processor, tmp_path):
    path = tmp_path / "P.PNG"
    PICTURE.save(path)
    expected = processor(image=PICTURE, query="q")["pixel_values"]
    for image in (path, str(path), [PICTURE], (path,), PICTURE.convert("RGBA")):
        assert torch.equal(processor(image=image, query="q")["pixel_values"], expected)


def test_encoding_needs_no_picture(processor):
    encoded = processor.encode("Why?", answer="So.", images=1)
    inputs = processor(image=PICTURE, query="Why?", answer="So.")
    assert [encoded.input_ids] == inputs["input_ids"].tolist()
    assert [encoded.labels] == inputs["labels"].tolist()


def test_wrong_input(processor, tmp_path):
    with pytest.raises(InputError, match="2 pictures given; CogVLM2 takes one"):
        processor(image=[PICTURE, PICTURE], query="q")
    with pytest.raises(InputError, match="0 pictures"):
        processor(image=[], query="q")
    with pytest.raises(InputError, match="the picture is a Tensor"):
        processor(image=torch.zeros(3, 8, 8), query="q")
    with pytest.raises(InputError, match="there is no query"):
        processor(image=PICTURE)
    with pytest.raises(InputError, match="chat, vqa, base"):
        processor(query="q", template="llama3")
    with pytest.raises(InputError, match="history item 1"):
        processor(query="q", history=["ab"])
    with pytest.raises(DataError, match="no such picture"):
        processor(image=tmp_path / "none.png", query="q")


def test_left_padding_keeps_rows_on_the_right(processor):
    rows = [
        processor(query="a longer question"),
        processor(image=PICTURE, query="q"),
        processor(query="q"),
        processor(image=PICTURE.rotate(90), query="another"),
    ]
    batch = processor.pad_left(rows)
    width = max(row["input_ids"].shape[1] for row in rows)
    assert list(batch) == ["input_ids", "token_type_ids", "attention_mask", "pixel_values"]
    for at, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        for key in ("input_ids", "token_type_ids", "attention_mask"):
            assert batch[key].shape == (4, width)
            assert torch.equal(batch[key][at, width - length :], row[key][0])
        assert batch["attention_mask"][at].sum() == length
        assert (batch["input_ids"][at, : width - length] == 258).all()
        assert not batch["token_type_ids"][at, : width - length].any()
    assert torch.equal(batch["pixel_values"], torch.cat([rows[1]["pixel_values"], rows[3]["pixel_values"]]))


def test_left_padding_of_text_only_and_labelled_rows(processor):
    batch = processor.pad_left([processor(query="q", answer="a"), processor(query="qq", answer="b")])
    assert "pixel_values" not in batch
    assert batch["labels"][0].tolist() == [-100, *processor(query="q", answer="a")["labels"][0].tolist()]
    with pytest.raises(InputError, match="some rows have labels"):
        processor.pad_left([processor(query="q", answer="a"), processor(query="q")])
    with pytest.raises(InputError, match="no rows"):
        processor.pad_left([])


def test_decoding_leaves_out_special_tokens_and_keeps_spaces(processor):
    assert processor.decode([*b" It is , well .", 259, 257, 258]) == " It is , well ."
    assert processor.decode(torch.tensor(list("好😀".encode()))) == "好😀"


@pytest.mark.parametrize("eos", [257, [257, 259]])
def test_end_token_may_be_a_number_or_a_list(make_folder, eos):
    processor = CogVLM2Processor.from_pretrained(make_folder(eos_token_id=eos))
    assert processor(query="q", answer="a")["labels"][0, -1] == 257


def test_ids_come_from_the_configuration(make_folder):
    tokenizer = tiny_tokenizer(384, bos=1, eos=2, pad=3, eot=4)
    ids = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 3}
    processor = CogVLM2Processor.from_pretrained(make_folder(tokenizer, **ids))
    row = processor(image=PICTURE, query="", answer="", template="base")["input_ids"][0].tolist()
    assert row == [1, *[3] * 6, 2]


def test_published_folder_and_saved_folder_are_the_same(make_folder, tmp_path):
    source = make_folder()
    saved = tmp_path / "saved"
    processor = CogVLM2Processor.from_pretrained(source)
    processor.save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    again = CogVLM2Processor.from_pretrained(saved)
    one, two = (p(image=PICTURE, query="q 好", answer="a") for p in (processor, again))
    assert all(torch.equal(one[key], two[key]) for key in one)
    processor.save_pretrained(source)  # onto itself: nothing lost
    assert CogVLM2Processor.from_pretrained(source).decode([104, 105]) == "hi"


def test_saving_keeps_the_configuration_a_model_wrote(processor, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"own": 1}')
    processor.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"own": 1}'


def test_a_processor_made_of_parts_saves_itself(processor, tmp_path):
    made = CogVLM2Processor(processor.tokenizer, processor.config)
    made.save_pretrained(tmp_path / "made")
    again = CogVLM2Processor.from_pretrained(tmp_path / "made")
    assert torch.equal(again(query="é", answer="a")["input_ids"], made(query="é", answer="a")["input_ids"])
    assert again.config.num_image_tokens == 6


def test_auto_processor_reads_a_saved_folder(processor, tmp_path):
    transformers = pytest.importorskip("transformers")
    import cogtune.model.modeling  # noqa: F401  (registers the configuration)

    CogVLM2Processor(processor.tokenizer, processor.config).save_pretrained(tmp_path / "made")
    found = transformers.AutoProcessor.from_pretrained(tmp_path / "made")
    assert isinstance(found, CogVLM2Processor)


def test_code_in_the_folder_is_never_run(make_folder):
    folder = make_folder()
    for name in ("configuration_cogvlm.py", "modeling_cogvlm.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')")
    CogVLM2Processor.from_pretrained(folder)
    assert not [name for name in sys.modules if "cogvlm" in name and "transformers_modules" in name]


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(make_folder, missing):
    folder = make_folder()
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"no {missing}") as caught:
        CogVLM2Processor.from_pretrained(folder)
    assert str(folder) in caught.value.message
    assert caught.value.exit_code == 2


def test_folders_that_cannot_work(make_folder, tmp_path):
    broken = make_folder(name="broken")
    (broken / "tokenizer.json").write_text('{"version":')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the tokenizer cannot be read"):
        CogVLM2Processor.from_pretrained(broken)
    not_json = make_folder(name="not-json")
    (not_json / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        CogVLM2Processor.from_pretrained(not_json)
    with pytest.raises(CheckpointError, match=r"264 tokens, but .* has vocab_size 260"):
        CogVLM2Processor.from_pretrained(make_folder(name="small", vocab_size=260))
    with pytest.raises(CheckpointError, match="pad_token_id None"):
        CogVLM2Processor.from_pretrained(make_folder(name="no-pad", pad_token_id=None))
    with pytest.raises(CheckpointError, match="template_version 'old'"):
        CogVLM2Processor.from_pretrained(make_folder(name="template", template_version="old"))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        CogVLM2Processor.from_pretrained(name)
    assert name in caught.value.message


def test_hub_ids_are_read_from_the_hubs_cache(make_folder, tmp_path, monkeypatch):
    cache, commit = tmp_path / "hub", "0" * 40
    repository = cache / "models--someone--cogvlm2"
    shutil.copytree(make_folder(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    processor = CogVLM2Processor.from_pretrained("someone/cogvlm2", cache_dir=cache, local_files_only=True)
    assert processor.config.num_image_tokens == 6
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub repository"):
        CogVLM2Processor.from_pretrained("someone/else", cache_dir=cache, local_files_only=True)


def test_unknown_options_are_refused(make_folder):
    with pytest.raises(InputError, match="no option use_fast"):
        CogVLM2Processor.from_pretrained(make_folder(), use_fast=True)


def test_the_tokenizer_is_the_folders_own_whatever_its_configuration_names(make_folder, tmp_path):
    """A stranger's file names another one of this machine."""
    folder, other = make_folder(), tmp_path / "other.json"
    other.write_text((folder / "tokenizer.json").read_text().replace('"A"', '"Z"', 1))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    wanted = CogVLM2Processor.from_pretrained(folder)(query="ABC")["input_ids"]
    saved = {"tokenizer_file": str(other), "special_tokens_map_file": "/content/model/special_tokens_map.json"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | saved))
    assert torch.equal(CogVLM2Processor.from_pretrained(folder)(query="ABC")["input_ids"], wanted)
    for key in ("vocab_file", "merges_file", "gguf_file"):
        for name in ("../other.json", str(other), "a/../../other.json"):
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {key: name}))
            with pytest.raises(CheckpointError) as caught:
                CogVLM2Processor.from_pretrained(folder)
            assert caught.value.code == "unsafe-name"
            assert "tokenizer_config.json" in caught.value.message
