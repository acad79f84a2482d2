"""Who looks at whom, by enumeration; and FlexAttention on a CPU, uncompiled, against SDPA: how it is computed on a GPU is PyTorch's business."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_mask

from masters.distill import attention
from masters.distill.attention import NAME, attention_error, block_mask, dense_mask, packed_attention, sees, takes_blocks

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 1, 2, 2, -1, -1, -1, -1]])
CPU = torch.device("cpu")


def test_the_mask_by_enumeration():

    found = dense_mask(SEGMENTS)
    assert found.shape == (2, 1, 9, 9)
    assert found.dtype == torch.bool
    for b in range(2):
        for i in range(9):
            for j in range(9):
                query, key = int(SEGMENTS[b, i]), int(SEGMENTS[b, j])
                # What padding sees does not matter: nobody reads its states.
                expected = i == j or (key == 0 and j <= i) if query == -1 else j <= i and key in (0, query)
                assert bool(found[b, 0, i, j]) == expected, (b, i, j)
    assert bool(found.any(-1).all()), "a row that sees nothing is NaN in a softmax"
    assert not bool(found[1, 0, :5, 5:].any()), "nobody reads padding"


def test_the_block_mask_is_the_dense_one():
    random = torch.Generator().manual_seed(0)
    for length in (9, 128, 300):
        segments = torch.cat([torch.zeros(2, length // 3, dtype=torch.long), torch.randint(1, 4, (2, length - length // 3), generator=random).sort(1)[0]], 1)
        segments[1, length // 2 :] = -1
        blocks = block_mask(segments)
        assert blocks.shape == (2, 1, length, length)
        assert torch.equal(create_mask(blocks.mask_mod, 2, 1, length, length, device="cpu"), dense_mask(segments))
        whole = -(-length // 128)
        held = torch.nn.functional.pad(dense_mask(segments), (0, -length % 128, 0, -length % 128)).view(2, 1, whole, 128, whole, 128).any(3).any(-1)
        assert torch.equal(blocks.to_dense().bool(), held), "no block is computed that holds nothing, and none is left out that holds something"
    far = block_mask(torch.arange(5).repeat_interleave(256)[None])
    assert float(far.sparsity()) > 60, "responses do not look at each other, so their blocks are skipped"
    assert bool(sees(SEGMENTS)(0, 0, torch.tensor(4), torch.tensor(2)))


def test_flex_attention_gives_sdpas_results_and_gradients(flex_on_cpu: None):
    for heads, key_heads, width in ((4, 4, 16), (4, 2, 32), (6, 2, 16)):
        assert attention_error(heads, key_heads, width, torch.float32, CPU) < 1e-5
    assert 1e-5 < attention_error(4, 2, 16, torch.bfloat16, CPU) < attention.TOLERANCE


def test_a_wrong_rule_is_an_error(flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch):
    exact = attention.block_mask
    monkeypatch.setattr(attention, "block_mask", lambda segments: exact(segments.clamp(max=1)))
    assert attention_error(2, 2, 16, torch.float32, CPU) > 0.01


def test_queries_wider_than_values_are_narrowed_under_autocast(flex_on_cpu: None):
    query, key = (torch.randn(1, 2, 9, 16) for _ in range(2))
    module = torch.nn.Module()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention(module, query, key, torch.randn(1, 2, 9, 16).bfloat16(), block_mask(SEGMENTS[:1]), scaling=0.25)
    assert out.dtype == torch.bfloat16
    assert out.shape == (1, 9, 2, 16)


def tiny(**changed: object) -> transformers.PreTrainedModel:
    text = dict(model_type="qwen2", vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    vision = dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text | changed, vision_config=vision)).eval()


def test_a_cpu_keeps_sdpa():
    model = tiny()
    assert not takes_blocks(model, CPU)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_what_flex_attention_can_not_compute_keeps_sdpa(flex_on_cpu: None):
    dropping, narrow = tiny(attention_dropout=0.1), tiny(num_attention_heads=8, num_key_value_heads=8)
    eager = tiny()
    eager.set_attn_implementation("eager")
    for model, found in ((dropping, "sdpa"), (narrow, "sdpa"), (eager, "eager")):
        assert not takes_blocks(model, CPU)
        assert model.config.text_config._attn_implementation == found
    model = tiny()
    assert takes_blocks(model, CPU)
    assert (model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation) == (NAME, "sdpa")


@pytest.mark.parametrize("how", ["fails", "is wrong"])
def test_where_flex_attention_does_not_work_it_says_so_and_keeps_sdpa(
    how: str, flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*args: object, **settings: object) -> None:
        raise RuntimeError("no C compiler\nsecond line")

    exact = attention.flex_attention_forward
    monkeypatch.setattr(attention, "flex_attention_forward", broken if how == "fails" else lambda _, q, *rest, **more: exact(_, 1.2 * q, *rest, **more))
    model = tiny()
    assert not takes_blocks(model, CPU)
    assert not takes_blocks(model, CPU)
    said = capsys.readouterr().err
    assert said.count("FlexAttention can't be used with 4 heads of 16 in float32") == 1, "said once"
    assert ("no C compiler" if how == "fails" else "% off") in said
    assert "second line" not in said


def test_generation_after_packed_rows_keeps_its_own_masks(flex_on_cpu: None):
    """The switch stays: padding must still be masked, by SDPA's rules."""
    model, same = tiny(), tiny()
    same.load_state_dict(model.state_dict())
    assert takes_blocks(model, CPU)
    ids = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    settings = dict(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **settings), same.generate(ids, **settings))
    alone = model.generate(ids[:1, 2:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **settings)[0, 6:], alone[0, 4:])


def test_checkpointed_layers_get_the_block_mask_again_in_the_backward_pass(flex_on_cpu: None):
    model = tiny(num_hidden_layers=2).train()
    assert takes_blocks(model, CPU)
    ids, gradients = torch.randint(1, 40, SEGMENTS.shape, generator=torch.Generator().manual_seed(2)), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        states = model.model(input_ids=ids, attention_mask=block_mask(SEGMENTS), position_ids=torch.arange(9)[None], use_cache=False).last_hidden_state
        parameters = list(model.model.language_model.layers.parameters())
        gradients.append(torch.autograd.grad(states[SEGMENTS >= 0].square().sum(), parameters))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_saved_model_does_not_name_the_switch(flex_on_cpu: None, tmp_path: Path):
    model = tiny()
    assert takes_blocks(model, CPU)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.text_config._attn_implementation == "sdpa"
