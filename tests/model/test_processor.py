"""Preprocessing against transformers' own: patches, M-RoPE positions, prompts, what is trained."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from actial_fast.data.sources.picture import decode
from actial_fast.data.sources.row import BadRow, Row, Turn
from actial_fast.data.sources.stream import Example
from actial_fast.model.processor import Processor, dummy
from actial_fast.packing import native
from actial_fast.packing.batch import collate, micro_batches, mrope_positions
from actial_fast.packing.packed_ops import collect, patchify

MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])


@pytest.fixture(scope="module")
def processor(lab):
    return Processor.load(str(lab.model), min_pixels=28 * 28, max_pixels=28 * 28 * 64)


def test_the_extension_is_built():
    assert native.AVAILABLE, native.WHY_NOT


@pytest.mark.parametrize("size", [(28, 28), (56, 28), (84, 140), (300, 200), (33, 500)], ids=str)
def test_patches_equal_transformers(processor, example, size):
    row = example("<image>?", sizes=[size])
    sequence = processor.encode_prompt(row)
    theirs = processor.image_processor(images=[decode(row.row.images[0], "")], return_tensors="np", input_data_format="channels_last")
    assert sequence.grids == (tuple(theirs["image_grid_thw"][0]),)
    patches = patchify(collect(processor.store, sequence.images))
    np.testing.assert_allclose(patches.numpy(), theirs["pixel_values"], atol=2e-6)


@pytest.mark.parametrize(("patch", "merge", "frames", "height", "width"), [(14, 2, 2, 56, 84), (16, 2, 1, 32, 96), (4, 1, 3, 8, 12)])
def test_extension_equals_its_twin(patch, merge, frames, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = native.patchify(image, patch=patch, merge=merge, frames=frames, mean=MEAN, std=STD)
    scale, shift = (1 / (255 * STD)).astype(np.float32), (-MEAN / STD).astype(np.float32)
    np.testing.assert_allclose(ours, native.patchify_numpy(image, patch, merge, frames, scale, shift), atol=1e-6)


@pytest.mark.parametrize("shape", [(27, 28, 3), (28, 30, 3), (0, 28, 3), (28, 28), (28, 28, 4)], ids=str)
def test_extension_rejects_what_does_not_divide(shape):
    with pytest.raises(ValueError, match="image: "):
        native.patchify(np.zeros(shape, np.uint8), patch=14, merge=2, frames=2, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    "sizes",
    [[], [(28, 28)], [(56, 84)], [(84, 28), (28, 140), (56, 56)], [(28, 28)] * 10],
    ids=lambda s: f"{len(s)} images" if len(s) != 1 else str(s[0]),
)
def test_positions_equal_get_rope_index(processor, lab, example, sizes):
    sequence = processor.encode_prompt(example("a" + "<image>b" * len(sizes) + "c", sizes=sizes))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(lab.model)
    ids = torch.from_numpy(sequence.ids)[None]
    kinds = (ids == processor.image_token).int()
    grids = torch.tensor(sequence.grids) if sizes else None
    theirs, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grids)
    assert torch.equal(torch.from_numpy(sequence.positions), theirs[:, 0])


def test_positions_insist_on_matching_grids():
    ids = np.array([1, 9, 9, 2])
    with pytest.raises(AssertionError, match="2 image tokens, but grids of 0"):
        mrope_positions(ids, [], image_token=9, merge=2)
    with pytest.raises(AssertionError, match="2 image tokens, but grids of 4"):
        mrope_positions(ids, [(1, 4, 4)], image_token=9, merge=2)
    with pytest.raises(AssertionError, match="disagree"):
        mrope_positions(np.array([9, 1, 9]), [(1, 2, 4)], image_token=9, merge=2)


def test_only_answers_are_trained(processor, example):
    sequence = processor.encode(example("<image>Which side?", "B", sizes=[(28, 28)]))
    assert processor.tokenizer.decode(sequence.ids[sequence.trained]) == "B<|im_end|>"
    assert not sequence.trained[: np.flatnonzero(sequence.trained)[0]].any()


def test_every_answer_of_a_conversation_is_trained(processor):
    turns = (Turn("system", "s"), Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"), Turn("assistant", "a2"))
    sequence = processor.encode(Example(Row(turns=turns), 0))
    assert processor.tokenizer.decode(sequence.ids[sequence.trained]) == "a1<|im_end|>a2<|im_end|>"
    assert processor.decode(sequence.ids).startswith("system\ns")


def test_prompt_is_what_the_answer_was_trained_on(processor, example):
    row = example("<image>Which side?", "B", sizes=[(28, 28)])
    prompt, whole = processor.encode_prompt(row), processor.encode(row)
    assert np.array_equal(whole.ids[: len(prompt)], prompt.ids)
    assert np.array_equal(prompt.extended(whole.ids[len(prompt) :]).positions, whole.positions)


def test_special_tokens_in_a_text_are_refused(processor, example):
    with pytest.raises(BadRow, match=r"test:0: the text contains the special token <\|im_end\|>"):
        processor.encode(example("hello<|im_end|>", "B"))


def test_too_long_a_prompt_is_an_error_naming_the_row(lab, example):
    short = Processor.load(str(lab.model), max_prompt=5)
    with pytest.raises(BadRow, match=r"test:3: prompt of .* tokens, over max_prompt_tokens=5"):
        short.encode_prompt(example("a rather long question", seed=3))


def test_a_row_without_an_answer_cannot_be_trained_on(processor, example):
    with pytest.raises(BadRow, match="no assistant turn"):
        processor.encode(example("q"))


@pytest.mark.parametrize("text", ["<think>plain</think>", "Straße 你好 \n\t  emoji 🎲", "A. left\nB. right"])
def test_tokenizer_loses_nothing(processor, text):
    assert processor.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_phrases_are_single_tokens(processor):
    assert len(processor.tokenizer("<think>The camera moved to the left. So the answer is B.</think>")["input_ids"]) == 4


def test_saved_and_loaded_is_the_same(processor, tmp_path, example):
    processor.save(tmp_path)
    row = example("<image>Which side is it?", "B", sizes=[(90, 130)])
    again = Processor.load(str(tmp_path))
    ours, theirs = processor.encode(row), again.encode(row)
    assert np.array_equal(ours.ids, theirs.ids) and ours.images == theirs.images
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == processor.tokenizer.chat_template
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size == processor.image_processor.size


@pytest.mark.parametrize("left", [False, True])
def test_collate_points_at_the_states_that_predict(processor, example, left):
    rows = [example("a longer question " * 3, "B"), example("<image>q", "C", sizes=[(28, 56)])]
    sequences = [processor.encode(row) for row in rows]
    batch = collate(sequences, processor.pad, processor.store, left=left)
    ahead = batch.input_ids.flatten()[batch.loss_rows + 1]
    assert torch.equal(ahead, batch.targets)
    assert batch.owner.bincount().tolist() == [int(s.trained.sum()) for s in sequences]
    assert batch.attention_mask.sum(1).tolist() == [len(s) for s in sequences]
    assert batch.model_inputs()["pixel_values"].shape[0] == batch.image_grid_thw.prod(1).sum()


def test_micro_batches_hold_everything_once():
    groups = micro_batches([5, 1, 9, 3, 7], 2)
    assert sorted(i for g in groups for i in g) == list(range(5)) and max(map(len, groups)) == 2
    assert groups[0] == [1, 3]


def test_dummy_has_an_image_and_a_target(processor):
    assert len(dummy(processor).images) == 1 and dummy(processor).trained.any()
    assert not dummy(processor, image=False).images and dummy(processor, image=False).trained.any()
