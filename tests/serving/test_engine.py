"""Ways through an engine: caches, chunks, blocks, other engines beside it, and none of ours."""

import pytest

from tests.serving.harness import Engine, Prompt, check, engine, on_transformers
from tests.serving.samples import scenes

ASKED = {"method": "divprune", "num_tokens": 18}


@pytest.fixture(scope="module")
def expected(llava):
    _, model, processor = llava
    return on_transformers(model, processor, scenes(processor), ASKED)


def test_without_prefix_caching(llava, expected):
    folder, _, processor = llava
    with engine(folder, processor, ASKED, enable_prefix_caching=False) as made:
        check(made, scenes(processor), expected)
        assert not any(one.cached for one in made.ask(scenes(processor)))


def test_repeats_are_found_in_the_prefix_cache(llava, expected):
    folder, _, processor = llava
    prompts = scenes(processor)
    with engine(folder, processor, ASKED) as made:
        first, again = made.ask(prompts), made.ask(prompts)
        assert not any(one.cached for one in first)
        for one in again:
            assert one.cached == (one.length - 1) // 32 * 32
        assert any(one.cached for one in again)
        assert [one.ids for one in again] == [one.ids for one in expected]
        # another question about two pictures: they are there, and so is the block they begin
        (answer,) = made.ask([Prompt("<image> <image> where is the digit ? :", prompts[-3].images)])
        assert answer.cached == 32
        assert answer.kept == []


def test_a_chunk_that_cuts_pictures(llava, expected):
    folder, _, processor = llava
    chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    with engine(folder, processor, ASKED, **chunks) as made:
        check(made, scenes(processor), expected)


def test_blocks_are_as_few_as_promised(llava):
    folder, _, processor = llava
    prompt = scenes(processor)[0]
    blocks = {}
    for asked in (None, ASKED):
        with engine(folder, processor, asked) as made:
            blocks[asked is None] = made.look(prompt)[0], made.ask([prompt])[0].length
    whole, short = blocks[True], blocks[False]
    assert whole[1] - short[1] == 144 - 18
    assert whole[0] == -(-whole[1] // 32)
    assert short[0] == -(-short[1] // 32) < whole[0]


def test_an_engine_that_asks_for_nothing_is_vllms_own(llava):
    folder, model, processor = llava
    prompts = [one for one in scenes(processor) if len(one.images) < 3]
    plain = on_transformers(model, processor, prompts, None)
    with engine(folder, processor, None) as made:
        check(made, prompts, plain)


def test_two_engines_share_nothing(llava, expected):
    folder, model, processor = llava
    prompts = scenes(processor)
    other = {"method": "random", "num_tokens": 18}
    others = on_transformers(model, processor, prompts, other)
    with engine(folder, processor, ASKED) as one, engine(folder, processor, other) as two:
        for made, wanted in ((one, expected), (two, others), (one, expected)):
            assert [answer.ids for answer in made.ask(prompts)] == [each.ids for each in wanted]
        names = [made.look(prompts[0])[1] for made in (one, two)]
        assert len(names[0]) == len(names[1]) == 1
        assert names[0] != names[1]


def test_refused_at_start_up(llava):
    folder, _, processor = llava
    with pytest.raises(Exception, match=r"fastv acts at in_llm.*serve on llava: .*divprune"):
        Engine(folder, processor, {"method": "fastv", "keep_ratio": 0.5})


def test_a_known_picture_beside_a_new_one_where_the_text_is_read(llava):
    folder, model, processor = llava
    asked = {"method": "cdpruner", "num_tokens": 18}
    one, two, three = (prompt.images[0] for prompt in scenes(processor)[:3])
    text = "<image> the <image> which picture has a red circle ? :"
    prompts = [Prompt(text, (one, two)), Prompt(text, (one, three)), Prompt(text, (three, two))]
    wanted = on_transformers(model, processor, prompts, asked)
    with engine(folder, processor, asked) as made:
        answers = made.ask(prompts)
        assert [answer.ids for answer in answers] == [each.ids for each in wanted]
        # the first picture of a prompt has more text behind it than the second
        assert [answer.kept for answer in answers] == [
            wanted[0].kept,
            wanted[1].kept[1:],
            wanted[2].kept[:1],
        ]
