"""The processor as users of transformers call it: the tokens and pixels are those of our own calls."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, ProcessorMixin

from cogtune import CogVLM2Processor
from cogtune.errors import DataError, InputError

PICTURE = Image.radial_gradient("L").resize((20, 13)).convert("RGB")
OTHER = PICTURE.rotate(90)
IMAGE_PART = {"type": "image", "image": PICTURE}


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text):
    return {"role": "assistant", "content": text}


# messages, question, history
CONVERSATIONS = {
    "one": ([user("Why?")], "Why?", []),
    "text": ([{"role": "user", "content": "Why? 好"}], "Why? 好", []),
    "picture": ([user(IMAGE_PART, "Why?")], "Why?", []),
    "picture behind": ([user("Why?", IMAGE_PART)], "Why?", []),
    "turns": ([user("a"), assistant("B."), user("c"), assistant("d"), user("e?")], "e?", [("a", "B."), ("c", "d")]),
    "later picture": ([user("a"), assistant("B."), user("c?", IMAGE_PART)], "c?", [("a", "B.")]),
    "system": (
        [{"role": "system", "content": "Be brief."}, user(IMAGE_PART), user("a"), assistant("b"), user("c", "d")],
        "c\nd", [("Be brief.\na", "b")],
    ),
    "empty": ([user("")], "", []),
}  # fmt: skip


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        value = one[name] if isinstance(one[name], torch.Tensor) else torch.from_numpy(np.stack(one[name]))
        assert torch.equal(value, other[name])


def test_it_is_a_processor_of_transformers(processor):
    assert isinstance(processor, ProcessorMixin)
    assert processor.get_attributes() == ["tokenizer"]
    assert processor.model_input_names == ["input_ids", "token_type_ids", "attention_mask", "pixel_values"]
    found = processor.image_processor([PICTURE, OTHER], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, torch.cat([processor.pixels(PICTURE), processor.pixels(OTHER)]))
    arrays = processor.image_processor(PICTURE)["pixel_values"]
    assert np.array_equal(np.stack(arrays), processor.pixels(PICTURE).numpy())
    with pytest.raises(InputError, match="preprocessing is fixed: do_resize"):
        processor.image_processor(PICTURE, do_resize=False)
    assert json.loads(processor.to_json_string())["image_processor"]["size"] == {"height": 8, "width": 8}
    assert "CogVLM2Processor" in repr(processor)


def test_one_question_in_their_form(processor):
    wanted = processor(PICTURE, "Why?")
    for images in (PICTURE, [PICTURE], [[PICTURE]]):
        same(processor(text="Why?", images=images, return_tensors="pt"), wanted)
        same(processor(text=["Why?"], images=images), wanted)  # lists
    same(processor(text="Why?", images=PICTURE, return_tensors="np"), wanted)
    same(processor(text="Why?", return_tensors="pt"), processor(query="Why?"))
    same(processor(text="Why?", template="vqa", return_tensors="pt"), processor(query="Why?", template="vqa"))


def test_several_questions_in_their_form(processor):
    texts, rows = ["Why?", "And what is this?", "q"], [PICTURE, None, [OTHER]]
    wanted = processor.pad_left(
        [processor(PICTURE, "Why?"), processor(None, "And what is this?"), processor(OTHER, "q")]
    )
    same(processor(text=texts, images=rows, padding=True, return_tensors="pt"), wanted)
    same(processor(text=texts, images=[[PICTURE], [], [OTHER]], padding="longest"), wanted)
    plain = processor(text=texts, images=rows)
    assert [len(ids) for ids in plain["input_ids"]] == wanted["attention_mask"].sum(1).tolist()
    right = processor(text=texts, images=rows, padding=True, padding_side="right", return_tensors="pt")
    assert torch.equal(right["attention_mask"].flip(1), wanted["attention_mask"])
    assert processor(text=texts, padding="max_length", max_length=60, return_tensors="pt")["input_ids"].shape == (3, 60)


def test_what_cannot_be_done_as_asked_is_refused(processor):
    with pytest.raises(InputError, match="rows of 22, 21 tokens do not make one tensor") as caught:
        processor(text=["Why", "Wh"], return_tensors="pt")
    assert caught.value.hint == "pass padding=True"
    with pytest.raises(InputError, match="pictures for 1 texts are given, and 2 texts"):
        processor(text=["a", "b"], images=[PICTURE])
    with pytest.raises(InputError, match="2 pictures given"):
        processor(text="a", images=[PICTURE, OTHER])
    with pytest.raises(InputError, match="row 0 has 23 tokens, max_length is 20"):
        processor(text="Why?", max_length=20, truncation=True)
    with pytest.raises(InputError, match="max_length is not given"):
        processor(text="Why?", padding="max_length")
    for name, value in {"videos": [1], "do_rescale": False, "truncate": True}.items():
        with pytest.raises(InputError, match=f"no option {name}="):
            processor(text="Why?", **{name: value})
    for name, value in {"padding": "left", "padding_side": "up", "return_tensors": "tf"}.items():
        with pytest.raises(InputError, match=f"{name} is '{value}'"):
            processor(text="Why?", **{name: value})
    with pytest.raises(InputError, match="text is given together with query"):
        processor(text="a", query="b")


def test_addresses_are_not_fetched(processor):
    for address in (
        "https://example.org/a.jpg",
        "HTTP://example.org/a.jpg",
        "data:image/png;base64,AAAA",
        "s3://a/b.png",
    ):
        for call in (lambda a: processor(image=a, query="q"), lambda a: processor(text="q", images=[a]),
                     processor.image_processor):  # fmt: skip
            with pytest.raises(DataError, match="addresses of pictures are not fetched") as caught:
                call(address)
            assert caught.value.code == "image-url"


@pytest.mark.parametrize("template", ["chat", "vqa", "base"])
@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_a_chat_template_gives_the_encoders_tokens(make_folder, tmp_path, name, template):
    """That of the processor, of its tokenizer, and of a tokenizer that transformers reads from a saved folder."""
    processor = CogVLM2Processor.from_pretrained(make_folder(template_version=template))
    messages, question, history = CONVERSATIONS[name]
    pictures = [PICTURE] if "picture" in name or name == "system" else []
    wanted = processor.encode(question, history, images=len(pictures))
    processor.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for tokenizer in (processor.tokenizer, saved):
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert found["input_ids"] == wanted.input_ids
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = processor.apply_chat_template(messages, **asked)
    same(found, processor(query=question, history=history, images=pictures))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    same(processor(text=prompt, images=pictures, return_tensors="pt"), found)
    short = processor.apply_chat_template(messages, add_generation_prompt=True, image_tokens=1)
    same(processor(text=[short], images=pictures, return_tensors="pt"), found)
    two = processor.apply_chat_template([messages, messages], padding=True, **asked)
    assert torch.equal(two["input_ids"], found["input_ids"].repeat(2, 1))


@pytest.mark.parametrize("template", ["chat", "vqa"])
def test_a_chat_template_numbers_the_frames_of_a_video_model(make_folder, template):
    processor = CogVLM2Processor.from_pretrained(make_folder(vision_experts=False))
    processor.encoder.template = template
    messages = [user(*[IMAGE_PART] * 12, "Why?"), assistant("b"), user("c")]
    wanted = processor.encode("c", [("Why?", "b")], images=12)
    found = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert found == [wanted.input_ids]
    own = processor.chat_template
    tokens = processor.tokenizer.apply_chat_template(
        messages, chat_template=own, tokenize=True, add_generation_prompt=True
    )
    assert tokens["input_ids"] == wanted.input_ids


def test_a_conversation_without_its_last_words(processor):
    found = processor.apply_chat_template([user("Why?")])
    assert found == "<|begin_of_text|>Question: Why?"
    assert processor.apply_chat_template([user("Why?")], add_generation_prompt=True) == f"{found} Answer:"


@pytest.mark.parametrize("pictures", [[], [PICTURE]])
def test_an_answer_at_the_end_is_tokenised_apart(processor, pictures):
    messages = [user("a"), assistant("b"), user(*[IMAGE_PART] * len(pictures), "Why?"), assistant("So.")]
    row = processor(images=pictures, query="Why?", history=[("a", "b")], answer="So.")
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(found["input_ids"], row["input_ids"])
    begun = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)
    assert begun == [row["input_ids"][0, :-1].tolist()]
    for call in (processor.apply_chat_template, processor.tokenizer.apply_chat_template):
        with pytest.raises(Exception, match="a last answer is tokenised apart"):
            call(messages, tokenize=False)
    with pytest.raises(InputError, match="the conversation ends with one"):
        processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    with pytest.raises(InputError, match="continues a last message of the assistant"):
        processor.apply_chat_template(messages[:3], tokenize=True, continue_final_message=True)


def test_a_template_of_the_users_own_is_not_wrapped_again(processor):
    own = "{{ messages[0]['content'] }}!"
    found = processor.apply_chat_template([{"role": "user", "content": "Why"}], own, tokenize=True)
    assert found == [[256, *b"Why!"]]


def test_pictures_of_messages(processor):
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    empty = [user({"type": "image"}, "Why?")]
    same(processor.apply_chat_template(empty, images=[PICTURE], **asked), processor(PICTURE, "Why?"))
    same(
        processor.apply_chat_template(empty, processor_kwargs={"images": [PICTURE]}, **asked),
        processor(PICTURE, "Why?"),
    )
    with pytest.raises(InputError, match="the messages show 1 pictures, and 0 are given"):
        processor.apply_chat_template(empty, **asked)
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}}
    with pytest.raises(DataError, match="not fetched"):
        processor.apply_chat_template([user(part, "Why?")], **asked)
    with pytest.raises(InputError, match="base64"):
        processor.apply_chat_template([user({"type": "image", "base64": "AAAA"}, "Why?")], **asked)
    with pytest.raises(InputError, match="2 pictures given"):
        processor.apply_chat_template([user(IMAGE_PART, IMAGE_PART, "Why?")], **asked)
    with pytest.raises(Exception, match="2 images, at most 1"):
        processor.tokenizer.apply_chat_template([user(IMAGE_PART, IMAGE_PART, "Why?")])
    with pytest.raises(InputError, match="does not begin with the placeholders of 1 pictures"):
        processor(text="<|begin_of_text|>Why?", images=[PICTURE])
    with pytest.raises(InputError, match="does not begin with the placeholders of 0 pictures"):
        processor(text="<|begin_of_text|><|reserved_special_token_0|>Why?")


@pytest.mark.parametrize("messages", [
    [], "Why?", [assistant("a")], [user("a"), assistant("b"), assistant("c"), user("d")], [user("a"), {"role": "tool"}],
    [user("a"), {"role": "system", "content": "b"}, user("c")], [{"role": "user"}], [user({"type": "video"})],
    [{"role": "user", "content": "a", "tool_calls": [1]}], [{"role": "system", "content": "a"}], [["a"]],
])  # fmt: skip
def test_wrong_conversations_are_named(processor, messages):
    with pytest.raises(InputError):
        processor.apply_chat_template(messages, add_generation_prompt=True)
    if messages and isinstance(messages, list) and isinstance(messages[0], dict) and "tool_calls" not in messages[0]:
        with pytest.raises(Exception, match=r"chat template|content"):
            processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_texts_of_rows(processor):
    rows = [[*b" It is , well .", 257], [*b"No.", 258]]
    assert processor.batch_decode(rows) == [" It is , well .", "No."]
    assert processor.batch_decode(torch.tensor([[72, 105, 257]])) == ["Hi"]
    assert processor.decode(torch.tensor([[72, 105, 257]])) == ["Hi"]
    assert processor.batch_decode(rows, skip_special_tokens=False)[1].startswith("No.<|")
    assert processor.decode([]) == ""


def test_a_saved_processor_brings_the_template_and_no_remote_code(make_folder, tmp_path):
    """Whatever template the published tokenizer has: it is another model's."""
    folder = make_folder()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "llama {{ messages }}"}))
    processor = CogVLM2Processor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer_config.json").read_bytes() == (
        folder / "tokenizer_config.json"
    ).read_bytes()
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == "cogvlm2"
    assert "auto_map" not in written
    found = AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template([user("Why?")], tokenize=False)
    assert found == processor.apply_chat_template([user("Why?")]) == "<|begin_of_text|>Question: Why?"
    with pytest.raises(InputError, match="save_pretrained has no option repo"):
        processor.save_pretrained(tmp_path / "saved", repo="a")
