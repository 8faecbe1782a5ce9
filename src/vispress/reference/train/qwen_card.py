"""Text of the Qwen reference's model card; `write_card` fills it in."""

from typing import Final

QWEN_TEXT: Final = """# Model card: the vispress reference VLM, Qwen2.5-VL

A `Qwen2_5_VLForConditionalGeneration` of {millions:.1f} M parameters, trained from nothing by the
script that trains the LLaVA reference, on the same scenes and questions. It exists so that
visual-token compression can be measured offline on a second architecture: window attention in the
encoder, a 2 x 2 merger, M-RoPE, pictures of several resolutions, videos, no [CLS], grouped key
heads. It knows one small world and a vocabulary of {words} words; it is of no other use.

{note}## Accuracy at full tokens

Exact match of greedy `model.generate` on pictures of 96 x 96 (64 visual tokens) and clips of twelve
such frames (6 x 64 visual tokens), {questions} held-out questions a kind: scenes never trained on,
handwritten digits from a held-out split, answers balanced. One standard error is at most
{error:.1%}.

| kind | example | accuracy | target | chance |
|---|---|---|---|---|
{rows}

Mean over kinds: {mean:.1%}.

## Use

    from vispress.reference import heldout, load
    from vispress.reference.processor import with_marks

    model, processor = load(architecture="qwen2_5_vl")
    image, prompt, answer, _ = heldout("where", 1)[0]
    inputs = processor(images=[image], text=[with_marks(processor, prompt)], return_tensors="pt")

A prompt reads `<vision><image></vision> where is the ring ? :`, with `<video>` for a clip, which
the processor takes as `videos=[frames]`; `with_marks` adds the marks to the prompts of `heldout`.
In `vispress bench` the model is called `reference-qwen`. The folder is an ordinary Hugging Face
one, but for its processor: transformers' own `Qwen2_5_VLProcessor` wants a video processor and with
it torchvision, so the package has one that does without.

## Data

Scenes of 96 x 96 pixels are drawn on the fly and never repeated: 3 to 8 shapes (8 kinds, 8 colours,
half with a small dot), 1 to 3 handwritten digits and, in four of five scenes, a sign with a printed
two-digit number, on a textured background. About a quarter of all steps show them at 84, 108 or 120
pixels instead. The handwritten digits are scikit-learn's `load_digits` (1,797 images of 8 x 8, from
the UCI ML repository, CC BY 4.0); every fourth is held out. All else is drawn by this package. No
picture or text from elsewhere is involved.

A clip is twelve frames of one scene, in six steps of two. Three or four shapes (and, in one of two
clips, a digit) stay where they are, and one of them changes its colour at some step; two to four
others come one after another, each for one or two steps. No two shapes of a clip are alike. Every
frame has a little noise of its own; nothing else moves.

## Recipe

1. **Vision**, {vision_images:,} images, {vision_minutes:.0f} minutes: dense labels of merged tokens
   (name, colour, dot, centres of items), read out against the language model's word embeddings. A
   token is named after what covers most of it; the token with an item's centre always names it.
2. **Language**, {language_images:,} images of about 20 questions each, {language_minutes:.0f}
   minutes: questions packed behind one set of visual tokens, each blind to the others, at the
   M-RoPE positions it would have alone. Cross entropy on the answer and the end token and, for the
   first 80 %, also on the first answer word at the question's last two tokens. Stage 1's losses
   stay on at 0.1. Rotary positions are relative, so nothing in the encoder can know where in the
   picture it is: rows and columns are asked of the visual tokens after the second decoder layer.
3. **Clips**, {clips_images:,} images (a step of a clip counts as one), {clips_minutes:.0f} minutes:
   every other step shows clips with about 20 questions each, the others replay stage 2's pictures
   without dense labels. The vision side learns a little (a tenth of the learning rate).

Muon on matrices and AdamW elsewhere, peak learning rate 3e-3 (stage 3: 1e-3), cosine, bf16
autocast over fp32 weights. Vision encoder 128 wide, 5 blocks, patches of 6 pixels, windows of 4 x 4
tokens, full attention in the third and the last block; language model 192 wide, 6 layers, 6 heads
and 3 for keys. Rotary bases are 100 (vision) and 10 (text): there are only about ten rows and
columns to tell apart. Weights are stored in fp16.

Made with torch {torch}, transformers {transformers}, on {machine}.

    vispress train-reference --architecture qwen2_5_vl

## Choices that were not compared

One run was made, so none of these is measured against its alternative.

* The encoder's own forward splits a batch into one attention call a window. All windows of a batch
  go through one batched product instead; a test holds that both compute the same.
* The LLaVA's dense loss of places on encoder features was left out here, by the argument above, and
  asked of the decoder instead. Whether it helps the answers was not tested.
* Widths, depths, rotary bases and grouped heads were set beforehand and not varied.

## Limits

Pictures are synthetic, questions follow fixed templates, and most need a single look; results on
it rank methods on this world, not on photographs. The digit split is by image, not by
writer. A visual token covers 12 x 12 pixels, more than half of an object's width: pruning takes
larger pieces than on the LLaVA. In-LLM pruning late in so shallow a model is cheap, because answers
are read early: always compare at the same depth. Clips have one
length, one resolution and no motion.
"""
